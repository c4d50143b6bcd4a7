"""Counts against scikit-learn and torchmetrics, and what the released relabelling does."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import confusion_matrix, jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics.counts import count
from conceptseg.metrics.released import colliding_relabel, relabel

CLASSES = (0, 3, 7)


@given(
    labels=hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from(CLASSES)),
    truth=hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from((*CLASSES, 255))),
)
@settings(deadline=None)
def test_counts_are_the_margins_of_the_confusion_matrix(labels, truth):
    counts = count(labels, truth, CLASSES)
    matrix = confusion_matrix(truth.ravel(), labels.ravel(), labels=[*CLASSES, 255])
    assert counts.classes == CLASSES
    assert counts.inter == tuple(matrix.diagonal()[:3])
    assert counts.label == tuple(matrix[:3].sum(axis=1))
    assert counts.pred == tuple(matrix[:3, :3].sum(axis=0))
    assert counts.pred_void == tuple(matrix[3, :3])
    assert (counts.valid, counts.correct, counts.void) == (matrix[:3].sum(), matrix.trace(), matrix[3].sum())


def test_ious_equal_scikit_learn_and_torchmetrics():
    generator = np.random.default_rng(0)
    labels, truth = generator.integers(0, 4, (2, 50, 60)).astype(np.uint8)
    truth[generator.random(truth.shape) < 0.1] = 255
    counts = count(labels, truth, (0, 1, 2, 3))
    inter, pred, label = (np.array(values) for values in (counts.inter, counts.pred, counts.label))
    ious = inter / (pred + label - inter)
    scored = truth != 255
    np.testing.assert_allclose(ious, jaccard_score(truth[scored], labels[scored], average=None), atol=1e-12)
    oracle = MulticlassJaccardIndex(num_classes=4, average="none", ignore_index=255)
    expected = oracle(torch.from_numpy(labels.astype(int)), torch.from_numpy(truth.astype(int)))
    np.testing.assert_allclose(ious, expected, atol=1e-6)  # torchmetrics returns float32


def test_counts_are_plain_integers_that_json_can_hold():
    counts = count(np.uint8([[1, 0]]), np.uint8([[1, 255]]), (0, 1))
    values = [*counts.inter, *counts.pred, *counts.label, *counts.pred_void, counts.valid, counts.correct, counts.void]
    assert {type(value) for value in values} == {int}


def test_a_class_order_other_than_ascending_is_kept():
    assert count(np.uint8([[7, 7, 0]]), np.uint8([[7, 0, 0]]), (7, 0)).pred == (2, 1)


@pytest.mark.parametrize(
    ("labels", "truth", "classes", "error", "words"),
    [
        (np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), (0, 1), DataError, "one size"),
        (np.zeros((2, 2), np.int64), np.zeros((2, 2), np.uint8), (0, 1), DataError, "uint8"),
        (np.uint8([[0, 1]]), np.uint8([[0, 9]]), (0, 1), DataError, r"truth holds \[9\]"),
        (np.uint8([[0, 9]]), np.uint8([[0, 1]]), (0, 1), ConfigError, r"predicted \[9\]"),
        (np.uint8([[0, 255]]), np.uint8([[0, 255]]), (0, 1), ConfigError, r"predicted \[255\]"),
        (np.uint8([[0, 0]]), np.uint8([[0, 0]]), (0, 0), ConfigError, "distinct"),
        (np.uint8([[0, 0]]), np.uint8([[0, 0]]), (0, 255), ConfigError, "void"),
    ],
)
def test_what_cannot_be_counted_is_refused(labels, truth, classes, error, words):
    with pytest.raises(error, match=words):
        count(labels, truth, classes)


@pytest.mark.parametrize(("size", "damaged", "total"), [(1, 0, 20), (2, 14, 190), (3, 234, 1140)])
def test_the_released_relabelling_damages_as_many_class_sets_as_the_paper_code_does(size, damaged, total):
    channels = np.arange(5 + size)[None]
    sets = list(combinations(range(1, 21), size))
    wrong = [v for v in sets if not np.array_equal(colliding_relabel(channels, 5, v), relabel(channels, 5, v))]
    assert (len(wrong), len(sets)) == (damaged, total)


def test_bus_becomes_whatever_comes_second():
    channels = np.array([[0, 4, 5, 6]])
    assert relabel(channels, 5, (6, 12)).tolist() == [[0, 0, 6, 12]]
    assert colliding_relabel(channels, 5, (6, 12)).tolist() == [[0, 0, 12, 12]]
    assert channels.tolist() == [[0, 4, 5, 6]]


def test_channels_that_no_word_owns_are_refused():
    for function in (relabel, colliding_relabel):
        with pytest.raises(ConfigError, match=r"make 0\.\.6"):
            function(np.array([[7]]), 5, (1, 2))
