"""No output obeys what stands in other people's labels, and a place that can't be written is one line."""

from __future__ import annotations

import csv
import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from conceptseg.errors import ReportError, guarded
from conceptseg.logs import PrintableRecord
from conceptseg.report import html
from conceptseg.report.exports import to_csv, to_latex
from conceptseg.report.results import Results
from conceptseg.report.results_md import HEADER, check, page_to_change, render, write
from conceptseg.report.terminal import print_table

HOSTILE = ("\x1b[2J\x1b]0;title\x07", "\x9b31m", "cat\r", "\x08\x08dog", "\u202egod", "\x00", "\ud800", "\x7f")
FORMULAS = ("=1+1", "+1", "-1", "@A1", "\t=1+1", "\r=1+1", "\n=1+1", "\t@SUM(A1)")


def labelled(label: str) -> Results:
    """A table with the label in every text that a sheet or a data set may decide."""
    data = json.loads(Path(__file__).with_name("test_report_table.json").read_text())
    block = data["blocks"][0]
    data |= {"title": label, "notes": [label]}
    block |= {"name": label, "dataset": label, "protocol": label, "text": label}
    block["rows"][1] |= {"name": label, "note": label, "view": label, "backbone": label, "extractor": label}
    return Results.from_json(data)


def test_control_characters_reach_no_output():
    for label in HOSTILE:
        table = labelled(f"a{label}b")
        shown = Console(file=io.StringIO(), width=120, force_terminal=False)
        print_table(table, shown)
        outputs = (shown.file.getvalue(), render(table), to_latex(table), to_csv(table), html.render(table, [], []))
        for output in outputs:
            found = [c for c in output if c in "\x1b\x9b\r\x08\u202e\x00\x07\ud800\x7f"]
            assert not found, (label, found, output[:200])
        record = PrintableRecord("name", logging.INFO, "", 1, "the word %s", (label,), None)
        assert record.getMessage().isprintable()


def test_cells_that_a_spreadsheet_would_compute_are_words():
    for label in FORMULAS:
        (row,) = [r for r in csv.DictReader(io.StringIO(to_csv(labelled(label)))) if r["extractor"].endswith(label[-2:])]
        for cell in ("block", "protocol", "row", "extractor", "backbone", "view", "note"):
            assert row[cell].startswith(("'", "\\r")), (label, row[cell])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda page: page.write_bytes(HEADER.encode() + b"\n\xe9 latin"), "line 8: it is not UTF-8"),
        (lambda page: page.mkdir(), "Is a directory"),
        (lambda page: (page.write_text(HEADER), page.chmod(0o444)), "is read-only"),
    ],
)
def test_a_page_that_cant_be_brought_up_to_date_is_named_and_left_alone(tmp_path, make, reason):
    page = tmp_path / "RESULTS.md"
    make(page)
    before = page.stat().st_mtime_ns
    for change in (lambda: page_to_change(page, ""), lambda: write(page, tmp_path / "benchmarks")):
        with pytest.raises(ReportError, match=reason):
            change()
    assert page.stat().st_mtime_ns == before
    if "read-only" not in reason:
        assert reason in " ".join(check(page, tmp_path / "benchmarks"))


def test_what_the_system_refuses_is_one_line(capsys):
    def fails(error):
        raise error

    full = OSError(28, "No space left on device")
    for error, said in (
        (full, "No space left on device"),
        (PermissionError(13, "Permission denied", "/mnt/runs"), "/mnt/runs: Permission denied"),
        (OSError(24, "Too many open files", "a.png"), "a.png: Too many open files"),
        (RuntimeError("can't start new thread"), "OMP_NUM_THREADS=1"),
    ):
        with pytest.raises(SystemExit) as end:
            guarded(lambda error=error: fails(error))()
        told = capsys.readouterr().err
        assert end.value.code == 1 and said in told and told.count("\n") == 1
    with pytest.raises(RuntimeError, match="ours"):
        guarded(lambda: fails(RuntimeError("a fault of ours")))()


def test_full_outputs_and_lost_folders_end_a_command_with_one_line(tmp_path):
    command = "import os, sys\nfrom conceptseg.cli.report import report\nsys.argv[1:] = []\n{before}\nreport()"
    with open("/dev/full", "w") as full:
        for reason, before, stdout in (
            ("No space left", "", full),
            ("working directory no longer exists", "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')", None),
        ):
            run = [sys.executable, "-c", command.format(before=before)]
            ended = subprocess.run(
                run, stdout=stdout, stderr=-1, text=True, cwd=tmp_path if before else Path(__file__).parents[2]
            )
            assert ended.returncode == 1 and reason in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr
