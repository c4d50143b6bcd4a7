"""Tables, what they write and where, the report command, and that nothing needs a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import FAST, TESTS

REPO = TESTS.parent
LAB = ("table=lab", "dataset.count=4")
HEAVY = {"diffusers", "transformers", "timm", "open_clip", "torchvision", "torchmetrics", "datasets", "matplotlib"}


def in_table(path: Path) -> list[str]:
    """Names of the rows that were scored."""
    return [row["name"] for block in json.loads(path.read_text())["blocks"] for row in block["rows"] if row["status"] == "ok"]


@pytest.fixture(scope="module")
def table(shared):
    """The lab table on four scenes, in an empty folder."""
    return shared.run(*LAB)


def test_a_small_lab_table_is_written_under_runs(shared, table):
    (results,) = (shared.folder / "runs" / "tables").glob("lab-*/results.json")
    sheet = yaml.safe_load((REPO / "conf" / "table" / "lab.yaml").read_text())
    assert in_table(results) == [row["name"] for block in sheet["blocks"] for row in block["rows"]]
    assert results.with_name("sheet.png").exists()


def test_a_small_lab_table_does_not_touch_what_is_published(shared, table):
    assert sorted(p.name for p in shared.folder.iterdir()) == ["runs"]


def test_a_table_says_where_its_results_and_pictures_are_and_how_to_publish_it(shared, table):
    assert "oracle" in table.out and "ConceptAttention" in table.out
    (folder,) = (shared.folder / "runs" / "tables").glob("lab-*")
    (page,) = (line.partition("Page: ")[2] for line in table.out.splitlines() if "Page: " in line)
    assert shared.folder / page == folder / "lab.html" and (shared.folder / page).exists()
    (beside,) = (line.partition(": ")[2] for line in table.out.splitlines() if line.startswith("Beside it: "))
    assert beside.split(", ") == ["results.json", "lab.csv", "lab.tex", "sheet.png"]
    assert all((folder / name).exists() for name in beside.split(", "))
    assert "Next: conceptseg table=lab dataset.count=4 report.detail=full" in table.out and "report.publish=yes" in table.out


def test_a_table_again_computes_nothing(shared, table):
    rows = {p: p.read_bytes() for p in shared.folder.rglob("rows-*.jsonl")}
    said = shared.run(*LAB)
    assert "was made from has changed: it is printed as it stands" in said.said and "samples computed" not in said.said
    assert said.out == re.sub("Took [^.]+(\\.[0-9] s)?\\. ", "", table.out)
    (mark,) = (shared.folder / "runs" / "tables" / "finished").glob("*.json")
    mark.unlink()
    said = shared.run(*LAB)
    assert " 0 samples computed" in said.said and "4 samples computed" not in said.said and mark.exists()
    assert rows == {p: p.read_bytes() for p in shared.folder.rglob("rows-*.jsonl")}


@pytest.mark.parametrize("marked", [True, False], ids=["unchanged", "perhaps changed"])
def test_a_finished_table_composes_nothing_and_builds_and_loads_no_model(shared, table, marked):
    """In a fresh process, where whatever costs more than looking up what is held is refused."""
    if not marked:
        for mark in (shared.folder / "runs" / "tables" / "finished").glob("*.json"):
            mark.unlink()
    written = {p: p.stat().st_mtime_ns for p in shared.folder.rglob("*") if p.name in ("sheet.png", "manifest.json")}
    code = f"""
import sys
import hydra
def refuse(*args, **settings): raise AssertionError("a finished table asked for this")
hydra.compose = refuse
if not {marked}:
    import torch
    torch.nn.Module.__init__ = refuse
from conceptseg.cli.evaluate import evaluate
sys.argv = ["conceptseg", *{[*FAST, *LAB]}]
try:
    evaluate()
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    said = shared.run_cold("-c", code)
    assert "oracle" in said.out
    loaded = set(said.out.rpartition("LOADED ")[2].split())
    assert ("torch" in loaded) != marked and not loaded & HEAVY
    assert written == {p: p.stat().st_mtime_ns for p in written}


