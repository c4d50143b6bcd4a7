"""Read old names in commands, sheets and results files: published columns and metrics are now called quoted or released."""

from __future__ import annotations

import pytest

from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import DEFINITIONS, definition_of
from conceptseg.metrics.reported import metric
from conceptseg.metrics.summary import summarise
from conceptseg.report.results import Results
from conceptseg.tables.former_names import with_current_names
from conceptseg.tables.table import columns_of

RELEASED = [name for name in DEFINITIONS if name.startswith("released_")]


@pytest.mark.parametrize("name", RELEASED)
def test_a_metric_is_found_under_its_old_name(name):
    old = name.replace("released_", "published_")
    assert definition_of(old, "report.columns") is definition_of(name, "report.columns")
    assert type(metric(old)) is type(metric(name))
    (column,) = columns_of([old])
    assert (column.name, column.kind) == (name, "released")
    with pytest.raises(ConfigError, match="unknown metric"):
        definition_of(f"published_{old}", "report.columns")


def test_numbers_asked_for_by_an_old_name_come_under_the_new_one():
    row = {
        "sample": "a",
        "view": "v",
        "segmenter": "s",
        "status": "ok",
        "classes": [0, 1],
        "inter": [6, 2],
        "pred": [7, 3],
        "label": [7, 3],
        "pred_void": [0, 0],
        "valid": 10,
        "correct": 8,
        "void": 0,
        "ap": {},
    }
    found = summarise([row], ["published_miou_from_accuracy"], 5, 0.95)
    assert found["released_miou_from_accuracy"].value == pytest.approx(0.8 / 1.2)


def test_an_old_sheet_is_read_with_the_new_names():
    old = {
        "published": "c",
        "columns": ["published_f1_rowwise", "accuracy"],
        "against": [{"row": "r", "metric": "published_f1_rowwise"}],
        "standard": {"columns": ["miou_dataset"]},
    }
    assert with_current_names(old) == {
        "claim": "c",
        "columns": ["released_f1_rowwise", "accuracy"],
        "against": [{"row": "r", "metric": "released_f1_rowwise"}],
        "standard": {"columns": ["miou_dataset"]},
    }


def test_an_old_results_file_is_read_with_the_new_names():
    number = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 2}
    names = ("published/miou", "released/published_ap_two_channel", "standard/accuracy")
    kinds = ("published", "released", "standard")
    row = {
        "name": "published_x",
        "group": "methods",
        "extractor": "e",
        "backbone": None,
        "provenance": "lab",
        "run_id": "1",
        "view": "v",
        "segmenter": "s",
        "n": 2,
        "excluded": 0,
        "failed": 0,
        "status": "ok",
        "note": "",
        "values": {name: number for name in names},
    }
    columns = [
        {"name": n, "label": "published", "percent": True, "text": "", "source": "", "kind": k}
        for n, k in zip(names, kinds, strict=True)
    ]
    table = Results.from_json(
        {
            "schema": 1,
            "table": "t",
            "title": "T",
            "command": "c",
            "conceptseg": "0",
            "columns": columns,
            "notes": [],
            "blocks": [{"name": "b", "dataset": "d", "protocol": "p", "text": "", "rows": [row]}],
        }
    )
    new = ("quoted/miou", "released/released_ap_two_channel", "standard/accuracy")
    assert [(c.name, c.kind) for c in table.columns] == list(zip(new, ("quoted", "released", "standard"), strict=True))
    (kept,) = table.blocks[0].rows
    assert tuple(kept.values) == new and kept.name == "published_x"
