"""Every row of every table sheet can be computed, and says nothing that is not defined."""

from __future__ import annotations

import pytest
from composing import GROUPS, plainly

from conceptseg.config import instantiate
from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.saliency.views import expand_views
from conceptseg.tables.sheet import TableSheet, read_sheet
from conceptseg.tables.table import columns_of

SHEETS = {name: read_sheet(plainly(f"table={name}")["table"], name) for name in GROUPS["table"]}
TABLES = {name: sheet for name, sheet in SHEETS.items() if isinstance(sheet, TableSheet)}
ROWS = [
    pytest.param(block, row, id=f"{name}-{block.name}-{row.name}")
    for name, table in TABLES.items()
    for block in table.blocks
    for row in block.rows
]
EACH_TABLE = pytest.mark.parametrize("name", TABLES)


@pytest.mark.parametrize("name", SHEETS)
def test_the_rows_of_a_table_can_be_chosen_on_the_command_line(name):
    """`table.only=[...]` is refused by Hydra where a sheet lacks the key."""
    assert "only" in plainly(f"table={name}")["table"] and SHEETS[name].only == ()


@EACH_TABLE
def test_the_columns_of_a_table_are_defined_metrics(name):
    assert set(TABLES[name].columns) <= set(DEFINITIONS)
    assert [c.name for c in columns_of(TABLES[name].columns)] == list(TABLES[name].columns)


@EACH_TABLE
def test_the_rows_of_a_block_share_data_and_protocol(name):
    for block in TABLES[name].blocks:
        wholes = [plainly(*block.overrides, *row.overrides) for row in block.rows]
        assert all((w["dataset"], w["protocol"]) == (wholes[0]["dataset"], wholes[0]["protocol"]) for w in wholes)


@EACH_TABLE
def test_rows_of_the_group_controls_and_no_others_are_controls(name):
    for block in TABLES[name].blocks:
        for row in block.rows:
            target = plainly(*block.overrides, *row.overrides)["extractor"]["_target_"]
            assert (row.group == "controls") == (".controls." in target), row.name


@pytest.mark.parametrize(("block", "row"), ROWS)
def test_a_row_composes_and_its_view_and_segmenter_exist(block, row):
    whole = plainly(*block.overrides, *row.overrides)
    protocol = instantiate(whole["protocol"], "protocol")
    segmenters = {s.key: s for s in protocol.segmenters}
    wanted = row.segmenter or block.segmenter
    assert wanted in segmenters
    extractor = instantiate(whole["extractor"], "extractor")
    assert extractor.comparable or segmenters[wanted].decision != "argmax"
    backbone = whole["extractor"].get("backbone", {}).get("path", "lab:")
    if backbone.startswith("lab:"):  # the layers of others are known from the network alone
        views = expand_views(whole["views"], extractor.axes())
        assert (row.view or next(iter(views))) in views
