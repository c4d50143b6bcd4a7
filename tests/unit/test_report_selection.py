"""Select parts of a table: the brief screen, and rows, columns, order and decimals on the terminal, in LaTeX and in CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from conceptseg.errors import ConfigError
from conceptseg.report.exports import to_csv, to_latex
from conceptseg.report.results import load
from conceptseg.report.selection import Selection
from conceptseg.report.terminal import print_table

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMAND_LINES = 3
"""Lines that `conceptseg` prints below the table: time and page, files, next step."""


@pytest.fixture(scope="module")
def lab():
    """The published table: 97 rows in three blocks."""
    return load(BENCHMARKS / "lab" / "results.json")


def screen(table, width=100, terminal=False, **selection):
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    print_table(table, console, Selection(**selection))
    return console.file.getvalue().splitlines()


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_lab_fits_one_screen_without_a_wrapped_cell(lab, width):
    lines = screen(lab, width)
    assert len(lines) + COMMAND_LINES <= 45 and max(map(len, lines)) <= width
    assert sum("mIoU %" in line for line in lines) == 3 and ("shown/trained" in lines[2]) == (width >= 100)
    assert next(line for line in lines if line.startswith("NACLIP ")).split()[1:3] == ["42.5", "[39.7,"]
    assert sum("\u2500\u2500" in line for line in lines) == 3  # controls stand below a rule


@pytest.mark.parametrize("name", [path.parent.name for path in BENCHMARKS.glob("*/results.json")])
def test_every_published_table_fits_80_and_60_columns(name):
    table = load(BENCHMARKS / name / "results.json")
    for width in (60, 80):
        assert max(map(len, screen(table, width))) <= width


def test_methods_stand_best_first_with_the_headline_rows_and_the_best_of_each_column(lab):
    shown = Selection().brief(lab)
    for block, whole in zip(shown.blocks, lab.blocks, strict=True):
        names = [row.name for row in block.rows]
        methods = [row for row in block.rows if row.group == "methods"]
        assert len(methods) == 7 and {row.name for row in whole.rows if row.headline} <= {*names}
        miou = [row.values["miou_dataset"].value for row in methods]
        assert miou == sorted(miou, reverse=True)
        assert [block.best(column) for column in shown.columns] == [whole.best(column) for column in shown.columns]


def test_the_order_is_the_sheets_or_that_of_any_column(lab):
    sheet = [row.name for row in Selection(sort="sheet", top=0).brief(lab).blocks[0].rows]
    assert sheet == [row.name for row in lab.blocks[0].rows]
    by_ap = [row for row in Selection(sort="ap_image").brief(lab).blocks[1].rows if row.group == "methods"]
    assert [r.values["ap_image"].value for r in by_ap] == sorted((r.values["ap_image"].value for r in by_ap), reverse=True)


def test_a_curve_keeps_its_order_and_costs_rank_the_cheapest_first(lab):
    block = replace(lab.blocks[0], axis="layer", rows=tuple(replace(r, series="s", x=0.0) for r in lab.blocks[0].rows[-3:]))
    curve = replace(lab, blocks=(block,))
    assert [r.name for r in Selection().brief(curve).blocks[0].rows] == [r.name for r in block.rows]
    (accuracy,) = [column for column in lab.columns if column.name == "accuracy"]
    rows = tuple(replace(row, values={"accuracy": row.values["accuracy"]}) for row in lab.blocks[0].rows)
    dear = replace(
        lab, columns=(replace(accuracy, kind="cost", percent=False),), blocks=(replace(lab.blocks[0], rows=rows),)
    )  # fmt: skip
    cheap = Selection().brief(dear).blocks[0].rows
    seconds = [row.values["accuracy"].value for row in cheap if row.group == "methods"]
    assert seconds == sorted(seconds)


def test_bold_is_for_terminals_and_no_color_is_respected(lab, monkeypatch, capsys):
    assert any("\x1b[1m60.5" in line for line in screen(lab, terminal=True)) and not any("\x1b" in line for line in screen(lab))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    print_table(lab)
    assert "\x1b" not in capsys.readouterr().out


CHOICE = {"columns": ("ap_image", "accuracy"), "rows": ("DAAM", "*LRP"), "intervals": False, "digits": 3, "sort": "ap_image"}


def test_columns_rows_intervals_and_digits_are_chosen_for_all_three_outputs_alike(lab):
    text, lines = to_csv(lab, Selection(**CHOICE)), screen(lab, **CHOICE)
    latex = to_latex(lab, Selection(**CHOICE))
    table = [row for row in rows_of(text) if row["block"] == "one object"]
    assert [row["row"] for row in table] == ["DAAM", "CLIP: partial LRP", "CLIP: LRP", "LRP", "partial LRP"]
    assert table[0]["ap_image"] == "0.5391" and "ap_image low" not in table[0] and "miou_dataset" not in table[0]
    (daam,) = [line for line in lines[2:8] if line.startswith("DAAM")]
    assert daam.split()[1:3] == ["53.910", "76.949"] and "[" not in "".join(lines)
    assert r"DAAM & 64 & \textbf{53.910} & 76.949 \\" in latex and "scriptsize" not in latex and "Brackets" not in latex
    assert [line.partition(" & ")[0] for line in latex.splitlines() if " & 64 & " in line][:5] == [row["row"] for row in table]


def test_csv_has_everything_in_full_precision_unless_asked_otherwise(lab):
    table = rows_of(to_csv(lab))
    assert len(table) == 97 and float(table[7]["ap_image high"]) == lab.blocks[0].ordered_rows[7].values["ap_image"].high


def test_a_name_that_the_table_lacks_is_refused_with_the_nearest(lab):
    for wrong, message in (
        ({"columns": ("ap_imag",)}, 'report.columns: table lab has no column "ap_imag". Did you mean "ap_image"?'),
        ({"sort": "bets"}, 'report.sort: table lab has no column "bets". Did you mean "best"?'),
        ({"rows": ("DAM",)}, 'report.rows: table lab has no row "DAM". Did you mean "DAAM"?'),
    ):
        with pytest.raises(ConfigError) as refused:
            Selection(**wrong).brief(lab)
        assert message in str(refused.value)


def test_a_metric_takes_all_three_columns_of_a_papers_table_and_quotations_keep_their_digits():
    table = load(BENCHMARKS / "conceptattention-imagenet_segmentation" / "results.json")
    shown = Selection(columns=("accuracy",), digits=4).all_columns(table)
    assert [(column.name, column.places) for column in shown.columns] == [
        ("quoted/accuracy", 2), ("released/accuracy", 4), ("standard/accuracy", 4)
    ]  # fmt: skip
    brief = screen(table)
    assert "(7 of 19, not run)" in brief[2] and any("\u2020 is acc/(2-acc)" in line for line in brief)


def test_samples_that_failed_are_said_also_of_rows_that_are_not_shown(lab):
    hidden = replace(lab.blocks[0].rows[-3], failed=2)
    block = replace(lab.blocks[0], rows=(*lab.blocks[0].rows[:-3], hidden, *lab.blocks[0].rows[-2:]))
    lines = screen(replace(lab, blocks=(block,)), top=1)
    assert f"one object, {hidden.name}: 2 failed, 0 excluded." in lines and not any(hidden.name in line for line in lines[:6])


def test_latex_fits_the_text_explains_its_marks_and_has_a_label_for_each_block(lab):
    everything = [load(path) for path in sorted(BENCHMARKS.glob("*/results.json"))]
    for table in everything:
        latex = to_latex(table)
        assert latex.isascii() and latex.count(r"\resizebox{\textwidth}") == latex.count(r"\begin{tabular}")
        marked = any(v.mark for block in table.blocks for row in block.rows for v in row.values.values())
        assert (r"\footnotesize Quoted numbers: $\dagger$ is acc/(2-acc)" in latex) == marked
        assert latex.count(r"\resizebox*{!}{0.8\textheight}") == latex.count(r"\begin{tabular}") and '"' not in latex
    labels = [line for line in to_latex(lab).splitlines() if line.startswith(r"\label")]
    assert labels == [rf"\label{{tab:lab-{number}}}" for number in (1, 2, 3)]
