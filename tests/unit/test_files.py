"""conceptseg/files.py: whole files, no leftovers, no lost changes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from conceptseg import files
from conceptseg.files import remove_abandoned_parts, write_atomically, written_aside
from conceptseg.store.cost import Cost, measured, read_cost

DEAD = 4_000_000
"""No process has this number: it is above Linux's greatest."""


@pytest.fixture(autouse=True)
def nothing_swept(monkeypatch):
    monkeypatch.setattr(files, "_swept", set())


@pytest.mark.parametrize("name", [f".t.json.{DEAD}.part", f".t.json.{DEAD}@{files._host()}.part"])
def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path, name):
    (tmp_path / name).write_text("{")
    (tmp_path / f".model.{DEAD}@{files._host()}.part").mkdir()
    write_atomically(tmp_path / "other.json", b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_what_others_are_writing_stays(tmp_path):
    mine = [f".t.{os.getpid()}@{files._host()}.part", f".t.{DEAD}@00000000.part", ".notes.part", "a.part"]
    for name in mine:
        (tmp_path / name).write_text("{")
    remove_abandoned_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(mine)
    os.utime(tmp_path / mine[1], (0, time.time() - files.ABANDONED_SECONDS - 9))
    remove_abandoned_parts(tmp_path)
    assert not (tmp_path / mine[1]).exists()


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(ValueError), written_aside(tmp_path / "a") as part:
        part.write_bytes(b"ne")
        raise ValueError
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_takes_the_place_of_one_that_holds_files(tmp_path):
    for name in ("one", "two"):
        with written_aside(tmp_path / "model") as part:
            part.mkdir()
            (part / name).write_text("")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["two"] and len(list(tmp_path.iterdir())) == 1


WRITER = """
import sys, dataclasses
from pathlib import Path
from conceptseg.report.results import load, save
from conceptseg.report.results_md import write
table = load(Path(sys.argv[1]))
table = dataclasses.replace(table, blocks=(dataclasses.replace(table.blocks[0], rows=table.blocks[0].rows[:9]),))
results_md = Path(sys.argv[2])
benchmarks = results_md.with_name("benchmarks")
sys.stdin.read(1)
for number in range(5):
    mine = dataclasses.replace(table, table=f"{sys.argv[3]}{number}")
    save(benchmarks / mine.table / "results.json", mine)
    write(results_md, benchmarks)
"""


def test_two_writers_of_results_md_lose_no_section(tmp_path):
    published = files.Path(__file__).parents[2] / "benchmarks" / "lab" / "results.json"
    target = tmp_path / "RESULTS.md"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(published), str(target), name], stdin=subprocess.PIPE)
        for name in "abc"
    ]
    for writer in writers:
        writer.stdin.write(b".")
        writer.stdin.close()
    assert [writer.wait(timeout=100) for writer in writers] == [0, 0, 0]
    assert target.read_text().count("conceptseg:begin") == 16  # the overview and 15 tables
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "benchmarks"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"images": -1}', '{"images": "3"}', '{"image": 3}', '{"stages": {"model": NaN}}']
)
def test_a_damaged_cost_file_is_left_out_with_a_word(tmp_path, caplog, text):
    (tmp_path / "cost-0of2.json").write_text(text)
    (tmp_path / "cost-1of2.json").write_text('{"images": 3, "seconds": 1.5}')
    assert read_cost(tmp_path) == Cost(3, 1.5) and "cost-0of2.json is damaged" in caplog.text
    with measured(tmp_path, 0, 2, None) as cost:
        cost.images = 4
    assert read_cost(tmp_path).images == 7


def test_costs_that_can_not_be_written_do_not_hide_why_a_run_ended(tmp_path, caplog):
    with pytest.raises(KeyError), measured(tmp_path / "file" / "run", 0, 1, None) as cost:
        (tmp_path / "file").write_text("in the way")
        cost.images = 1
        raise KeyError
    assert "not recorded" in caplog.text
