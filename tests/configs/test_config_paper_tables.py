"""Every table of a paper: all rows are quoted, and whatever has an extractor composes for both protocols and for the lab."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from composing import CONF, GROUPS, plainly

from conceptseg.report.quoted import load_claim, shipped
from conceptseg.saliency.views import expand_views
from conceptseg.tables.paper import overrides_of
from conceptseg.tables.sheet import PaperTable, PerProtocol, read_sheet
from conceptseg.targets import instantiate

CLAIM = re.compile("^claim:", re.MULTILINE)
PAPER = [name for name in GROUPS["table"] if CLAIM.search((CONF / "table" / f"{name}.yaml").read_text(encoding="utf-8"))]
EACH = pytest.mark.parametrize("name", PAPER)


@cache
def sheet_of(name: str) -> PaperTable:
    sheet = read_sheet(plainly(f"table={name}")["table"], name)
    assert isinstance(sheet, PaperTable)
    return sheet


def under(setting, kind):
    return setting.under(kind) if isinstance(setting, PerProtocol) else setting


def test_every_table_that_was_promised_is_there():
    wanted = {"imagenet_segmentation", "voc_single", "voc_multi", "ablation_space", "ablation_attention", "layers", "timesteps"}
    assert {f"conceptattention/{one}" for one in wanted} <= {*PAPER}
    assert any(name.startswith("daam/") for name in PAPER)


@EACH
def test_every_row_of_the_paper_is_a_row_here(name):
    sheet = sheet_of(name)
    quotes = {row.quoted for block in sheet.blocks for row in block.rows}
    claim = load_claim(shipped(sheet.claim))
    assert quotes - {None} <= {row.row for row in claim.rows}
    if sheet.claim == name.replace("/", "-") and sheet.quoted:
        assert {row.row for row in claim.rows} <= quotes
    assert set(sheet.quoted) <= claim.columns.keys()


def check_row(sheet, block, row, kind):
    """Raises whatever is wrong with a row under a protocol."""
    whole = plainly(*overrides_of(row, block, sheet, kind))
    segmenters = {s.key: s for s in instantiate(whole["protocol"], "protocol").segmenters}
    assert (under(row.segmenter, kind) or sheet.parts[kind].segmenter) in segmenters
    assert not whole["dataset"]["_target_"].endswith(".Scenes") or row.needs
    view = under(row.view, kind)
    assert view is None or view in whole["views"]


@EACH
def test_every_row_composes_and_its_view_and_segmenter_exist(name):
    """With the paper's models. Of the second protocol only the first row, and rows that say something of their own about it:
    tests/e2e/test_e2e_paper_tables.py computes every method and every protocol of the tables, with the lab's models.
    """
    sheet, wrong = sheet_of(name), {}
    rows = [(block, row) for block in sheet.blocks for row in block.rows if row.overrides is not None]
    for number, (block, row) in enumerate(rows):
        own = row.released or row.standard or any(isinstance(setting, PerProtocol) for setting in (row.view, row.segmenter))
        for kind in list(sheet.parts)[: None if own or number == 0 else 1]:
            try:
                check_row(sheet, block, row, kind)
            except Exception as error:
                wrong[f"{row.name}, {kind}"] = error
    assert not wrong


@EACH
def test_where_the_lab_has_another_kind_of_model_the_row_says_so(name):
    """Rows of self-supervised models, which the lab fills with its supervised ViT."""
    for block in sheet_of(name).blocks:
        for row in block.rows:
            real, lab = " ".join(row.overrides or ()), " ".join(row.lab.both if row.lab else ())
            stands_for = "lab_vit" in lab and ("=dino" in real or "=ibot" in real)
            assert stands_for == ("supervised ViT" in (row.lab.note if row.lab else "")), row.name


def test_the_two_halves_of_table_1_have_the_same_rows_and_the_same_methods_on_the_lab():
    one, other = (sheet_of(f"conceptattention/{name}").blocks[0].rows for name in ("imagenet_segmentation", "voc_single"))
    assert [row.name for row in one] == [row.name for row in other] and len(one) == 23
    assert [(row.overrides, row.standard) for row in one] == [(row.overrides, row.standard) for row in other]


def test_the_lab_models_that_ship_offer_what_the_rows_read():
    sheet = replace(sheet_of("conceptattention/imagenet_segmentation"), backbones="lab")
    block = sheet.blocks[0]
    row = next(r for r in block.rows if r.name == "ConceptAttention Flux")
    for kind in sheet.parts:
        whole = plainly(*overrides_of(row, block, sheet, kind))
        assert "output" in expand_views(whole["views"], instantiate(whole["extractor"], "extractor").axes())
