"""A finished table is printed as it stands written only while everything that it was made from is as it was."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from conceptseg.report.results import load, save
from conceptseg.tables import stamp
from conceptseg.tables.stamp import FinishedTable

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "lab" / "results.json"
DRAWN = {
    "dataset": {"_target_": "conceptseg.data.drawn.DrawnScenes"},
    "protocol": {"_target_": "conceptseg.protocols.Protocol", "words": ["a", ["b"]]},
    "extractor": {
        "backbone": {"_target_": "conceptseg.backbones.transformers.flux.FluxBackbone", "path": "lab:flux"},
        "tokens": None,
    },
}


@pytest.fixture
def marked(tmp_path, monkeypatch):
    """A mark, the lab's table that it marks (in a folder of its own, with its run folders), and what stands for the package."""
    table = load(PUBLISHED)
    save(tmp_path / "t" / "results.json", table)
    for row in (row for block in table.blocks for row in block.rows):
        (tmp_path / "runs" / row.run_id).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / row.run_id / "rows-0.jsonl").write_text("{}")
    code = tmp_path / "weights.safetensors"
    code.write_bytes(b"1")
    monkeypatch.setattr(stamp, "_package_files", lambda: iter([code]))
    written = [tmp_path / "t" / "sheet.png"]
    written[0].write_bytes(b"2")
    mark = FinishedTable(tmp_path / "m.json", tmp_path / "t" / "results.json", written, tmp_path / "runs", ["a"])
    mark.keep(table, [DRAWN])
    return mark, table, code


def test_an_unchanged_table_is_read_as_it_was_written(marked):
    mark, table, _ = marked
    assert mark.read() == table


def later(path):
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))


CHANGES = {
    "weights or code": lambda mark, code: code.write_bytes(b"12"),
    "code of the same size": lambda mark, code: later(code),
    "rows": lambda mark, code: next(mark.runs.rglob("rows-0.jsonl")).write_text("{}\n{}"),
    "a run folder": lambda mark, code: next(mark.runs.rglob("rows-0.jsonl")).unlink(),
    "another shard's rows": lambda mark, code: (next(mark.runs.iterdir()) / "rows-1.jsonl").write_text("{}"),
    "the table": lambda mark, code: mark.results.write_text(mark.results.read_text().replace("0.45", "0.46")),
    "its picture": lambda mark, code: mark.written[0].unlink(),
    "what is asked": lambda mark, code: setattr(mark, "asked", ["b"]),
    "what can't be known": lambda mark, code: setattr(mark, "asked", None),
    "the mark": lambda mark, code: mark.path.write_text("{"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_has_it_put_together_again(what, marked):
    mark, _, code = marked
    CHANGES[what](mark, code)
    assert mark.read() is None


def test_another_library_has_it_put_together_again(marked, monkeypatch):
    monkeypatch.setattr(stamp, "versions", lambda: {"torch": "0"})
    assert marked[0].read() is None


def test_run_folders_that_are_gone_have_it_put_together_again(marked):
    mark, table, _ = marked
    (folder := mark.runs / table.blocks[0].rows[0].run_id).rename(folder.with_name("elsewhere"))
    assert mark.read() is None


@pytest.fixture
def photographs(tmp_path):
    """Data of a folder behind a link, words of a file, weights of another folder; what is named besides is no file."""
    (tmp_path / "disk" / "masks").mkdir(parents=True)
    (tmp_path / "disk" / "masks" / "1.png").write_bytes(b"1")
    (tmp_path / "voc").symlink_to(tmp_path / "disk")
    (tmp_path / "words.csv").write_text("cat")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"1")
    backbone = {
        "_target_": "conceptseg.backbones.encoders.vit.ViTBackbone",
        "path": str(tmp_path / "weights"),
        "licence": "MIT" * 2000,
    }
    dataset = {"_target_": "conceptseg.data.pascal_voc.PascalVOC", "root": str(tmp_path / "voc"), "split": "val"}
    return {
        "dataset": dataset,
        "protocol": {"lists": [{"file": str(tmp_path / "words.csv")}]},
        "extractor": {"backbone": backbone},
    }


@pytest.mark.parametrize("changed", ["disk/masks/1.png", "words.csv", "weights/model.safetensors", "disk/masks/2.png"])
def test_data_and_weights_that_settings_name_are_looked_at(changed, marked, photographs, tmp_path):
    mark, table, _ = marked
    mark.keep(table, [DRAWN, photographs])
    assert mark.read() == table
    (tmp_path / changed).write_bytes(b"12")
    assert mark.read() is None


def test_more_files_than_are_worth_a_look_leave_a_table_unmarked(marked, photographs, monkeypatch):
    mark, table, _ = marked
    monkeypatch.setattr(stamp, "MOST_FILES", 0)
    mark.keep(table, [photographs])
    assert not mark.path.exists() and mark.read() is None


def test_a_table_of_a_class_that_is_not_ours_is_not_marked(marked):
    mark, table, _ = marked
    mark.keep(table, [DRAWN, {**DRAWN, "dataset": {"_target_": "mine.Photographs"}}])
    assert not mark.path.exists() and mark.read() is None


def test_a_table_with_failed_samples_or_rows_that_were_not_run_is_not_marked(marked):
    mark, table, _ = marked
    for change in ({"failed": 1}, {"status": "not run", "run_id": "", "n": 0, "values": {}}):
        block = table.blocks[0]
        rows = (dataclasses.replace(block.rows[0], **change), *block.rows[1:])
        mark.keep(dataclasses.replace(table, blocks=(dataclasses.replace(block, rows=rows), *table.blocks[1:])), [DRAWN])
        assert not mark.path.exists()
