"""Every table of a paper: all rows are quoted, and whatever has an extractor composes for both protocols and for the lab."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from composing import CONF, GROUPS, plainly

from conceptseg.config import instantiate
from conceptseg.report.quoted import load_claim, shipped
from conceptseg.saliency.views import Axes, expand_views
from conceptseg.tables.paper import KINDS, overrides_of

FOLDER = CONF / "table"
SHEETS: dict[str, dict[str, Any]] = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*/*.yaml"))
}
PAPER = {name: sheet for name, sheet in SHEETS.items() if "published" in sheet}
EACH = pytest.mark.parametrize("name", PAPER)
ROWS = [
    pytest.param(sheet, block, row, kind, id=f"{name}: {row['name']}, {kind}")
    for name, sheet in PAPER.items()
    for block in sheet["blocks"]
    for row in block["rows"]
    for kind in KINDS
    if "overrides" in row and kind in sheet
]


def test_every_table_that_was_promised_is_there():
    wanted = {"imagenet_segmentation", "voc_single", "voc_multi", "ablation_space", "ablation_attention", "layers", "timesteps"}
    assert {f"conceptattention/{one}" for one in wanted} <= PAPER.keys()
    assert any(name.startswith("daam/") for name in PAPER)


@EACH
def test_every_row_of_the_paper_is_a_row_here(name):
    sheet = PAPER[name]
    quotes = {row.get("quotes", row["name"]) for block in sheet["blocks"] for row in block["rows"]}
    claim = load_claim(shipped(sheet["published"]))
    assert quotes - {None} <= {row.row for row in claim.rows}
    if sheet["published"] == name.replace("/", "-") and sheet.get("quoted"):
        assert {row.row for row in claim.rows} <= quotes
    assert set(sheet.get("quoted", ())) <= claim.columns.keys()


@EACH
def test_a_row_without_an_extractor_says_what_it_needs(name):
    for block in PAPER[name]["blocks"]:
        for row in block["rows"]:
            assert "overrides" in row or row["needs"]


@pytest.mark.parametrize(("sheet", "block", "row", "kind"), ROWS)
@pytest.mark.parametrize("on_lab", [False, True], ids=["real", "lab"])
def test_a_row_composes_and_its_view_and_segmenter_exist(sheet, block, row, kind, on_lab):
    if on_lab and "lab" not in row:
        return
    whole = plainly(*overrides_of(row, block, sheet, kind, on_lab))
    segmenters = {s.key: s for s in instantiate(whole["protocol"], "protocol").segmenters}
    segmenter = row.get("segmenter", sheet[kind]["segmenter"])
    wanted = segmenter.get(kind, sheet[kind]["segmenter"]) if isinstance(segmenter, dict) else segmenter
    assert wanted in segmenters
    path = (whole["extractor"].get("backbone") or {}).get("path", "lab:")
    assert path.startswith("lab:") or not on_lab
    assert (whole["dataset"]["_target_"].rpartition(".")[2] == "Scenes") == on_lab or "needs" in row
    view = row.get("view")
    view = view.get(kind) if isinstance(view, dict) else view
    assert view is None or view in whole["views"]


NUMBERS = ("extractor", "dataset", "protocol")
"""What names a run; views are read off it."""
PRINTED = [
    pytest.param(sheet, block, row, id=f"{name}: {row['name']}")
    for name, sheet in PAPER.items()
    if name.startswith("conceptattention/")
    for block in sheet["blocks"]
    for row in block["rows"]
    if "overrides" in row and row.get("group") != "controls"
]


def views_of(whole, name=None):
    """Keys of the views of a configuration, or of one of them, as a method of 38 blocks would read them."""
    keys = set()
    for given in [whole["views"][name]] if name else whole["views"].values():
        axes = Axes((given["space"],), tuple(range(38)) if "layers" in given else (), "timesteps" in given)
        keys |= {view.key for view in expand_views({"view": given}, axes).values()}
    return keys


@pytest.mark.parametrize(("sheet", "block", "row"), PRINTED)
def test_a_row_of_the_paper_is_an_experiment_sheet_of_its_own(sheet, block, row):
    """The same extractor, data and protocol, so the same run; and a header that names what is reproduced."""
    wanted = plainly(*overrides_of(row, block, sheet, "released", on_lab=False))
    view = row.get("view")
    read = views_of(wanted, view.get("released") if isinstance(view, dict) else view)
    found = []
    for name in [name for name in GROUPS["experiment"] if name.startswith(("ca_", "daam_"))]:
        whole = plainly(f"experiment={name}")
        if all(whole[key] == wanted[key] for key in NUMBERS) and read <= views_of(whole):
            found.append(name)
    assert found
    headers = [(CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").partition("defaults:")[0] for name in found]
    assert any("paper" in header.lower() or "Table" in header for header in headers)


@EACH
def test_where_the_lab_has_another_kind_of_model_the_row_says_so(name):
    """Rows of self-supervised models, which the lab fills with its supervised ViT."""
    for block in PAPER[name]["blocks"]:
        for row in block["rows"]:
            real, lab = (" ".join(listed) for listed in (row.get("overrides", []), row.get("lab", {}).get("both", [])))
            stands_for = "lab_vit" in lab and ("=dino" in real or "=ibot" in real)
            assert stands_for == ("supervised ViT" in row.get("lab", {}).get("note", "")), row["name"]


def test_the_lab_models_that_ship_offer_what_the_rows_read():
    sheet = PAPER["conceptattention/imagenet_segmentation"]
    block = sheet["blocks"][0]
    row = next(r for r in block["rows"] if r["name"] == "ConceptAttention Flux")
    for kind in KINDS:
        whole = plainly(*overrides_of(row, block, sheet, kind, on_lab=True))
        assert "output" in expand_views(whole["views"], instantiate(whole["extractor"], "extractor").axes())
