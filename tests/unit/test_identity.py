"""Check run ids and the weights in manifests: evaluation/assemble.py and backbones/base.py."""

import json
import shutil
from importlib import import_module
from inspect import signature

import pytest
import yaml
from composing import CONF, GROUPS, plainly, sheet
from tiny_encoders import write_clip

from conceptseg.backbones.base import Backbone, Checkpoint, shipped_digests
from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import assemble, method_identity
from conceptseg.extractors.base import OneView

COMMIT = "7288da5a0d6f0b51c4a2b27c624837a9236d0112"
FREE = {
    "device", "licence", "memory", "hub", "text_cache",
    "text_encoders", "load",  # when and how much is read, not what: the maps are held to be the same
    "trained_on",  # a declaration
    "frames",  # of a video that is made; an image is read as one frame
}  # fmt: skip
"""Settings of backbones that move no number."""
OTHER = {
    "path": ["owner/other"], "revision": ["f" * 40], "dtype": ["float64", "float16"], "vae_dtype": ["float64"],
    "image_size": [64], "resize": ["nearest", "bicubic"], "position_resize": ["dino", "timm"], "mean": [[0.1, 0.2, 0.3]],
    "std": [[0.1, 0.2, 0.3]], "labels": ["scenes", ["a"]], "architecture": ["Sam2Model", "GroupViTModel"], "file": ["other.pth"],
    "templates": [["x {}"]], "tokenizer": ["files", "bpe"], "text_tokens": [19], "prompt": ["x {}"],
    "concept_pooling": ["mean"], "pooled": ["caption"], "weights": ["int8", "full"], "clip_tokens": [19],
    "concept_text": ["t5", "joined"], "concept_token": [19], "concept_position": [19], "compute_dtype": ["float64"],
    "single_blocks": [True], "randomise": [{"seed": 0}],
}  # fmt: skip
"""For each other setting, values of which at least one is not the sheet's."""


def backbone_sheet(name):
    return {**sheet("backbone", name), "device": "cpu"}


def built(settings) -> Backbone:
    """As a run builds it, without the checks of the settings, which come a thousand times here."""
    module, _, name = settings["_target_"].rpartition(".")
    return getattr(import_module(module), name)(**{key: value for key, value in settings.items() if key != "_target_"})


def settings_of(kind):
    """Every setting that a backbone's class takes, also those it hands on."""
    names = {n for one in kind.__mro__ if "__init__" in vars(one) for n in signature(one).parameters}
    return names - {"self", "args", "kwargs", "settings", "model", "about"}


# ---------------------------------------------------------------- backbones say all that moves a number


@pytest.mark.parametrize("name", GROUPS["backbone"])
def test_a_backbone_names_every_setting_that_can_move_a_number(name, tmp_path):
    settings = backbone_sheet(name)
    if settings["path"].startswith("./"):
        settings["path"] = str(tmp_path)
    if settings.get("revision") == "main":  # only a hub knows what it is
        settings["revision"] = COMMIT
    one = built(settings)
    known = settings_of(type(one)) | settings.keys() - {"_target_"}
    if Checkpoint(settings["path"]).folder() is not None:
        known -= {"revision"}
    if getattr(one, "kind", "") == "flux2":
        known -= {"concept_pooling"}  # refused
    if settings.get("load") == "encode_only":
        known -= {"pooled", "single_blocks"}  # refused
    silent = []
    for key in sorted(known - FREE):
        value = next(v for v in OTHER[key] if v != settings.get(key) and [v] != settings.get(key))
        if built({**settings, key: value}).identity() == one.identity():
            silent.append(key)
    assert silent == []
    for key in sorted(known & {"device", "licence", "memory", "text_cache"}):
        value = {"device": "cpu:0"}.get(key, str(tmp_path))
        assert built({**settings, key: value}).identity() == one.identity(), key


# ---------------------------------------------------------------- methods


