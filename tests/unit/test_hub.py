"""The real hub client against a small hub on this machine: what comes, how often, and what is said where it does not."""

import errno
import logging
import ssl
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from small_hub import COMMIT, Fault, SmallHub
from transformers import CLIPTextModel

from conceptseg.backbones.base import Checkpoint, resolved_commit
from conceptseg.backbones.encoders.image_encoder import checkpoint_file
from conceptseg.backbones.hub import announce_download
from conceptseg.backbones.planned_weights import load_part
from conceptseg.backbones.repositories import Repository, fetch, missing_files, unread_of
from conceptseg.backbones.transformers.encode_only import WeightFiles
from conceptseg.cli.explain import explain, parse
from conceptseg.errors import ConfigError

NAME, PARTS, ALWAYS = "owner/model", Repository(files=("transformer", "vae"), download=33.7), 10**6
SHARD = "transformer/diffusion_pytorch_model-{:05}-of-{:05}.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A FLUX in shards, small enough that each transformer block has some of its own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
        pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).save_pretrained(folder / "transformer", max_shard_size="8KB")  # fmt: skip
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"vae" * 2000)
    (folder / "README.md").write_text("unread")
    (folder / "flux.safetensors").write_bytes(b"unread")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def server():
    found = SmallHub()
    yield found
    found.close()


@pytest.fixture(scope="module", autouse=True)
def one_store_of_certificates():
    """Each of the many clients would read the authorities' certificates, and nothing here speaks TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssl, "create_default_context", cache(ssl.create_default_context))
        yield


@pytest.fixture
def hub(server, files, tmp_path, monkeypatch):
    """Serves the model as `owner/model`; the client's cache is empty, and it has no token."""
    server.repos, server.faults, server.spoilt, server.log, server.tokens = {}, [], set(), [], []
    server.serve(NAME, dict(files))
    endpoint_is(server.endpoint, monkeypatch)
    for name, value in {"OFFLINE": False, "CACHE": str(tmp_path / "hub"), "DISABLE_XET": True}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.HF_HUB_{name}", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    announce_download.cache_clear()
    resolved_commit.cache_clear()
    return server


def endpoint_is(endpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)


def model(revision=COMMIT):
    return Checkpoint(NAME, revision)


def by_fetch():
    fetch(model(), PARTS)


def by_diffusers():
    load_part(model(), "transformer", FluxTransformer2DModel, "transformer")


def by_transformers():
    load_part(model(), "text_encoder", CLIPTextModel, "transformer")


def by_tensors():
    list(WeightFiles(model(), "transformer").tensors(["x_embedder.weight"]))


def by_file():
    checkpoint_file(model(), "transformer/config.json")


WAYS = (by_fetch, by_diffusers, by_transformers, by_tensors, by_file)


def said(way):
    with pytest.raises(ConfigError) as raised:
        way()
    return str(raised.value)


# ---------------------------------------------------------------- what comes


def test_files_that_are_read_come_once_and_are_read_from_the_cache(hub, monkeypatch):
    by_fetch()
    wanted = sorted(name for name in hub.repos[NAME].files if name.startswith(("transformer/", "vae/")))
    assert hub.fetched() == wanted and missing_files(model(), PARTS.files) == []
    by_diffusers()
    by_tensors()
    by_fetch()
    assert hub.fetched() == wanted
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for way in (by_fetch, by_diffusers, by_tensors, by_file):
        way()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    endpoint_is("http://127.0.0.1:9", monkeypatch)  # nobody listens there
    for way in (by_fetch, by_diffusers, by_tensors, by_file):
        way()


def test_encode_only_fetches_only_the_shards_it_reads(hub):
    unread = unread_of({"load": "encode_only"})
    fetch(model(), PARTS, unread)
    names = hub.fetched()
    assert len(names) == len(set(names)) < len([n for n in hub.repos[NAME].files if n.startswith(("transformer/", "vae/"))])
    assert missing_files(model(), PARTS.files, unread) == [] != missing_files(model(), PARTS.files)
    files = WeightFiles(model(), "transformer")
    read = [name for name in files.places if not name.startswith(unread)]
    assert len(list(files.tensors(read))) == len(read) and hub.fetched() == names


