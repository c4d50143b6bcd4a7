"""Average precision: exact against scikit-learn and torchmetrics, by rank only, fast enough for a whole data set."""

import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score
from torchmetrics.classification import BinaryAveragePrecision

from conceptseg.errors import DataError
from conceptseg.metrics.average_precision import (
    average_precision,
    foreground_average_precision,
    minmax_scaled,
    two_channel_average_precision,
)

EXACT = 1e-9
SCORES = hnp.arrays(np.float64, 40, elements=st.sampled_from(np.linspace(-3, 3, 13).tolist()))
TRUTHS = hnp.arrays(np.bool_, 40).filter(lambda truth: bool(truth.any()))


@given(scores=SCORES, truth=TRUTHS)
@settings(deadline=None, max_examples=200)
def test_equals_scikit_learn_with_ties(scores, truth):
    assert average_precision(scores, truth).item() == pytest.approx(average_precision_score(truth, scores), abs=EXACT)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 4096, 7])
def test_equals_scikit_learn_on_large_maps(dtype, levels):
    generator = np.random.default_rng(0)
    scores = generator.normal(size=224 * 224) if levels is None else generator.integers(levels, size=224 * 224) / levels - 0.5
    scores = scores.astype(dtype)
    truth = generator.random(scores.size) < 0.2 + 0.1 * (scores > 0)
    # float16 to float64 for the oracle keeps order and ties.
    expected = average_precision_score(truth, scores.astype(np.float64))
    assert average_precision(scores, truth).item() == pytest.approx(expected, abs=EXACT)


def test_equals_torchmetrics_on_ranks_scaled_to_the_unit_interval():
    generator = np.random.default_rng(1)
    scores, truth = generator.integers(-50, 50, size=2000).astype(np.float64), generator.random(2000) < 0.3
    # torchmetrics puts scores outside [0, 1] through a sigmoid, which would make new ties.
    unit = np.unique(scores, return_inverse=True)[1] / 100
    expected = BinaryAveragePrecision(thresholds=None)(torch.from_numpy(unit), torch.from_numpy(truth).int()).item()
    assert average_precision(scores, truth).item() == pytest.approx(expected, abs=1e-6)  # torchmetrics ends in float32


@given(scores=SCORES, truth=TRUTHS, scale=st.floats(0.1, 50), shift=st.floats(-100, 100))
@settings(deadline=None)
def test_strictly_monotone_transforms_change_nothing(scores, truth, scale, shift):
    value = average_precision(scores, truth).item()
    assert average_precision(scale * scores + shift, truth).item() == value
    assert average_precision(np.exp(scores), truth).item() == value


@given(scores=hnp.arrays(np.float32, (2, 3, 20), elements=st.integers(0, 5).map(float)), truth=hnp.arrays(np.bool_, (2, 3, 20)))
@settings(deadline=None)
def test_a_batch_equals_its_maps_one_by_one(scores, truth):
    batched = average_precision(scores, truth)
    looped = [[average_precision(scores[i, j], truth[i, j]).item() for j in range(3)] for i in range(2)]
    np.testing.assert_array_equal(batched, looped)


def test_the_oracle_scores_one_and_a_constant_map_scores_the_prevalence():
    truth = np.arange(100) < 30
    assert average_precision(truth.astype(np.float32), truth).item() == 1.0
    assert average_precision(np.zeros(100), truth).item() == pytest.approx(0.3, abs=EXACT)


def test_random_scores_give_about_the_prevalence():
    generator = np.random.default_rng(2)
    truth = generator.random((20, 10_000)) < 0.25
    values = average_precision(generator.random(truth.shape), truth)
    assert values.mean() == pytest.approx(truth.mean(), abs=0.005)  # standard error of the mean is about 0.001


def test_without_positives_it_is_undefined():
    assert np.isnan(average_precision(np.arange(4.0), np.zeros(4, bool)))
    assert foreground_average_precision(np.ones((2, 2)), np.uint8([[0, 0], [0, 255]])) is None


def test_infinite_scores_are_ranked_last_and_tie_with_each_other():
    assert average_precision(np.array([np.inf, 0.0, -np.inf, -np.inf]), np.array([1, 0, 1, 0], bool)).item() == 0.75


def test_nan_scores_are_refused():
    with pytest.raises(DataError, match="1 of 4 scores are NaN"):
        average_precision(np.array([0.1, np.nan, 0.2, 0.3]), np.ones(4, bool))


