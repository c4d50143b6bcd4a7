"""Every table sheet says nothing that is not defined. That its rows can be computed is seen where they are:
tests/e2e/test_lab_table.py, and for the tables of papers tests/configs/test_config_paper_tables.py and tests/e2e.
"""

from __future__ import annotations

import pytest
from composing import GROUPS, plainly

from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.tables.sheet import TableSheet, read_sheet
from conceptseg.tables.table import columns_of


@pytest.mark.parametrize("name", GROUPS["table"])
def test_the_rows_of_a_table_can_be_chosen_on_the_command_line_and_its_columns_are_defined_metrics(name):
    """`table.only=[...]` is refused by Hydra where a sheet lacks the key."""
    settings = plainly(f"table={name}")["table"]
    sheet = read_sheet(settings, name)
    assert "only" in settings and sheet.only == ()
    if isinstance(sheet, TableSheet):
        assert set(sheet.columns) <= set(DEFINITIONS)
        assert [c.name for c in columns_of(sheet.columns)] == list(sheet.columns)
