import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conceptseg.report.results import Results
from conceptseg.report.terminal import print_table


def plain_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("test_report_table.json").read_text())
    return table


def printed(data: dict[str, Any], width: int = 120, colour: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system="standard" if colour else None)
    print_table(Results.from_json(data), console, detail="full")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_number_stands_with_its_n_interval_provenance_and_definition():
    text = printed(plain_table())
    assert re.search(r"ConceptAttention +lab +64 +56\.1 \[50\.3, 61\.2\]", text)
    assert "mIoU: Mean of IoUs. Source: VOC devkit" in text
    assert "single v1" in text and "3457730d85b4" in text and "Drawn scenes." in text


def test_an_n_that_differs_from_the_rows_own_is_printed_in_the_cell():
    assert "n=60 41.0 [36.0, 46.0]" in printed(plain_table())


def test_a_row_that_was_not_run_says_so_with_its_note_and_its_quoted_number():
    text = printed(plain_table())
    assert re.search(r"Flux \(1\) +weights +not run +\u2013 +71\.0", text)
    assert "(1) as printed" in text
    assert "Needs Flux, 24 GB; VOCdevkit." in " ".join(text.split()) and "conceptseg extractor=flux" in text


def test_columns_in_which_nothing_was_run_are_left_out_where_room_is_short_and_named():
    data = plain_table()
    data["columns"].append(data["columns"][0] | {"name": "empty", "label": "a metric that no row has", "kind": "released"})
    assert "No row has a number in" not in printed(data)
    text = printed(data, 60)
    assert "No row has a number in: a metric that no row has % (released code)." in " ".join(text.split())
    assert text.count("a metric that no row has") == 2  # there, and where columns are explained


def test_what_methods_declare_is_abbreviated_before_a_table_is_broken_up_and_a_legend_explains_it():
    data = plain_table()
    for row in data["blocks"][0]["rows"]:
        row |= {"told": "name and prompt", "trained_on": "images and captions", "argmax": "yes"}
    data["blocks"][0]["rows"][0]["argmax"] = "no"
    wide, narrow = printed(data, 160), printed(data, 80)
    assert re.search(r"ConceptAttention +lab +name and prompt +images and captions +yes", wide) and "shown:" not in wide
    assert re.search(r"ConceptAttention +lab +name\+ +text +64", narrow)
    shown, data = "shown (shown to the model): name+ = name and prompt", "data (trained on): text = images and captions"
    assert shown in narrow and data in narrow and "argmax: no (DAAM), else yes" in narrow


def test_a_failed_row_says_so():
    data = plain_table()
    data["blocks"][0]["rows"][1] |= {"status": "failed", "values": {}}
    assert re.search(r"ConceptAttention +lab +failed +\u2013 +\u2013", printed(data))


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_what_is_shown_to_methods_and_trained_on_is_printed_at_any_width(width):
    data = plain_table()
    data["blocks"][0]["rows"][1] |= {"told": "name and prompt", "trained_on": "images and captions", "argmax": "yes"}
    text = printed(data, width)
    assert all(word in text for word in ("shown", "prompt", "trained on", "captions", "argmax"))
    assert max(len(line) for line in text.splitlines()) <= width and "56.1" in text


def test_samples_that_failed_or_were_excluded_are_counted():
    assert "DAAM: 3 failed, 1 excluded" in printed(plain_table())


def test_controls_come_last_and_only_the_best_method_is_bold():
    text = printed(plain_table(), colour=True)
    assert text.index("DAAM") < text.index("centre prior")
    assert "\x1b[1m56.1" in text and "\x1b[1m90.0" not in text and "\x1b[1m41.0" not in text


@pytest.mark.parametrize("width", [60, 75, 80, 90, 100, 110, 120, 160])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_every_number_survives_a_narrow_terminal(width, count):
    data = plain_table()
    for i in range(count):
        data["columns"].append(data["columns"][0] | {"name": f"m{i}", "label": f"metric {i}"})
        for row in data["blocks"][0]["rows"]:
            if row["status"] == "ok":
                row["values"][f"m{i}"] = {"value": 0.1 * i + 0.111, "low": 0.1 * i, "high": 0.1 * i + 0.2, "n": 64}
    text = printed(data, width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\u2026" not in text
    for i in range(count):
        assert f"{10 * i + 11.1:.1f}" in text and f"[{10 * i:.1f}, {10 * i + 20:.1f}]" in text


def test_words_in_brackets_are_not_taken_for_markup():
    assert "see [bold]this[/bold]" in printed(plain_table() | {"notes": ["see [bold]this[/bold]"]})


def test_without_a_terminal_lines_have_120_columns_unless_the_environment_says_otherwise(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(Results.from_json(plain_table()), detail="full")
    lines = capsys.readouterr().out.splitlines()
    assert 80 < max(len(line) for line in lines) <= 120
    monkeypatch.setenv("COLUMNS", "80")
    print_table(Results.from_json(plain_table()), detail="full")
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80
