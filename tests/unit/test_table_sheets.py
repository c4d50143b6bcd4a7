"""Table sheets are read strictly: a misspelt key is refused with the nearest one, whatever part of a sheet it is in."""

from __future__ import annotations

import copy

import pytest

from conceptseg.errors import ConfigError
from conceptseg.tables.sheet import PaperTable, TableSheet, read_sheet

TABLE = {
    "title": "controls",
    "columns": ["accuracy", "ap_image"],
    "against": [{"row": "constant", "metric": "ap_image"}],
    "only": [],
    "blocks": [
        {
            "name": "one object", "data": "drawn scenes", "text": "", "segmenter": "mean@mask/bilinear", "overrides": [],
            "rows": [
                {"name": "constant", "group": "controls", "overrides": ["extractor=constant"]},
                {"name": "DINOv2", "overrides": ["extractor=dinov2"], "view": "map"},
            ],
        }
    ],
}  # fmt: skip
PAPER = {
    "title": "a paper's",
    "claim": "claim",
    "quoted": ["miou"],
    "released": {"columns": ["accuracy"], "segmenter": "mean@grid/nearest", "overrides": ["protocol=imagenet_released"]},
    "backbones": "real",
    "lab": ["dataset=scenes"],
    "only": [],
    "methods": {},
    "blocks": [
        {
            "name": "one class", "data": "images", "text": "",
            "rows": {
                "LRP": {"overrides": ["extractor=lrp"], "lab": {"both": ["extractor=lrp"]}, "view": {"released": "map"}},
                "QueryInst": {"needs": "its data", "quotes": None},
            },
        }
    ],
}  # fmt: skip


def changed(sheet, path, change):
    """A copy of which one part was changed."""
    found = copy.deepcopy(sheet)
    at = found
    for key in filter(None, path.split("/")):
        at = at[int(key) if isinstance(at, list) else key]
    change(at)
    return found


def renamed(sheet, path, old, new):
    return changed(sheet, path, lambda part: part.update({new: part.pop(old)}))


MISSPELT = {
    "a table's": (TABLE, "", "columns", "colums"),
    "a difference's": (TABLE, "against/0", "metric", "metrik"),
    "a block's": (TABLE, "blocks/0", "overrides", "overides"),
    "a row's": (TABLE, "blocks/0/rows/1", "view", "veiw"),
    "the overrides of a row": (TABLE, "blocks/0/rows/1", "overrides", "overides"),
    "a paper's table's": (PAPER, "", "claim", "clam"),
    "a protocol's": (PAPER, "released", "segmenter", "segmentr"),
    "a paper's block's": (PAPER, "blocks/0", "text", "texts"),
    "a paper's row's": (PAPER, "blocks/0/rows/LRP", "overrides", "overides"),
    "a row's lab part": (PAPER, "blocks/0/rows/LRP/lab", "both", "bothh"),
    "a setting for one protocol": (PAPER, "blocks/0/rows/LRP/view", "released", "relased"),
}


@pytest.mark.parametrize("place", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_nearest(place):
    sheet, path, key, misspelt = MISSPELT[place]
    with pytest.raises(ConfigError, match=rf'unknown key "{misspelt}"\. Did you mean "{key}"\?'):
        read_sheet(renamed(sheet, path, key, misspelt))


def test_a_refusal_names_the_block_and_the_row():
    with pytest.raises(ConfigError, match=r'^table\.blocks\["one object"\]\.rows\["DINOv2"\]: unknown key "veiw"'):
        read_sheet(renamed(TABLE, "blocks/0/rows/1", "view", "veiw"))


def test_a_key_of_papers_tables_is_none_of_other_tables():
    """It would change nothing there."""
    with pytest.raises(ConfigError, match='unknown key "released"'):
        read_sheet(renamed(TABLE, "blocks/0/rows/1", "view", "released"))


@pytest.mark.parametrize(
    ("sheet", "path", "value", "message"),
    [
        (TABLE, "columns", "accuracy", r"table\.columns: wanted a list of strings, got 'accuracy'"),
        (TABLE, "only", "DINOv2", r"table\.only: wanted a list of strings, got 'DINOv2'"),
        (TABLE, "only", ["dinov2"], r'table\.only: the table has no row "dinov2"\. Did you mean "DINOv2"\?'),
        (TABLE, "blocks/0/rows", [], "at least one row"),
        (TABLE, "blocks/0/rows", [TABLE["blocks"][0]["rows"][0]] * 2, 'row "constant" occurs twice'),
        (TABLE, "against", [{"row": "constnt", "metric": "ap_image"}], r'against\.row.*Did you mean "constant"\?'),
        (TABLE, "against", [{"row": "constant", "metric": "ap_imag"}], r'against\.metric.*Did you mean "ap_image"\?'),
        (PAPER, "backbones", "lba", r'table\.backbones: wanted "real" or "lab", got \'lba\'\. Did you mean "lab"\?'),
        (PAPER, "blocks/0/rows/QueryInst", {"quotes": None}, r'rows\["QueryInst"\]: lacks overrides'),
        (PAPER, "blocks/0/rows/LRP/each_view", "layers", 'each_view: wanted "layer" or "timestep" or null, got \'layers\''),
        (PAPER, "blocks/0/rows/LRP", ["extractor=lrp"], "wanted an object with the keys of PaperRow"),
    ],
)
def test_what_a_sheet_may_not_say_is_refused(sheet, path, value, message):
    before, _, last = path.rpartition("/")
    with pytest.raises(ConfigError, match=message):
        read_sheet(changed(sheet, before, lambda part: part.update({last: value})))


def test_only_keeps_the_rows_it_names_and_no_difference_to_another():
    table = read_sheet({**TABLE, "only": ["DINOv2"]})
    assert isinstance(table, TableSheet) and [row.name for row in table.blocks[0].rows] == ["DINOv2"] and not table.against
    assert read_sheet({**TABLE, "only": ["constant"]}).against == read_sheet(TABLE).against


def test_only_may_name_the_row_of_one_block():
    (block,) = TABLE["blocks"]
    sheet = {**TABLE, "blocks": [block, {**block, "name": "second"}]}
    found = read_sheet({**sheet, "only": ["constant", "second: DINOv2"]})
    assert [[row.name for row in one.rows] for one in found.blocks] == [["constant"], ["constant", "DINOv2"]]
    assert found.against == read_sheet(TABLE).against
    assert read_sheet({**sheet, "only": [f"{block['name']}: constant", "second: DINOv2"]}).against == ()
    with pytest.raises(ConfigError, match=r'no row "second: DINO"\. Did you mean "second: DINOv2"'):
        read_sheet({**sheet, "only": ["second: DINO"]})


def test_rows_may_be_a_mapping_which_hydra_can_merge():
    paper = read_sheet({**PAPER, "only": ["LRP"]})
    assert isinstance(paper, PaperTable) and [row.name for row in paper.blocks[0].rows] == ["LRP"]
    assert paper.blocks[0].rows[0].lab.under("released") == ("extractor=lrp",)
