"""Tables, what they write and where, the report command, and that nothing needs a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TESTS

REPO = TESTS.parent


def test_a_table_with_nothing_overridden_is_not_published_unless_asked(commands):
    """No row of this table has settings to compose, so it is as fast as a table can be."""
    said = commands.run("table=daam/visuosyntactic")
    assert sorted(p.name for p in commands.folder.iterdir()) == ["runs"] and "report.publish=yes" in said.out
    assert (commands.folder / "runs" / "tables" / "daam-visuosyntactic" / "results.json").exists()
    said = commands.run("table=lab", "report.publish=auto", code=1)
    assert "report.publish" in said.err


def test_an_unknown_column_of_a_table_is_refused_with_the_nearest(commands):
    said = commands.run("table=lab", "table.columns=[acuracy]", code=1)
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
