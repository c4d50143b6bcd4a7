"""Decisions, the grid they are taken on, and how the answer reaches the size of the truth."""

import numpy as np
import pytest

from conceptseg.errors import ConfigError
from conceptseg.segment.resize import bilinear, nearest_floor
from conceptseg.segment.segmenter import Segmenter
from conceptseg.segment.threshold import above_level, above_mean, above_otsu, above_quantile, from_share
from conceptseg.types import Concepts

SINGLE = Concepts(("cat", "grass", "sky"), (1, 0, 0), target=0)
LAST = Concepts(("grass", "sky", "cat"), (0, 0, 1), target=2)
MULTI = Concepts(("grass", "sky", "cat", "bus"), (0, 0, 8, 15))
SIZE = (9, 13)


def maps_for(concepts, seed=0):
    return np.random.default_rng(seed).normal(size=(len(concepts), 4, 5)).astype(np.float32)


def run(segmenter, maps, concepts, classes=(0, 1), size=SIZE):
    return segmenter(maps, segmenter.scores(maps, size), concepts, classes)


CUTS = {
    "mean": above_mean,
    "otsu": above_otsu,
    "level": lambda m: above_level(m, 0.5),
    "quantile": lambda m: above_quantile(m, 0.5),
    "share": lambda m: from_share(m, 0.5),
}


@pytest.mark.parametrize("decision", CUTS)
@pytest.mark.parametrize("concepts", [SINGLE, LAST])
def test_a_cut_on_the_grid_is_enlarged_by_torchs_nearest(decision, concepts):
    maps = maps_for(concepts)
    wanted = nearest_floor(CUTS[decision](maps[concepts.target]).astype(np.uint8), SIZE)
    assert np.array_equal(run(Segmenter(decision, cut="grid", enlarge="nearest"), maps, concepts).labels, wanted)


@pytest.mark.parametrize("decision", CUTS)
@pytest.mark.parametrize("enlarge", ["nearest", "bilinear"])
def test_a_cut_on_the_mask_is_taken_after_enlarging(decision, enlarge):
    maps = maps_for(SINGLE)
    enlarged = {"nearest": nearest_floor, "bilinear": bilinear}[enlarge](maps, SIZE)
    wanted = CUTS[decision](enlarged[0]).astype(np.uint8)
    prediction = run(Segmenter(decision, enlarge=enlarge), maps, SINGLE)
    assert np.array_equal(prediction.labels, wanted) and np.array_equal(prediction.scores, enlarged)


def test_cutting_before_and_after_bilinear_enlarging_differ():
    maps = maps_for(SINGLE)
    assert not np.array_equal(
        run(Segmenter("mean", cut="grid"), maps, SINGLE).labels, run(Segmenter("mean", cut="mask"), maps, SINGLE).labels
    )


@pytest.mark.parametrize("cut", ["grid", "mask"])
def test_the_winning_channel_gives_its_class(cut):
    maps = maps_for(MULTI)
    segmenter = Segmenter("argmax", cut=cut, enlarge="nearest")
    got = run(segmenter, maps, MULTI, classes=(0, 8, 15)).labels
    enlarged = nearest_floor(maps, SIZE)
    for y in range(SIZE[0]):
        for x in range(SIZE[1]):
            column = enlarged[:, y, x].tolist()
            assert got[y, x] == MULTI.labels[column.index(max(column))]


def test_a_tie_goes_to_the_first_channel():
    assert not run(Segmenter("argmax"), np.zeros((3, 2, 2), np.float32), LAST).labels.any()
    assert run(Segmenter("argmax"), np.zeros((3, 2, 2), np.float32), SINGLE).labels.all()


def test_colliding_relabelling_moves_a_class_onto_a_later_channel():
    """With five background words bus (6) lands on the channel of the second class and becomes that class."""
    concepts = Concepts(("a", "b", "c", "d", "e", "bus", "cat"), (0, 0, 0, 0, 0, 6, 8))
    maps = np.zeros((7, 1, 3), np.float32)
    maps[0, 0, 0] = maps[5, 0, 1] = maps[6, 0, 2] = 1
    classes = (0, 6, 8)
    right = run(Segmenter("argmax", "grid", "nearest"), maps, concepts, classes, (1, 3)).labels
    colliding = run(Segmenter("argmax", "grid", "nearest", relabel="colliding"), maps, concepts, classes, (1, 3)).labels
    assert right.tolist() == [[0, 6, 8]] and colliding.tolist() == [[0, 8, 8]]


def test_one_target_takes_the_last_class():
    maps = maps_for(SINGLE)
    assert set(np.unique(run(Segmenter("mean"), maps, SINGLE, classes=(0, 1)).labels)) == {0, 1}


@pytest.mark.parametrize("decision", CUTS)
def test_a_cut_without_a_target_is_refused_with_the_way_out(decision):
    with pytest.raises(ConfigError, match=r'decision "\w+" cuts one target map.*Use "argmax"'):
        run(Segmenter(decision), maps_for(MULTI), MULTI, (0, 8, 15))


@pytest.mark.parametrize("segmenter", [Segmenter("mean"), Segmenter("argmax", "grid", "nearest"), Segmenter("otsu", "grid")])
def test_labels_are_uint8_and_scores_float32_at_the_size_of_the_truth(segmenter):
    prediction = run(segmenter, maps_for(SINGLE), SINGLE)
    assert prediction.labels.dtype == np.uint8 and prediction.labels.shape == SIZE
    assert prediction.scores.dtype == np.float32 and prediction.scores.shape == (3, *SIZE)


def test_maps_are_left_as_they_were():
    maps = maps_for(SINGLE)
    before = maps.copy()
    for decision in (*CUTS, "argmax"):
        run(Segmenter(decision), maps, SINGLE)
    assert np.array_equal(maps, before)


@pytest.mark.parametrize(
    ("segmenter", "key"),
    [
        (Segmenter("mean", "grid", "nearest"), "mean@grid/nearest"), (Segmenter("argmax"), "argmax@mask/bilinear"),
        (Segmenter("level", level=0.3), "level0.3@mask/bilinear"),
        (Segmenter("quantile", level=0.75), "quantile0.75@mask/bilinear"),
        (Segmenter("share", level=0.4), "share0.4@mask/bilinear"),
        (Segmenter("argmax", "grid", "nearest", relabel="colliding"), "argmax@grid/nearest/colliding"),
        (Segmenter("mean", "grid", "nearest", score_grid=14), "mean@grid/nearest/scores14"),
    ],
)  # fmt: skip
def test_the_key_says_decision_grid_and_enlarging(segmenter, key):
    assert segmenter.key == key


@pytest.mark.parametrize(
    ("setting", "key", "near"),
    [
        ({"decision": "maen"}, "decision", "mean"), ({"cut": "gird"}, "cut", "grid"),
        ({"enlarge": "bilinaer"}, "enlarge", "bilinear"), ({"relabel": "rihgt"}, "relabel", "right"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_names_key_and_nearest_choice(setting, key, near):
    with pytest.raises(ConfigError, match=rf'protocol\.segmenters\.{key}: unknown .*Did you mean "{near}"'):
        Segmenter(**{"decision": "mean", **setting})


def test_coarse_scores_that_would_be_cut_are_refused():
    with pytest.raises(ConfigError, match=r'score_grid is 14 with cut "mask"'):
        Segmenter("mean", score_grid=14)
