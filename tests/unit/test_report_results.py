import json
from pathlib import Path
from typing import Any

import pytest

from conceptseg.errors import ReportError
from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results, load, save


def plain_table() -> dict[str, Any]:
    """One block with two methods, a row that was not run but has a quoted number, and a control."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("test_report_table.json").read_text())
    return table


def changed_table(path: str, value: Any) -> dict[str, Any]:
    """The plain table with one place, such as blocks/0/rows/1/n, set to another value."""
    data = plain_table()
    *parents, last = path.split("/")
    place: Any = data
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return data


def test_json_goes_through_the_dataclasses_unchanged():
    assert Results.from_json(plain_table()).to_json() == plain_table()


def test_optional_keys_go_through_too():
    data = plain_table() | {"interval": "95 % bootstrap", "sheet": "benchmarks/lab/sheet.png"}
    assert Results.from_json(data).to_json() == data


def test_a_saved_table_is_loaded_as_it_was(tmp_path):
    results = Results.from_json(plain_table())
    save(tmp_path / "benchmarks" / "lab" / "results.json", results)
    assert load(tmp_path / "benchmarks" / "lab" / "results.json") == results
    assert [file.name for file in (tmp_path / "benchmarks" / "lab").iterdir()] == ["results.json"]


VALUE = "blocks/0/rows/1/values/miou"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema 1.*schema 2"),
        ("titel", "x", 'unknown key "titel". Did you mean "title"'),
        ("blocks/0/rows/1/n", "64", r'blocks\["one object"\].rows\["ConceptAttention"\].n: wanted an integer, got \'64\''),
        ("blocks/0/rows/1/n", True, "wanted an integer, got True"),
        ("blocks/0/rows/1/status", "done", '"ok" or "not run" or "failed"'),
        ("blocks/0/rows/1/backbone", 3, "wanted a string or null"),
        ("blocks", {}, "wanted a list"),
        ("notes", "none", "wanted a list of strings"),
        (f"{VALUE}/low", 0.7, r"its interval \[0.7, 0.612\] is upside down"),
        (f"{VALUE}/value", float("nan"), "not finite"),
        (f"{VALUE}/low", None, "one end of an interval"),
        (f"{VALUE}/n", 0, "at least one sample"),
        (f"{VALUE}/n", None, "at least one sample"),
        (VALUE, {"value": 0.5, "low": None, "high": None, "n": 64}, "has no interval"),
        (VALUE, {"value": 56.1, "low": 50.3, "high": 61.2, "n": 64}, "not a share between"),
        ("blocks/0/rows/1/values", {"mio": {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}}, 'metric "mio". Did you mean'),
        ("blocks/0/rows/1/run_id", "", "a number needs both"),
        ("blocks/0/rows/1/failed", -1, "can't be negative"),
        ("blocks/0/rows/1/status", "failed", 'has a value of "miou", but its status is "failed"'),
        ("blocks/0/rows/1/name", "DAAM", 'row "DAAM" of block "one object" occurs twice'),
        ("table", "a --> b", "table name"),
        ("columns", [], "no columns"),
        ("sheet", "/home/me/sheet.png", "no path below"),
        ("sheet", "javascript:alert(1)", "no path below"),
    ],
)
def test_a_table_that_may_not_be_printed_is_refused(path, value, message):
    with pytest.raises(ReportError, match=message):
        Results.from_json(changed_table(path, value))


def test_a_missing_key_is_named():
    data = plain_table()
    del data["blocks"][0]["rows"][0]["provenance"]
    with pytest.raises(ReportError, match=r'rows\["DAAM"\]: lacks provenance'):
        Results.from_json(data)


def test_a_file_that_is_not_json_or_not_there_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ReportError, match="is not JSON"):
        load(tmp_path / "results.json")
    with pytest.raises(ReportError, match="can't read the table"):
        load(tmp_path / "absent.json")


def test_rounding_of_equal_numbers_is_not_outside_the_interval():
    Results.from_json(changed_table(VALUE, {"value": 0.1 + 0.2, "low": 0.3, "high": 0.3, "n": 64}))


def test_controls_never_win_a_column_and_quotations_have_no_winner():
    results = Results.from_json(plain_table())
    assert [results.blocks[0].best(column) for column in results.columns] == ["56.1", None]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ((0.5, 0.4, 0.6), ("0.500", "[0.400, 0.600]")),
        ((12.34, 11.0, 13.0), ("12.3", "[11.0, 13.0]")),
        ((2500.4, 2400, 2600), ("2500", "[2400, 2600]")),
    ],
)
def test_a_number_and_its_interval_have_the_same_decimals(value, written):
    column = Column("speed", "speed", False, "Images an hour.", "", "standard")
    assert column.written(Value(*value, n=3)) == written


def test_a_difference_is_printed_with_its_sign_and_wins_nothing():
    column = Column("difference_ap_image", "mAP over constant", True, "", "", "difference")
    assert column.written(Value(0.123, -0.01, 0.25, 64)) == ("+12.3", "[-1.0, +25.0]")
    plain = plain_table()
    plain["columns"][0]["kind"] = "difference"
    results = Results.from_json(plain)
    assert results.blocks[0].best(results.columns[0]) is None


def test_the_file_is_plain_json(tmp_path):
    save(tmp_path / "results.json", Results.from_json(plain_table()))
    assert json.loads((tmp_path / "results.json").read_text()) == plain_table()
