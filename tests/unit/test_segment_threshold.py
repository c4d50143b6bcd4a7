"""Cuts through one map against their definitions, one pixel at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conceptseg.segment.threshold import above_level, above_mean, above_otsu, above_quantile, from_share

maps = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.integers(-64, 64).map(float))


@given(maps)
def test_above_the_mean_is_strict(scores):
    """Whole numbers, so that the mean of at most 36 pixels is compared without rounding: v > sum / n."""
    total, n = int(scores.sum()), scores.size
    wanted = [[int(v) * n > total for v in row] for row in scores]
    assert above_mean(scores).tolist() == wanted or n & (n - 1)  # n a power of two divides exactly
    assert (above_mean(scores) == (scores > scores.mean())).all()


def test_the_mean_is_taken_in_the_maps_own_precision():
    scores = np.array([[1.0, 1.0, 1.0]], np.float32)
    assert not above_mean(scores).any()


@given(maps, st.sampled_from([0.25, 0.5, 0.75]))
def test_above_a_level_is_a_share_of_the_way_from_least_to_greatest(scores, level):
    low, high = min(scores.ravel().tolist()), max(scores.ravel().tolist())
    assert above_level(scores, level).tolist() == [[v > low + level * (high - low) for v in row] for row in scores.tolist()]


@given(st.permutations(range(20)), st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9]))
def test_a_quantile_leaves_its_share_of_distinct_pixels_below(order, quantile):
    scores = np.array(order, np.float32).reshape(4, 5)
    assert above_quantile(scores, quantile).sum() == len([v for v in range(20) if v > quantile * 19])


def test_a_share_counts_from_zero_and_takes_what_equals_it():
    assert from_share(np.array([[1.0, 4.0, 3.9, 10.0]], np.float32), 0.4).tolist() == [[False, True, False, True]]


CONSTANT = [above_mean, above_otsu, lambda m: above_level(m, 0.5), lambda m: above_quantile(m, 0.25)]


@pytest.mark.parametrize("cut", CONSTANT, ids=["mean", "otsu", "level", "quantile"])
def test_a_constant_map_has_no_foreground(cut):
    assert not cut(np.full((4, 4), 0.25, np.float32)).any()


def literal_otsu(scores):
    """The cut among the 255 inner bin edges with the greatest variance between sides, each pixel at its bin's centre."""
    low, high = float(scores.min()), float(scores.max())
    width = (high - low) / 256
    bins = [min(int((float(v) - low) / width), 255) for v in scores.ravel()]
    centres = [low + (b + 0.5) * width for b in bins]
    best, best_variance = None, -1.0
    for cut in range(255):
        below = [c for c, b in zip(centres, bins, strict=True) if b <= cut]
        above = [c for c, b in zip(centres, bins, strict=True) if b > cut]
        if below and above:
            difference = sum(below) / len(below) - sum(above) / len(above)
            variance = len(below) * len(above) * difference**2
            if variance > best_variance * (1 + 1e-9):  # equal variances (empty bins between) keep the first cut
                best, best_variance = low + (cut + 1) * width, variance
    return scores > best


@pytest.mark.parametrize("seed", range(6))
def test_otsu_is_the_search_over_every_cut(seed):
    generator = np.random.default_rng(seed)
    # Values at the middle of bins of a map from 0 to 1: whether a pixel on an edge belongs left or right is not the question.
    bins = np.concatenate([generator.normal(60, 25, 60), generator.normal(190, 20, 40)]).clip(1, 254).astype(int)
    scores = np.concatenate([[0.0], (bins + 0.5) / 256, [1.0]]).reshape(6, 17).astype(np.float32)
    assert np.array_equal(above_otsu(scores), literal_otsu(scores))


def test_otsu_parts_two_heaps():
    scores = np.array([[0.0, 0.1, 0.05, 0.9], [0.95, 1.0, 0.02, 0.93]], np.float32)
    assert above_otsu(scores).tolist() == [[False, False, False, True], [True, True, False, True]]


@given(st.floats(0.5, 4, width=32), st.floats(-3, 3, width=32))
def test_otsu_does_not_depend_on_scale_or_offset(scale, offset):
    scores = np.array([[0.0, 0.1, 0.05, 0.9], [0.95, 1.0, 0.02, 0.93]], np.float32)
    assert np.array_equal(above_otsu(scores * scale + offset), above_otsu(scores))
