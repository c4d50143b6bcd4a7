"""Check numbers that others printed: every file is sound, and every cell obeys its stated definition, by arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conceptseg.errors import ReportError
from conceptseg.report.quoted import load_claim, on_the_identity

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*/quoted.yaml"))
CLAIMS = {path.parent.name: load_claim(path) for path in FILES}
IMAGENET = CLAIMS["conceptattention-imagenet_segmentation"]
CELLS = [
    pytest.param(row, id=f"{name}: {row.row}")
    for name, claim in CLAIMS.items()
    for row in claim.rows
    if {"accuracy", "miou"} <= row.values.keys()
]


def test_every_table_and_curve_of_the_two_papers_is_there():
    wanted = {"imagenet_segmentation", "voc_single", "voc_multi", "ablation_space", "ablation_attention", "layers", "timesteps"}
    assert {name.removeprefix("conceptattention-") for name in CLAIMS if name.startswith("conceptattention-")} == wanted
    assert {"daam-noun_segmentation", "daam-visuosyntactic"} <= CLAIMS.keys()


@pytest.mark.parametrize("row", CELLS)
def test_a_row_lies_on_acc_over_two_minus_acc_if_and_only_if_it_is_said_to(row):
    on = on_the_identity(row.values["accuracy"], row.values["miou"])
    said = row.obeys["miou"]
    assert on == (said == "released_miou_from_accuracy") or said in ("unknown", "released_miou_void_in_union")


def test_ten_rows_of_the_main_table_are_on_the_identity_and_two_are_unexplained():
    kinds = [row.obeys["miou"] for row in IMAGENET.rows]
    assert len(kinds) == 19
    assert (kinds.count("released_miou_from_accuracy"), kinds.count("miou_dataset"), kinds.count("unknown")) == (10, 7, 2)


def test_the_rows_called_clip_vit_are_the_supervised_ones_of_an_older_paper():
    older = {row.row.partition(",")[0]: row.values for row in CLAIMS["later-imagenet_segmentation"].rows if "Chefer" in row.row}
    names = {"LRP": "LRP", "Partial-LRP": "partial LRP", "Rollout": "Rollout", "ViT Attention": "raw attention"}
    for ours, theirs in {**names, "GradCAM": "GradCAM", "TransInterp": "TransInterp"}.items():
        assert IMAGENET.row(ours).values == older[theirs], ours


def test_a_mean_iou_never_exceeds_the_identity():
    for row in IMAGENET.rows:
        share = row.values["accuracy"] / 100
        assert row.values["miou"] <= 100 * share / (2 - share) + 0.02


def test_ablations_end_in_the_row_of_the_main_table():
    main = IMAGENET.row("ConceptAttention Flux").values
    assert CLAIMS["conceptattention-ablation_space"].row("output, softmax").values == main
    assert CLAIMS["conceptattention-ablation_attention"].row("cross and self").values == main
    cross = IMAGENET.row("Cross-attention Flux").values
    assert CLAIMS["conceptattention-ablation_space"].row("cross-attention, softmax").values == cross


def test_the_constants_of_the_layer_figure_are_neither_the_table_nor_the_identity():
    row = CLAIMS["conceptattention-layers"].row("combined layers")
    assert not on_the_identity(row.values["accuracy"], row.values["miou"])
    assert row.values["miou"] < IMAGENET.row("ConceptAttention Flux").values["miou"] - 3


def test_cells_from_memory_are_marked_and_none_of_the_best_row_contradicts_the_abstract():
    daam = CLAIMS["daam-noun_segmentation"]
    cells = daam.row("DAAM-0.4").values.values()
    assert not daam.row("DAAM-0.4").verified and min(cells) >= 58.8 and max(cells) == 64.8
    assert all(row.verified is ("from memory" not in row.source.read_in) for row in daam.rows)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", 0, "source"), "nowhere", "unknown source"),
        (("rows", 0, "obeys", "miou"), "miou", 'unknown definition "miou"'),
        (("rows", 0, "values", "miuo"), 3, 'unknown column "miuo". Did you mean "miou"'),
        (("rows", 0, "values", "miou"), 320, "percents"),
        (("rows", 0, "verfied"), True, "unknown key"),
        (("rows", 1, "row"), "LRP", "occurs twice"),
    ],
)
def test_a_file_that_does_not_hold_together_is_refused(tmp_path, path, value, message):
    data = yaml.safe_load((BENCHMARKS / IMAGENET.name / "quoted.yaml").read_text())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (tmp_path / "quoted.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ReportError, match=message):
        load_claim(tmp_path / "quoted.yaml")