class Net(Backbone):
    def __init__(self, path, device="cpu"):
        self.checkpoint, self.device = Checkpoint(path), device

    def identity(self):
        return {"class": "Net", **self.checkpoint.identity()}


class Method(OneView):
    version = 1

    def __init__(self, net, version_of_text=1):
        self.net = net

    def saliency(self, batch):
        raise NotImplementedError


class Other(Method):
    pass


class Hidden(Method):
    def __init__(self, net):
        self.another_name = net


SETTINGS = {"_target_": "lab_of_mine.Method", "net": {"_target_": "lab_of_mine.Net", "path": "lab:vit", "device": "cpu"}, "a": 1}


def test_classes_with_equal_settings_differ():
    first, second = (method_identity(SETTINGS, kind(Net("lab:vit"))) for kind in (Method, Other))
    assert first != second and {**second, "class": "Method"} == first


def test_classes_of_one_name_in_two_packages_differ_and_moving_one_inside_its_package_changes_nothing():
    one, moved, other = (
        method_identity({**SETTINGS, "_target_": target}, Method(Net("lab:vit")))
        for target in ("lab_of_mine.Method", "lab_of_mine.methods.Method", "yours.Method")
    )
    assert one == moved != other


def test_a_model_that_the_method_does_not_name_is_refused():
    with pytest.raises(ConfigError, match=r"extractor\.net is a model, but Hidden\.identity\(\) does not name it.*self\.net"):
        method_identity(SETTINGS, Hidden(Net("lab:vit")))


# ---------------------------------------------------------------- what is known of weights


@pytest.fixture
def lab_copy(tmp_path):
    return shutil.copytree(Checkpoint("lab:vit").folder(), tmp_path / "copied")


def test_every_shipped_model_has_its_digest():
    models = {path.parent.name for path in Checkpoint("lab:vit").folder().parent.glob("*/card.json")}
    assert shipped_digests() == {name: Checkpoint(f"lab:{name}").digest() for name in models}


def test_lab_is_what_ships_wherever_it_lies(lab_copy):
    (lab_copy / "card.json").unlink()  # neither the card nor pictures are read by a loader
    (lab_copy / "samples.png").write_bytes(b"")
    copied, shipped = Checkpoint(str(lab_copy)), Checkpoint("lab:vit")
    assert copied.provenance == shipped.provenance == "lab" and copied.identity() == shipped.identity()


@pytest.mark.parametrize("where", [0, 0.5, 1])
def test_a_changed_byte_makes_it_local_whatever_its_card_says(lab_copy, where):
    assert json.loads((lab_copy / "card.json").read_text())["provenance"] == "lab"
    (weights,) = lab_copy.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    weights.write_bytes(content)
    changed = Checkpoint(str(lab_copy))
    assert changed.provenance == "local" and changed.identity() != Checkpoint("lab:vit").identity()


def test_a_byte_in_the_middle_of_a_large_file_counts(tmp_path):
    with (tmp_path / "model.pth").open("wb") as file:
        file.truncate(40 << 20)
    before = Checkpoint(str(tmp_path)).digest()
    with (tmp_path / "model.pth").open("r+b") as file:
        file.seek(20 << 20)
        file.write(b"\1")
    assert Checkpoint(str(tmp_path)).digest() != before


def test_a_folder_may_say_of_itself_that_it_is_random(lab_copy):
    (lab_copy / "config.json").write_text("{}")
    (lab_copy / "card.json").write_text('{"provenance": "random"}')
    assert Checkpoint(str(lab_copy)).provenance == "random"
    (lab_copy / "card.json").write_text('{"provenance": "weights"}')
    assert Checkpoint(str(lab_copy)).provenance == "local"


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--laion--CLIP-ViT-B-16" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_snapshot_in_the_hubs_cache_is_the_repository_at_that_commit(snapshot):
    hub, folder = Checkpoint("laion/CLIP-ViT-B-16", COMMIT), Checkpoint(str(snapshot), COMMIT)
    assert folder.origin() == hub.origin() == {
        "provenance": "weights", "repository": "laion/CLIP-ViT-B-16", "revision": COMMIT, "digest": None,
    }  # fmt: skip
    assert folder.identity() == hub.identity() == Checkpoint(str(snapshot)).identity()