def test_a_table_with_nothing_overridden_is_not_published_unless_asked(commands):
    """Of this table nothing can be run here, so it is as fast as a table can be."""
    said = commands.run("table=conceptattention/ablation_attention")
    assert sorted(p.name for p in commands.folder.iterdir()) == ["runs"] and "report.publish=yes" in said.out
    assert (commands.folder / "runs" / "tables" / "conceptattention-ablation_attention" / "results.json").exists()
    said = commands.run(*LAB, "report.publish=auto", code=1)
    assert "report.publish" in said.err


def test_a_table_that_is_published_passes_the_check_and_a_changed_one_does_not(shared, table):
    said = shared.run(*LAB, "report.publish=yes")
    assert "samples computed" not in said.said  # the finished table is published as it stands
    assert shared.run("--check", name="conceptseg-report").code == 0
    before = {p: p.read_bytes() for p in (shared.folder / "benchmarks").rglob("*") if p.is_file()}
    assert {p.name for p in before} >= {"results.json", "sheet.png"}
    said = shared.run(*LAB, "report.publish=yes")
    assert " 0 of " in said.out and "kept: " in said.out and before == {p: p.read_bytes() for p in before}
    written = shared.folder / "RESULTS.md"
    text = written.read_text()
    written.write_text(text.replace("| *oracle* |", "| *oracel* |"))
    said = shared.run("--check", name="conceptseg-report", code=1)
    assert "lab" in said.err and "stale" in said.said
    shared.run("--write", name="conceptseg-report")
    assert written.read_text() == text
    for path in (written, shared.folder / "benchmarks"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_an_unknown_column_of_a_table_is_refused_with_the_nearest(commands):
    said = commands.run(*LAB, "table.columns=[acuracy]", code=1)
    assert 'Did you mean "accuracy"' in said.err and not (commands.folder / "RESULTS.md").exists()


# ------------------------------------------------------------ the repository's own results


@pytest.fixture
def published(commands):
    """A copy of RESULTS.md and benchmarks/ to check and spoil."""
    for name in ("RESULTS.md", "benchmarks"):
        source = REPO / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, commands.folder / name)
    return commands


def test_the_results_of_this_repository_are_what_its_tables_say(published):
    said = published.run("--check", name="conceptseg-report")
    assert "up to date" in said.out


def test_results_with_a_changed_number_are_stale(published):
    path = published.folder / "RESULTS.md"
    path.write_text(path.read_text().replace("100.0 [100.0, 100.0]", "99.9 [99.9, 99.9]", 1))
    said = published.run("--check", name="conceptseg-report", code=1)
    assert "stale" in said.said


def test_text_around_the_sections_may_change(published):
    path = published.folder / "RESULTS.md"
    path.write_text("Words before.\n\n" + path.read_text() + "\nWords after.\n")
    published.run("--check", name="conceptseg-report")


def test_the_report_prints_every_table_that_benchmarks_holds(published):
    said = published.run(name="conceptseg-report")
    assert f"{len(list((REPO / 'benchmarks').glob('*/results.json')))} tables" in said.out and "oracle" in said.out


# ------------------------------------------------------------ processes


def test_the_commands_are_installed():
    folder = Path(sys.executable).parent
    names = ("conceptseg", "conceptseg-compare", "conceptseg-report", "conceptseg-lab", "conceptseg-doctor")
    assert [n for n in names if not (folder / n).exists()] == []


def test_a_backbone_that_would_be_downloaded_is_refused_without_frames(commands):
    said = commands.run("backbone@extractor.backbone=flux_schnell", "dataset.count=2", code=1)
    assert "FLUX.1-schnell" in said.err and "Traceback" not in said.err


def test_a_reader_that_closes_the_pipe_is_no_error(commands):
    command = f"{sys.executable} -m conceptseg --help | head -n 1"
    said = subprocess.run(command, shell=True, capture_output=True, text=True, env=dict(commands.environment), timeout=100)
    assert "Traceback" not in said.stderr and said.stdout
