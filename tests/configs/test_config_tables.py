"""Every row of every table sheet can be computed, and says nothing that is not defined."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from composing import CONF, GROUPS, plainly

from conceptseg.config import instantiate
from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.saliency.views import expand_views
from conceptseg.tables.table import columns_of

TABLES: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((CONF / "table" / f"{name}.yaml").read_text(encoding="utf-8")) for name in GROUPS["table"]
}
ROWS = [
    pytest.param(block, row, id=f"{name}-{block['name']}-{row['name']}")
    for name, table in TABLES.items()
    for block in table["blocks"]
    for row in block["rows"]
]
EACH_TABLE = pytest.mark.parametrize("name", TABLES)


@EACH_TABLE
def test_a_table_has_what_its_report_prints(name):
    table = TABLES[name]
    assert table["title"] and table["columns"] and table["blocks"]
    for block in table["blocks"]:
        assert block["name"] and block["data"] and block["text"] and block["segmenter"] and block["rows"]


@EACH_TABLE
def test_the_columns_of_a_table_are_defined_metrics(name):
    assert set(TABLES[name]["columns"]) <= set(DEFINITIONS)
    assert [c.name for c in columns_of(TABLES[name]["columns"])] == TABLES[name]["columns"]


@EACH_TABLE
def test_every_block_has_the_rows_that_others_are_held_against(name):
    for against in TABLES[name].get("against", []):
        assert against["metric"] in TABLES[name]["columns"]
        for block in TABLES[name]["blocks"]:
            assert against["row"] in {row["name"] for row in block["rows"]}


@EACH_TABLE
def test_no_two_rows_of_a_block_share_a_name(name):
    for block in TABLES[name]["blocks"]:
        names = [row["name"] for row in block["rows"]]
        assert len(names) == len(set(names))


@EACH_TABLE
def test_the_rows_of_a_block_share_data_and_protocol(name):
    for block in TABLES[name]["blocks"]:
        wholes = [plainly(*block.get("overrides", []), *row["overrides"]) for row in block["rows"]]
        assert all((w["dataset"], w["protocol"]) == (wholes[0]["dataset"], wholes[0]["protocol"]) for w in wholes)


@EACH_TABLE
def test_rows_of_the_group_controls_and_no_others_are_controls(name):
    for block in TABLES[name]["blocks"]:
        for row in block["rows"]:
            target = plainly(*block.get("overrides", []), *row["overrides"])["extractor"]["_target_"]
            assert (row.get("group") == "controls") == (".controls." in target), row["name"]


@pytest.mark.parametrize(("block", "row"), ROWS)
def test_a_row_composes_and_its_view_and_segmenter_exist(block, row):
    whole = plainly(*block.get("overrides", []), *row["overrides"])
    protocol = instantiate(whole["protocol"], "protocol")
    segmenters = {s.key: s for s in protocol.segmenters}
    wanted = row.get("segmenter", block["segmenter"])
    assert wanted in segmenters
    extractor = instantiate(whole["extractor"], "extractor")
    assert extractor.comparable or segmenters[wanted].decision != "argmax"
    backbone = whole["extractor"].get("backbone", {}).get("path", "lab:")
    if backbone.startswith("lab:"):  # the layers of others are known from the network alone
        views = expand_views(whole["views"], extractor.axes())
        assert row.get("view", next(iter(views))) in views
