"""conceptseg-runs on run folders written by hand: what is listed, found, removed and exported, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from conceptseg import keys
from conceptseg.cli import runs as command
from conceptseg.errors import ConfigError, StoreError
from conceptseg.store.folders import export, find, remove, run_folders
from conceptseg.store.run import RunStore

RUNS = Path("runs")
OVERRIDES = [
    "hydra.searchpath=[file:///my sheets]",
    "extractor=daam",
    "dataset.objects=[1,1]",
    'protocol.background=["no","sky"]',
]
ROW = {
    "sample": "s/1", "view": "map", "segmenter": "mean@mask/bilinear", "status": "ok", "words": ["cat"], "classes": [0, 1],
    "inter": [60, 20], "label": [70, 30], "pred": [70, 30], "pred_void": [0, 0], "valid": 100, "void": 0, "correct": 80,
    "ap": {"foreground": 0.5}, "seconds": 0.5,
}  # fmt: skip


def write(folder, method, data="scenes", provenance="lab", day=0, **more):
    identity = {
        "method": {"class": method, "version": 1, "settings": {}}, "dataset": {"name": data, "fingerprint": "f"},
        "protocol": {"name": "single", "version": 1},
    }  # fmt: skip
    name = keys.run_id(identity)
    store = RunStore(folder / name)
    store.open(
        {
            "schema": 1, "run_id": name, "identity": identity, "config": {}, "provenance": provenance, "source": {},
            "versions": {"torch": "2"}, "machine": {}, "git": {}, **more,
        }
    )  # fmt: skip
    with store:
        store.append([ROW])
    (store.folder / "maps").mkdir()
    (store.folder / "maps" / "a.png").write_bytes(bytes(1000))
    os.utime(store.shard_file, (1_700_000_000 + 86_400 * day,) * 2)
    return name


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return [
        write(tmp_path / "runs", "DAAM", command=["conceptseg", *OVERRIDES]),
        write(tmp_path / "runs", "Constant", "photos", "control", day=9),
    ]


def said(capsys, *args, code=0):
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", ["conceptseg-runs", *args])
        command.main()
    found = capsys.readouterr()
    assert ended.value.code == code, found
    return found.out + found.err


def test_runs_are_listed_by_what_they_are_when_and_how_large(runs, capsys):
    daam, constant = runs
    for filters, wanted in (
        ((), [constant, daam]), (("--method", "daam"), [daam]), (("--data", "photo"), [constant]),
        (("--provenance", "control"), [constant]), (("--since", "2023-11-20"), [constant]), (("--before", "2023-11-20"), [daam]),
        (("--larger", "1kB"), [constant, daam]), (("--larger", "1MB"), []),
    ):  # fmt: skip
        assert [one["run"] for one in json.loads(said(capsys, "list", "--json", *filters))] == wanted, filters
    table = said(capsys, "list")
    assert daam in table and "2 of 2 runs in runs" in table and "control" in table
    damaged = RUNS / constant / "manifest.json"
    damaged.write_text("{")
    assert f"left out: reading {damaged}" in said(capsys, "list")


def test_the_beginning_of_an_id_is_enough_where_one_run_has_it(runs):
    assert find(RUNS, runs[0][:4]).run_id == runs[0]
    (RUNS / runs[1]).rename(RUNS / (runs[0][:3] + "zzz"))
    with pytest.raises(ConfigError, match="begins the ids of 2 runs"):
        find(RUNS, runs[0][:3])
    for prefix in ("", "nothing"):
        with pytest.raises(ConfigError, match="no run"):
            find(RUNS, prefix)


def test_a_run_shows_the_command_that_computes_it_as_it_is_typed(runs, capsys):
    shown = said(capsys, "show", runs[0][:5])
    line = next(line for line in shown.splitlines() if line.startswith("command: "))
    assert shlex.split(line.removeprefix("command: ")) == ["conceptseg", *OVERRIDES]
    assert "command: not kept" in said(capsys, "show", runs[1])


def test_removing_asks_and_spares_a_run_that_is_being_written(runs, capsys):
    assert "Add --yes" in said(capsys, "rm", runs[0][:5], code=1) and len(run_folders(RUNS)[0]) == 2
    with RunStore(RUNS / runs[0]):
        with pytest.raises(StoreError, match="written by another process"):
            remove(find(RUNS, runs[0]))
        assert (RUNS / runs[0] / "maps" / "a.png").exists()
    assert "1 run removed" in said(capsys, "rm", runs[0][:5], "--yes")
    assert [path.name for path in RUNS.iterdir()] == [runs[1]]


def test_an_export_holds_all_files_and_never_replaces_one(runs, tmp_path):
    found, _ = run_folders(RUNS)
    (found[0].folder / ".rows.jsonl.1@00000000.part").write_text("half")
    wanted = {f"{name}/{part}" for name in runs for part in ("manifest.json", "rows-0of1.jsonl", "maps/a.png")}
    export(found, tmp_path / "a.zip")
    assert set(zipfile.ZipFile(tmp_path / "a.zip").namelist()) == wanted
    export(found, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as archive:
        assert set(archive.getnames()) == wanted and {entry.uname for entry in archive} == {""}
    export(found, tmp_path / "a.csv")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert {(one["method"], one["inter"], one["ap.foreground"]) for one in lines} == {
        (m, "[60, 20]", "0.5") for m in ("DAAM", "Constant")
    }
    for name in ("a.zip", "a.xyz"):
        with pytest.raises(ConfigError, match="exists already" if name == "a.zip" else "ends in"):
            export(found, tmp_path / name)


def test_comparing_takes_beginnings_and_the_options_of_compare(runs, monkeypatch):
    from conceptseg.cli import compare

    monkeypatch.setattr(compare, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", ["conceptseg-runs", "compare", runs[0][:5], f"{runs[1][:5]}::map", "--metric", "accuracy"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert sys.argv == ["conceptseg-compare", runs[0], f"{runs[1]}::map", "--metric", "accuracy"]