def test_a_branch_is_resolved_to_its_commit_and_a_moved_repository_is_followed(hub, files):
    fetch(model("main"), PARTS)
    assert missing_files(model("main"), PARTS.files) == missing_files(model(), PARTS.files) == []
    hub.serve("owner/other", {}, moved_to=NAME)
    fetch(Checkpoint("owner/other", COMMIT), PARTS)
    assert missing_files(Checkpoint("owner/other", COMMIT), PARTS.files) == []


def test_an_accepted_licence_opens_a_gate_and_the_token_stays_with_the_hub(hub, monkeypatch):
    hub.repos[NAME].gate = ("hf_mine",)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    by_fetch()
    assert missing_files(model(), PARTS.files) == []
    assert {token for path, token in hub.tokens if path.startswith("/store/")} == {""}


@pytest.mark.parametrize("fault", [Fault("/store/", 503), Fault("/store/", 429), Fault("/tree/", 500), Fault("config.json", 504)])
def test_a_hub_that_is_out_of_order_once_is_asked_again(hub, fault):
    hub.faults = [fault]
    by_fetch()
    names = hub.fetched()
    assert fault.times == 0 and len(names) == len(set(names))


def test_a_connection_that_is_dropped_in_mid_file_goes_on_where_it_was(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what came before is kept by whole chunks
    hub.faults = [Fault("/store/", keep=1000, method="GET")]
    by_fetch()
    size = sum(sent for method, path, _, sent in hub.log if path.startswith("/store/"))
    assert [span for _, _, span, _ in hub.log if span] == ["bytes=1000-"]
    assert size == sum(len(c) for n, c in hub.repos[NAME].files.items() if n.startswith(("tr", "vae")) and n.endswith("tensors"))


def test_python_is_told_the_size_before_anything_comes(hub, caplog, monkeypatch):
    monkeypatch.setattr("conceptseg.backbones.hub.sheet_of", lambda path: {"hub": {"download": 33.7, "files": ["transformer"]}})
    with caplog.at_level(logging.WARNING, "conceptseg"):
        by_diffusers()
        by_tensors()
    assert [r.getMessage().rpartition(" to ")[0] for r in caplog.records if r.name.startswith("conceptseg")] == [
        "owner/model is not whole on this machine. Fetching it, up to 33.7 GB"
    ]


def test_the_explain_command_downloads_nothing_unasked(hub, tmp_path):
    given = ["extractor=maskclip", "model=clip_vit_b_16_laion2b", "image=a.png", "concepts=[kite]", f"out={tmp_path / 'out.png'}"]
    hub.log.clear()
    message = said(lambda: explain(parse(given)))
    assert "nothing is downloaded unasked" in message and "download=yes" in message and " GB to " in message and hub.log == []
    assert "no such repository" in said(lambda: explain(parse([*given, "download=yes"])))  # it did ask


# ---------------------------------------------------------------- what does not


def gated(hub, monkeypatch):
    hub.repos[NAME].gate = ("hf_other",)


def gated_to_the_token(hub, monkeypatch):
    gated(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


def private(hub, monkeypatch):
    hub.repos[NAME].readers = ("hf_other",)


def private_to_the_token(hub, monkeypatch):
    private(hub, monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")


def withdrawn(hub, monkeypatch):
    hub.repos.clear()


def other_commit(hub, monkeypatch):
    hub.repos[NAME].commit = "b" * 40


def without_config(hub, monkeypatch):
    hub.repos[NAME].files = {name: b"{}" for name in ("transformer/other.json", "vae/config.json")}


def asked_too_often(hub, monkeypatch):
    hub.faults = [Fault("/", 429, times=ALWAYS)]


def out_of_order(hub, monkeypatch):
    hub.faults = [Fault("/", 503, times=ALWAYS)]


def store_out_of_order(hub, monkeypatch):
    hub.faults = [Fault("/store/", 503, times=ALWAYS), Fault("transformer/config.json", 502, times=ALWAYS)]


def always_dropped(hub, monkeypatch):
    hub.faults = [Fault("/store/|resolve/.*config", keep=0, times=ALWAYS, method="GET")]


def full_disk(hub, monkeypatch):
    opened = Path.open

    def limited(self, mode="r", *rest, **more):
        found = opened(self, mode, *rest, **more)
        if self.name.endswith(".incomplete"):

            class Full(type(found)):
                def write(self, content):
                    super().write(content[:100])
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Full(opened(self, mode, buffering=0, **more))
        return found

    monkeypatch.setattr(Path, "open", limited)


def offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def no_network(hub, monkeypatch):
    endpoint_is("http://127.0.0.1:9", monkeypatch)


def no_hub(hub, monkeypatch):
    hub.faults = [Fault("/", 200, times=ALWAYS)]


PAGE, LOGIN = f"/{NAME}", "hf auth login"
CASES = [
    (gated, "it is gated, and no token was shown", [PAGE, LOGIN]),
    (
        gated_to_the_token,
        "it is gated, and the account of the token that was shown has no access",
        [PAGE, "hf auth whoami", LOGIN],
    ),
    (private, "no such repository, or a private one", [PAGE, LOGIN]),
    (private_to_the_token, "a private one that the token that was shown may not read", [PAGE, LOGIN]),
    (withdrawn, "no such repository, or a private one", [PAGE, LOGIN]),
    (other_commit, f"it has no commit {COMMIT}", [f"{PAGE}/commits/main", "extractor.backbone.revision"]),
    (without_config, f" at {COMMIT}", [f"{PAGE}/tree/{COMMIT}", "scripts/check_sheets.py"]),
    (asked_too_often, "asked too often (429)", [PAGE, LOGIN]),
    (out_of_order, "the hub is out of order (503", [PAGE, "later"]),
    (store_out_of_order, "the hub is out of order (50", [PAGE, "later"]),
    (always_dropped, "can't be made, or was lost", [PAGE, "HTTPS_PROXY", "HF_ENDPOINT"]),
    (full_disk, "no space is left for it in ", ["HF_HOME", "run the same command again"]),
    (offline, "HF_HUB_OFFLINE is set", [PAGE, "Unset it", "HF_HOME"]),
    (no_network, "Connection refused", [PAGE, "HTTPS_PROXY", "HF_ENDPOINT"]),
]


@pytest.mark.parametrize(("break_it", "cause", "advice"), CASES, ids=[case[0].__name__ for case in CASES])
def test_every_way_of_reading_says_the_cause_and_the_remedy(hub, monkeypatch, tmp_path, break_it, cause, advice):
    break_it(hub, monkeypatch)
    wrong = []
    for number, way in enumerate(WAYS):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"hub{number}"))
        message = said(way)
        if not all(part in message for part in (cause, NAME, *advice)) or len(message.splitlines()) > 3:
            wrong.append(f"{way.__name__}: {message}")
        assert not list((tmp_path / f"hub{number}").rglob("*.incomplete"))
    assert not wrong, "\n".join(wrong)


def test_a_file_of_another_checksum_is_deleted_and_comes_again(hub, monkeypatch, tmp_path):
    for number, way in enumerate((by_fetch, by_diffusers, by_tensors)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / f"hub{number}"))
        hub.spoilt = {name for name in hub.repos[NAME].files if name.endswith(".safetensors")}
        message = said(way)
        assert "came with another checksum" in message and "HF_ENDPOINT" in message and PAGE in message
        hub.spoilt = set()
        way()


def test_an_unreachable_hub_is_not_said_to_lack_what_an_unfinished_download_lacks(hub):
    by_file()
    hub.faults = [Fault("/api/", 503, times=ALWAYS)]
    assert "the hub is out of order (503" in said(by_fetch)


def test_a_branch_that_cannot_be_resolved_says_why(hub, monkeypatch):
    gated(hub, monkeypatch)
    hub.repos[NAME].readers = ("hf_other",)
    for reason in (private, no_network):
        reason(hub, monkeypatch)
        message = said(lambda: model("main").source())
        assert "could not be resolved to a commit" in message and ("private one" in message or "refused" in message)


def test_an_answer_that_is_no_hubs_is_named(hub, monkeypatch):
    no_hub(hub, monkeypatch)
    message = said(by_file)
    assert "does not answer as a hub does" in message and "HF_ENDPOINT" in message
