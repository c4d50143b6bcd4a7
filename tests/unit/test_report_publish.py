"""Publishing again on another machine changes a file only where a number moved beyond its column's tolerance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_report_results import plain_table

from conceptseg.report.columns import Value
from conceptseg.report.digits import settled
from conceptseg.report.publish import publish
from conceptseg.report.results import Results, load, save
from conceptseg.report.results_md import check

FOUND = Value(0.5612345678, 0.5034567891, 0.6123456789, 64)


def lab(value: Value = FOUND, column: str = "miou") -> Results:
    """The plain table with this number of ConceptAttention's."""
    results = Results.from_json(plain_table())
    block = results.blocks[0]
    rows = tuple(replace(r, values={column: value}) if r.name == "ConceptAttention" else r for r in block.rows)
    return replace(results, blocks=(replace(block, rows=rows),))


def published(folder: Path, results: Results, colour: str = "white", size: tuple[int, int] = (4, 4)) -> list[str]:
    (folder / "computed").mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(folder / "computed" / "sheet.png")
    return publish(results, folder / "computed", folder / "benchmarks", folder / "RESULTS.md")


def number(folder: Path) -> Value:
    rows = {row.name: row for row in load(folder / "benchmarks" / "lab" / "results.json").blocks[0].rows}
    return rows["ConceptAttention"].values["miou"]


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in [folder / "RESULTS.md", *(folder / "benchmarks").rglob("*")] if p.is_file()}


def test_a_percentage_with_one_decimal_is_published_with_five_of_the_share(tmp_path):
    published(tmp_path, lab())
    assert number(tmp_path) == Value(0.56123, 0.50346, 0.61235, 64)
    assert check(tmp_path / "RESULTS.md", tmp_path / "benchmarks") == []


def test_no_printed_digit_changes(tmp_path):
    """0.4174996 is printed 41.7; rounded to five decimals it would be printed 41.8."""
    found = Value(0.4174996, 0.4174996, 0.4185004, 64)
    published(tmp_path, lab(found))
    column = lab().columns[0]
    assert number(tmp_path) == Value(0.41749, 0.41749, 0.4185, 64) and column.written(number(tmp_path)) == column.written(found)


@pytest.mark.parametrize("by", [0.0009, -0.0009, 4e-6])
def test_a_number_within_its_tolerance_keeps_the_published_digits_and_the_pictures(by, tmp_path):
    published(tmp_path, lab())
    before = files(tmp_path)
    moved = lab(Value(FOUND.value + by, FOUND.low + by, FOUND.high - by, 64))
    assert any(line.startswith("kept: ") for line in published(tmp_path, moved, "black"))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "moved",
    [
        replace(FOUND, value=FOUND.value + 0.0012),
        replace(FOUND, low=FOUND.low - 0.0012),
        replace(FOUND, high=FOUND.high + 0.0012),
        replace(FOUND, n=63),
    ],
)
def test_a_number_that_moved_is_published_with_its_interval_and_new_pictures(moved, tmp_path):
    published(tmp_path, lab())
    before = files(tmp_path)
    said = published(tmp_path, lab(moved), "black")
    after = files(tmp_path)
    assert "1 of " in said[0] and number(tmp_path) == replace(
        moved, **{k: round(getattr(moved, k), 5) for k in ("value", "low", "high")}
    )
    assert before[tmp_path / "benchmarks" / "lab" / "sheet.png"] != after[tmp_path / "benchmarks" / "lab" / "sheet.png"]
    assert check(tmp_path / "RESULTS.md", tmp_path / "benchmarks") == []


def test_small_steps_do_not_add_up(tmp_path):
    """Each is within the tolerance of the one before, the last is not within that of what was published first."""
    published(tmp_path, lab())
    for step in range(1, 4):
        published(tmp_path, lab(replace(FOUND, value=FOUND.value + 0.0008 * step)))
    assert number(tmp_path).value == round(FOUND.value + 0.0016, 5)


def test_pictures_of_another_size_are_published_though_no_number_moved(tmp_path):
    published(tmp_path, lab())
    published(tmp_path, lab(), size=(4, 8))
    with Image.open(tmp_path / "benchmarks" / "lab" / "sheet.png") as sheet:
        assert sheet.size == (4, 8)


def test_rows_that_come_or_go_count_as_moved():
    whole = lab()
    block = whole.blocks[0]
    without = replace(whole, blocks=(replace(block, rows=tuple(r for r in block.rows if r.name != "ConceptAttention")),))
    assert settled(whole, without)[1] == settled(without, whole)[1] == 1
    assert settled(whole, None)[1] == sum(len(row.values) for row in block.rows)


def test_digits_that_no_machine_can_reproduce_are_reported(tmp_path):
    published(tmp_path, lab())
    save(tmp_path / "benchmarks" / "lab" / "results.json", lab())
    assert any(
        "more digits than are published" in sentence for sentence in check(tmp_path / "RESULTS.md", tmp_path / "benchmarks")
    )
