"""The published lab table is what the shipped models give: a regression test of every number maker at once."""

from __future__ import annotations

import json

import pytest
from commands import TESTS

PUBLISHED = json.loads((TESTS.parent / "benchmarks" / "lab" / "results.json").read_text())
# Other processors round matrix products otherwise; a flipped pixel of 64 scenes of 64 x 64 moves a share by 4e-6.
TOLERANCE = 0.01
# Controls that any grounding must beat. Centre prior and colour contrast score higher than most tiny models: see the table.
NAMED = ("constant", "random", "inverted oracle")


pytestmark = pytest.mark.timeout(900)  # the whole table, while another process tests beside it


@pytest.fixture(scope="module")
def computed(shared):
    """The whole lab table, computed anew in an empty folder."""
    shared.run("table=lab", "report.publish=no")
    (path,) = (shared.folder / "runs" / "tables").glob("lab-*/results.json")
    return json.loads(path.read_text())


def cells(results):
    return {
        (block["name"], row["name"], metric): value["value"]
        for block in results["blocks"]
        for row in block["rows"]
        for metric, value in row["values"].items()
    }


def test_the_lab_table_is_the_published_one(computed):
    mine, published = cells(computed), cells(PUBLISHED)
    assert mine.keys() == published.keys()
    far = {key: (mine[key], published[key]) for key in mine if abs(mine[key] - published[key]) > TOLERANCE}
    assert not far


def test_colour_alone_is_no_better_than_the_best_method():
    """The drawn world hides objects among distractors as colourful: a method told no word can't win by odd colours."""
    rows = {r["name"]: r["values"]["ap_image"]["value"] for r in PUBLISHED["blocks"][0]["rows"]}
    assert rows["colour contrast"] < max(v for name, v in rows.items() if name not in ("oracle", "colour contrast"))


def beaten(block, method, metric):
    """Whether the method's interval lies above that of every named control."""
    rows = {r["name"]: r for b in PUBLISHED["blocks"] if b["name"] == block for r in b["rows"]}
    low = rows[method]["values"][metric]["low"]
    return all(low > rows[name]["values"][metric]["high"] for name in NAMED)


@pytest.mark.parametrize("block", [block["name"] for block in PUBLISHED["blocks"]])
@pytest.mark.parametrize(
    "method", ["ConceptAttention, output space", "cross-attention, attention logits", "SD3: cross-attention, attention logits"]
)
def test_the_concept_stream_ranks_pixels_better_than_the_named_controls_interval_by_interval(block, method):
    assert beaten(block, method, "ap_image")


@pytest.mark.parametrize("method", ["TransInterp", "rollout", "CLIP TextSpan", "CLIP: TransInterp", "DAAM"])
def test_methods_of_image_models_rank_pixels_better_too(method):
    assert beaten("one object", method, "ap_image")


def test_controls_score_their_closed_forms():
    for block in PUBLISHED["blocks"]:
        rows = {r["name"]: {m: v["value"] for m, v in r["values"].items()} for r in block["rows"]}
        assert rows["oracle"]["miou_dataset"] == rows["oracle"]["accuracy"] == rows["oracle"]["ap_image"] == pytest.approx(1)
        assert rows["inverted oracle"]["miou_dataset"] == rows["inverted oracle"]["accuracy"] == pytest.approx(0)
        share = rows["constant"]["accuracy"]
        if block["name"] == "one object":
            assert rows["constant"]["miou_dataset"] == pytest.approx(share / 2)
        assert rows["constant"]["published_miou_from_accuracy"] == pytest.approx(share / (2 - share))