def test_a_snapshot_of_another_commit_or_outside_the_cache_is_a_local_folder(snapshot, tmp_path):
    assert Checkpoint(str(snapshot), "f" * 40).provenance == "local"
    moved = shutil.copytree(snapshot, tmp_path / "models--laion--CLIP-ViT-B-16" / "snapshots" / COMMIT)
    assert Checkpoint(str(moved), COMMIT).provenance == "local"


@pytest.mark.parametrize("revision", [None, ""])
def test_a_hub_repository_without_a_commit_is_refused(revision):
    with pytest.raises(ConfigError, match="pin the commit"):
        Checkpoint("owner/name", revision).source()


def test_a_branch_is_resolved_to_the_commit_that_the_cache_last_saw(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="could not be resolved to a commit"):
        Checkpoint("owner/branched", "main").source()
    (tmp_path / "models--owner--branched" / "refs").mkdir(parents=True)
    (tmp_path / "models--owner--branched" / "refs" / "main").write_text(COMMIT)
    one = Checkpoint("owner/branched", "main")
    assert one.source()["revision"] == COMMIT and one.identity() == {"path": "owner/branched", "revision": COMMIT}
    assert one.origin()["revision"] == COMMIT and COMMIT in caplog.text


# ---------------------------------------------------------------- the manifest


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = write_clip(tmp_path_factory.mktemp("clip"))
    (folder / "card.json").unlink()
    return folder


def manifest_of(tmp_path, *overrides):
    whole = plainly("dataset=scenes", "protocol=scenes_single", *overrides)
    whole["runtime"]["runs"] = str(tmp_path / "runs")
    return json.loads((assemble(whole).store.folder / "manifest.json").read_text())


def test_a_local_folder_is_not_told_to_be_of_the_sheets_commit_and_licence(tmp_path, clip_folder):
    sheet = yaml.safe_load((CONF / "backbone" / "clip_vit_b_16_laion2b.yaml").read_text())
    found = manifest_of(
        tmp_path, "extractor=maskclip", "backbone@extractor.backbone=clip_vit_b_16_laion2b",
        f"extractor.backbone.path={clip_folder}",
    )  # fmt: skip
    text = json.dumps(found)
    assert sheet["revision"] == COMMIT not in text and f'"{sheet["licence"]}"' not in text
    digest = Checkpoint(str(clip_folder)).digest()
    assert found["provenance"] == "local"
    assert found["weights"] == {
        "backbone": {"provenance": "local", "repository": None, "revision": None, "digest": digest}
    }  # fmt: skip
    assert found["identity"]["method"]["backbone"]["files"] == digest and str(clip_folder) not in json.dumps(found["identity"])


def test_a_hub_repository_keeps_its_commit_and_licence(tmp_path):
    found = manifest_of(tmp_path, "extractor=maskclip", "backbone@extractor.backbone=clip_vit_b_16_laion2b")
    assert found["provenance"] == found["weights"]["backbone"]["provenance"] == "weights"
    assert found["weights"]["backbone"]["revision"] == found["config"]["extractor"]["backbone"]["revision"] == COMMIT
    assert found["config"]["extractor"]["backbone"]["licence"] == "MIT"


def test_of_two_models_the_row_says_the_one_of_which_less_is_known(tmp_path, lab_copy):
    (lab_copy / "config.json").write_text("{}")
    found = manifest_of(tmp_path, "extractor=proxyclip", f"extractor.proxy.path={lab_copy}")
    assert {name: one["provenance"] for name, one in found["weights"].items()} == {"backbone": "lab", "proxy": "local"}
    assert found["provenance"] == "local"


def test_a_control_has_no_weights(tmp_path):
    found = manifest_of(tmp_path, "extractor=oracle")
    assert found["weights"] == {} and found["provenance"] == "control"