def test_other_shapes_and_dtypes_are_refused():
    with pytest.raises(DataError, match="one shape"):
        average_precision(np.zeros(4), np.ones(3, bool))
    with pytest.raises(DataError, match="wanted bool"):
        average_precision(np.zeros(4), np.ones(4, np.uint8))
    with pytest.raises(DataError, match="enlarge the map"):
        foreground_average_precision(np.zeros((64, 64)), np.zeros((224, 224), np.uint8))
    with pytest.raises(DataError, match="enlarge the map"):
        two_channel_average_precision(np.zeros((64, 64)), np.zeros((224, 224), np.uint8), minmax=False)


def test_foreground_leaves_void_out_and_takes_the_class_asked_for():
    scores, truth = np.float32([[3, 9, 1], [2, 0, 5]]), np.uint8([[7, 255, 0], [7, 3, 7]])
    scored = truth != 255
    expected = average_precision_score(truth[scored] == 7, scores[scored])
    assert foreground_average_precision(scores, truth, label=7) == pytest.approx(expected, abs=EXACT)
    assert foreground_average_precision(scores, truth) is None


def literal_two_channel(scores, truth):
    """As utils/metrices.py computes it: flatten the stack, NaN to 0, drop ignored entries, scikit-learn, NaN to 0."""
    target = np.where(truth == 255, -1, truth.astype(int))
    output = np.nan_to_num(np.stack([1 - scores, scores])).ravel()
    onehot = np.stack([np.where(target < 0, -1, 1 - target), target]).ravel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(np.nan_to_num(average_precision_score(onehot[onehot >= 0], output[onehot >= 0])))


@given(
    scores=hnp.arrays(np.float32, (5, 6), elements=st.integers(-8, 8).map(lambda k: k / 4)),
    truth=hnp.arrays(np.uint8, (5, 6), elements=st.sampled_from([0, 1, 255])).filter(lambda truth: bool((truth != 255).any())),
)
@settings(deadline=None)
def test_two_channel_equals_the_released_algorithm(scores, truth):
    value = two_channel_average_precision(scores, truth, minmax=False)
    assert value == pytest.approx(literal_two_channel(scores, truth), abs=EXACT)


def test_two_channel_golden_value():
    scores, truth = np.array([[1, 0.2], [0.4, 0]]), np.uint8([[1, 1], [0, 0]])
    assert two_channel_average_precision(scores, truth, minmax=False) == pytest.approx(0.8541667, abs=1e-7)


def test_two_channel_depends_on_the_offset_and_the_foreground_value_does_not():
    generator = np.random.default_rng(3)
    scores, truth = generator.random((30, 30)), (generator.random((30, 30)) < 0.36).astype(np.uint8)
    values = [two_channel_average_precision(scores + shift, truth, minmax=False) for shift in (0, -3, 3)]
    assert len({round(value, 2) for value in values}) == 3
    assert foreground_average_precision(scores, truth) == foreground_average_precision(scores + 3, truth)


def test_two_channel_minmax_undoes_scale_and_offset_and_scores_a_constant_map_as_zeros():
    generator = np.random.default_rng(4)
    scores, truth = generator.random((9, 9)), (generator.random((9, 9)) < 0.4).astype(np.uint8)
    plain = two_channel_average_precision(minmax_scaled(scores), truth, minmax=False)
    assert two_channel_average_precision(scores, truth, minmax=True) == plain
    assert two_channel_average_precision(4 * scores, truth, minmax=True) == plain
    assert two_channel_average_precision(np.full((9, 9), 5.0), truth, minmax=True) == pytest.approx(0.5, abs=EXACT)


def test_two_channel_of_nothing_but_void_is_zero():
    assert two_channel_average_precision(np.ones((2, 2)), np.full((2, 2), 255, np.uint8), minmax=False) == 0.0


def test_two_channel_refuses_many_classes():
    with pytest.raises(DataError, match=r"holds \[15\]"):
        two_channel_average_precision(np.zeros((1, 2)), np.uint8([[0, 15]]), minmax=False)


def test_a_data_set_of_4276_maps_takes_less_than_a_minute():
    generator = np.random.default_rng(5)
    coarse = generator.normal(size=(100, 64, 64)).astype(np.float32)
    nearest = np.arange(224) * 64 // 224
    scores = np.concatenate([coarse[:, nearest][:, :, nearest], generator.normal(size=(100, 224, 224)).astype(np.float32)])
    truth = generator.random(scores.shape) < 0.3
    start = time.process_time()
    average_precision(scores.reshape(200, -1), truth.reshape(200, -1))
    assert (time.process_time() - start) * 4276 / 200 < 60
