"""The names that a method was given stand with every number: in rows, on the screen, in CSV and LaTeX, beside quoted numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from composing import plainly
from rich.console import Console

from conceptseg.evaluation.assemble import assemble
from conceptseg.evaluation.carry_out import carry_out
from conceptseg.evaluation.readings import readings
from conceptseg.report.exports import to_csv, to_latex
from conceptseg.report.quoted import load_claim, shipped
from conceptseg.report.results import Results
from conceptseg.report.results_md import render
from conceptseg.report.terminal import print_table
from conceptseg.tables.paper import compute_paper_table
from conceptseg.tables.sheet import read_sheet
from conceptseg.tables.table import single_table

MADE = json.loads((Path(__file__).parent / "test_report_table.json").read_text())


def screen(results, width=160, detail="brief"):
    out = io.StringIO()
    print_table(results, Console(file=out, width=width), detail=detail)
    return out.getvalue()


def with_names(*names):
    data = json.loads(json.dumps(MADE))
    for row, name in zip(data["blocks"][0]["rows"], names, strict=False):
        row["names"] = name
    return Results.from_json(data)


@pytest.mark.parametrize("width", [60, 120, 160])
def test_the_screen_says_which_names_were_given(width):
    one = with_names("truth", "all", "none")
    assert "Names given to methods: all, truth." in screen(one, width)
    full = " ".join(screen(one, width, "full").split())
    assert "names given" in full and "all" in full and "none" in full
    assert "names given" not in screen(Results.from_json(MADE), width, "full")


def test_exports_and_the_results_page_say_which_names_were_given():
    one = with_names("truth", "truth + distractors up to 5", "none")
    head, *lines = to_csv(one).splitlines()
    place = head.split(",").index("names")
    assert {line.split(",")[place] for line in lines} >= {"truth", "truth + distractors up to 5", "none"}
    assert "Names given to methods: truth, truth + distractors up to 5." in to_latex(one)
    assert "| names given |" in render(one) and "| truth + distractors up to 5 |" in render(one)


def test_rows_that_do_not_say_it_are_not_counted_among_the_rest():
    one = with_names("truth", "", "")
    assert "names given: else truth where a row says it" in " ".join(screen(one, 60, "full").split())


@pytest.mark.parametrize(("method", "given"), [("oracle", "truth + distractors up to 4"), ("colour_contrast", "none")])
def test_an_evaluations_rows_say_which_names_its_protocol_gave(tmp_path, method, given):
    overrides = ["dataset=scenes", "dataset.count=2", "dataset.objects=[1,1]", "protocol=scenes_single"]
    overrides += ["protocol.names=distractors", "protocol.names_total=4"]
    evaluation = assemble(plainly(*overrides, f"extractor={method}", f"runtime.runs={tmp_path}"))
    carry_out(evaluation, "made")
    table = single_table(evaluation, readings(evaluation, ["accuracy"]), "conceptseg")
    assert {row.names for row in table.blocks[0].rows} == {given}


def test_a_papers_table_says_for_each_quoted_row_which_protocol_computes_it_and_which_names_it_was_given(tmp_path):
    """Of real weights, none of which is here: nothing is computed."""
    only = ["SCLIP", "Seg4Diff", "T2S", "DiffSegmenter"]
    sheet = read_sheet({**plainly("table=later/voc_open_vocabulary")["table"], "only": only})
    table = compute_paper_table("later-voc_open_vocabulary", sheet, lambda o: plainly(*o), [], tmp_path, "conceptseg")
    rows = {(block.name, row.name): row for block in table.blocks for row in block.rows}
    for row in load_claim(shipped(sheet.claim)).rows:
        for column in row.values if row.row in only else ():  # each number in the block of its column
            assert rows[column.upper(), row.row].values.keys() == {f"quoted/{column}"}
    assert all(row.protocol and row.names for row in rows.values())
    windows = ", windows of 224, stride 112"
    assert rows["VOC21", "SCLIP"].protocol == f"voc21_slide v1{windows}" and rows["VOC21", "SCLIP"].names == "all"
    assert rows["VOC20", "Seg4Diff"].protocol == "seg4diff v1" and rows["VOC20", "Seg4Diff"].names == "truth"
    assert (rows["VOC21", "T2S"].protocol, rows["VOC21", "T2S"].names) == ("none", "not known")
    assert rows["VOC21", "DiffSegmenter"].names == "predicted" and rows["VOC21", "SCLIP"].command
