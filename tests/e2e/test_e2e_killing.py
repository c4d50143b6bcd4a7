"""Killed at any of its file operations and started again, a run, a table, a report or a training ends like one that was not.

The suite tries a part of the operations; `CONCEPTSEG_KILL_ALL=1 pytest tests/e2e/test_e2e_killing.py` tries each, whole and torn;
`CONCEPTSEG_KILL_ALL=2/5` the second fifth of them.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from commands import rows_of
from hydra import compose, initialize_config_module

from conceptseg.config import plain, register
from conceptseg.lab.recipes import load_recipe

ALL = os.environ.get("CONCEPTSEG_KILL_ALL", "")
RUN = ("extractor=centre_prior", "dataset.count=3", "runtime.batch_size=1", "runtime.progress=false", "report.resamples=10")
VIT = (
    "steps=5", "horizon=5", "batch=2", "scenes=4", "hard_scenes=2", "plain_scenes=2", "checkpoint_every=3", "warmup=1",
    "phases=[]", "sizes.width=16", "sizes.heads=2", "sizes.layers=1",
)  # fmt: skip


class Killing:
    """One job: `child` runs it in a folder of its own and returns the operations that it noted."""

    def __init__(self, job, settings, warm, place, start=None):
        self.job, self.warm, self.place, self.start, self.count = job, warm, place, start, 0
        self.settings = place / "settings.json"
        self.settings.write_text(json.dumps(settings))

    def folder(self, name):
        if self.start is None:
            (self.place / name).mkdir()
        else:
            shutil.copytree(self.start, self.place / name, symlinks=True)
        return self.place / name

    def child(self, folder, code=0, fatal=-1, torn=False, shards=1):
        self.count += 1
        out, err, noted = (str(self.place / f"{self.count}.{end}") for end in ("out", "err", "noted"))
        call = f"be_killed({self.job!r}, {str(self.settings)!r}, {shards}, {noted!r}, {fatal}, {torn})"
        before = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from killing import be_killed; {call}"
        pid = self.warm.ask(name="conceptseg", args=[], cwd=str(folder), env={}, out=out, err=err, before=before)
        assert self.warm.ask(wait=pid) == code, Path(err).read_text()
        return Path(noted).read_text().splitlines()

    def everywhere(self, state, every):
        """Kill at each operation, whole and torn; of these kills the `every`-th, an odd number or none is torn. Start again, and
        compare. Returns how many operations there are."""
        whole = self.folder("whole")
        operations, wanted = self.child(whole), state(whole)
        kills = [(n, torn) for n in range(len(operations)) for torn in (False, True)]
        part, _, parts = ALL.partition("/")
        tried = kills[int(part) - 1 :: int(parts or 1)] if ALL else kills[::every]
        for number, (fatal, torn) in enumerate(tried):
            folder = self.folder(f"{fatal}-{torn}")
            self.child(folder, -9, fatal, torn)
            self.child(folder, shards=1 + number % 3)
            assert state(folder) == wanted, f"{self.job} killed at {fatal} ({operations[fatal]}, torn: {torn}) ends otherwise"
            assert not list(folder.rglob("*.part")), f"{self.job} killed at {fatal} ({operations[fatal]}) leaves a part"
            shutil.rmtree(folder)
        print(f"{self.job}: {len(tried)} kills, {len(operations)} operations")
        return len(operations)


def evaluated(folder):
    """Read the files that a run leaves, without times and marks of shards."""
    (run,) = (folder / "runs").glob("*/manifest.json")
    run = run.parent
    pictures = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*.png")}
    for path in (run / "maps").iterdir():  # of a shard that a kill ended and nobody took up, the last picture is half written
        with suppress(tarfile.ReadError), tarfile.open(path, "r:") as archive:
            for entry in archive:
                pictures[entry.name] = archive.extractfile(entry).read()
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(run)]
    return rows, pictures, json.loads((run / "readings.json").read_text()), json.loads((run / "table.json").read_text())


def trained(folder):
    """Read the files that a training leaves, without times."""
    work = folder / "lab" / "vit"
    losses = [json.loads(line) for line in (work / "losses.jsonl").read_text().splitlines()]
    card = json.loads((work / "model" / "card.json").read_text())
    readme = [line for line in (work / "model" / "README.md").read_text().splitlines() if "training time" not in line]
    files = {p.name: p.read_bytes() for p in (work / "model").rglob("*") if p.suffix in (".safetensors", ".txt")}
    files |= {p.name: p.read_bytes() for p in work.parent.glob("scenes-*")}
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    return [{**line, "seconds": 0} for line in losses], {**card, "minutes": 0}, readme, files, names


def tabulated(folder):
    """Every file that a table leaves; the mark holds times of files."""
    return {
        p.relative_to(folder).as_posix(): b"" if p == folder / "tables" / "t.json" else p.read_bytes()
        for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


@pytest.fixture
def config():
    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        return plain(compose("evaluate", overrides=[*RUN]))


def test_a_run_and_its_export(config, warm, tmp_path):
    operations = Killing("evaluate", config, warm, tmp_path).everywhere(evaluated, every=11)
    assert operations > 30


def test_a_table_and_its_report(config, warm, tmp_path):
    (tmp_path / "start").mkdir()
    first = Killing("evaluate", config, warm, tmp_path)
    first.child(tmp_path / "start")
    (table,) = (tmp_path / "start").glob("runs/*/table.json")
    (tmp_path / "table").mkdir()
    settings = {"from": str(table.relative_to(tmp_path / "start"))}
    operations = Killing("tabulate", settings, warm, tmp_path / "table", tmp_path / "start").everywhere(tabulated, every=11)
    assert operations > 15


def test_a_training(warm, tmp_path):
    operations = Killing("train", load_recipe("vit", VIT), warm, tmp_path).everywhere(trained, every=11)
    assert operations > 15


# ------------------------------------------------------------ resources

# Without bytecode: Python leaves half a file of it where the disk is full.
LIMIT = "import sys, resource; sys.dont_write_bytecode = True; resource.setrlimit(resource.{what}, ({value}, {value}))"
ARGS = ("extractor=centre_prior", "dataset.count=12", "runtime.batch_size=2", "runtime.keep_maps=false")


@pytest.fixture(scope="module")
def right(shared):
    """Rows of a run that nothing hindered."""
    shared.run(*ARGS)
    return rows_of(shared.the_run())


def test_a_full_disk_stops_a_run_in_a_line_and_it_goes_on_when_there_is_space(commands, right):
    commands.run(*ARGS, "dataset.count=2")
    said = commands.run(*ARGS, code=1, before=LIMIT.format(what="RLIMIT_FSIZE", value=4000))
    assert "StoreError" in said.err and "is kept" in said.err and "Traceback" not in said.err
    assert 2 < len(commands.rows()) < 12
    commands.run(*ARGS)
    assert commands.rows() == right


def test_a_folder_that_can_not_be_written_is_refused_in_a_line(commands):
    said = commands.run(*ARGS, "runtime.runs=/proc/runs", code=1)
    assert "StoreError: writing /proc/runs" in said.err and "runtime.runs" in said.err and "Traceback" not in said.err
