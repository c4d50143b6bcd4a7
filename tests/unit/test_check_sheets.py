"""scripts/check_sheets.py against a small hub on this machine."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import check_sheets

COMMIT, WEIGHTS = "a" * 40, b"weights"
SHA = hashlib.sha256(WEIGHTS).hexdigest()
HELD = {
    "id": "owner/model", "sha": COMMIT, "gated": False, "private": False, "tags": [], "downloads": 0, "likes": 0,
    "cardData": {"license": "apache-2.0"},
    "siblings": [
        {"rfilename": "unet/config.json", "size": 100},
        {"rfilename": "unet/model.safetensors", "size": 2_000_000_000, "lfs": {"sha256": SHA, "size": 7, "pointerSize": 1}},
        {"rfilename": "unet/model.fp16.safetensors", "size": 1_000_000_000},
        {"rfilename": "README.md", "size": 9_000_000_000},
    ],
}  # fmt: skip
SHEET = {
    "path": "owner/model", "revision": COMMIT, "licence": "Apache-2.0",
    "hub": {"gated": False, "download": 2.0, "files": ["unet"], "size_from": "x", "pinned": "x"},
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    answers: dict = {}  # noqa: RUF012

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        status, headers, body = self.answers.get(self.path.partition("?")[0], (404, {"X-Error-Code": "RepoNotFound"}, {}))
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"

    def run(held, *arguments, **sheet):
        Hub.answers = {f"/api/models/owner/model/revision/{COMMIT}": (200, {}, held) if isinstance(held, dict) else held}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({**SHEET, **sheet}))
        (tmp_path / "local.yaml").write_text("path: ./weights\n")
        monkeypatch.setattr(sys, "argv", ["check", "--endpoint", endpoint, "--sheets", str(tmp_path), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            check_sheets.main()
        return end.value.code, capsys.readouterr().out

    yield run
    server.shutdown()


def test_a_sheet_that_is_right_is_said_to_be(check):
    assert check(HELD) == (0, "one: as the sheet says\n")


def test_what_changed_is_printed(check):
    held = {**HELD, "gated": "auto", "id": "other/model", "cardData": {"license": "mit"}}
    code, said = check(held, hub={**SHEET["hub"], "download": 3.0, "files": ["unet", "vae"]})
    assert code == 1 and said.splitlines() == [
        "one: repository: owner/model is now other/model",
        "one: gated: auto; the sheet says False",
        "one: licence: mit; the sheet says Apache-2.0",
        f"one: files: no vae at {COMMIT}",
        "one: download: 2 GB; the sheet says 3.0",
    ]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ((404, {"X-Error-Code": "RevisionNotFound"}, {}), f"commit: owner/model has no {COMMIT}"),
        ((404, {"X-Error-Code": "RepoNotFound"}, {}), "repository: owner/model is not there, or private"),
        ((403, {}, {}), "could not be asked: "),
    ],
)
def test_a_repository_that_cannot_be_had_is_named(check, answer, wanted):
    code, said = check(answer)
    assert code == 1 and said.startswith(f"one: {wanted}")


def test_files_of_a_withdrawn_repository_are_compared_with_its_mirror(check, tmp_path):
    (tmp_path / "old" / "unet").mkdir(parents=True)
    (tmp_path / "old" / "unet" / "model.safetensors").write_bytes(WEIGHTS)
    assert check(HELD, "one", "--against", tmp_path / "old") == (
        0, "one: as the sheet says\none: unet/model.safetensors: equal\n",
    )  # fmt: skip
    (tmp_path / "old" / "unet" / "model.safetensors").write_bytes(b"others")
    code, said = check(HELD, "one", "--against", tmp_path / "old")
    assert code == 1 and "unet/model.safetensors: different" in said
