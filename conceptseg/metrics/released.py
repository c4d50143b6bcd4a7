"""Metrics as released code computes them, where that differs from the usual definition, to reproduce quoted numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Integer

from conceptseg.errors import ConfigError

BACKGROUND = 0  # conceptseg.types has it too, but imports torch


def iou_from_accuracy(accuracy: Float[np.ndarray, "*batch"]) -> Float[np.ndarray, "*batch"]:
    """Return ConceptAttention's ImageNet-Segmentation "mIoU", 0..1: a / (2 - a), a function of pixel accuracy a alone.

    The script takes the two-class IoU of the stack (1 - m, m) against (1 - t, t) without an argmax. Of N pixels, R are
    right; the stack has 2N. Every right pixel gives one match of value 0 and one of value 1, so both classes have
    intersection R. m and 1 - m together hold each value N times, and so do t and 1 - t, so both unions are N + N - R.
    Both IoUs are R / (2N - R) = a / (2 - a) with a = R / N, never less than the mean IoU of the plain masks.

    Source: ConceptAttention (arXiv:2502.04320), released code, experiments/imagenet_segmentation/run_experiment.py.
    """
    return np.asarray(accuracy / (2 - accuracy))


def f1_over_rows(found: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Return the mean over the H pixel rows of each row's F1, 0..1; 0 for a row with neither truth nor prediction.

    A coding accident of the reference, which takes the first axis for a batch; the ordinary F1 is f1_image.

    Source: Chefer et al. 2021 (arXiv:2012.09838), hila-chefer/Transformer-Explainability at c3e578f, utils/metrices.py.
    """
    both, either = 2 * (found & truth).sum(1), found.sum(1) + truth.sum(1)
    return float(np.mean(np.divide(both, either, out=np.zeros(len(both)), where=either > 0)))


def relabel(
    indices: Integer[np.ndarray, "H W"], background_count: int, class_indices: Sequence[int]
) -> Integer[np.ndarray, "H W"]:
    """Map winning channels to classes: the first `background_count` (b) are background, channel b + i is class_indices[i]."""
    _check_channels(indices, background_count, class_indices)
    classes = np.array([BACKGROUND] * background_count + list(class_indices), indices.dtype)
    return np.asarray(classes[indices])


def colliding_relabel(
    indices: Integer[np.ndarray, "H W"], background_count: int, class_indices: Sequence[int]
) -> Integer[np.ndarray, "H W"]:
    """Map winning channels to classes like the released VOC multi-class script: in place, one class after another.

    A class whose index equals the channel of a later one is moved again: with 5 background words, `bus` (6) becomes
    whatever class comes second. 14 of the 190 pairs of VOC classes and 234 of the 1140 triples are damaged.

    Source: ConceptAttention (arXiv:2502.04320), released code, run_multi_class_seg_experiment.py.
    """
    _check_channels(indices, background_count, class_indices)
    moved = np.where(indices < background_count, BACKGROUND, indices)
    for channel, index in enumerate(class_indices, start=background_count):
        moved[moved == channel] = index
    return moved


def _check_channels(indices: Integer[np.ndarray, "H W"], background_count: int, class_indices: Sequence[int]) -> None:
    channels = background_count + len(class_indices)
    if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < channels:
        raise ConfigError(
            f"Cannot relabel channels {indices.min()}..{indices.max()}: {background_count} background words and "
            f"{len(class_indices)} classes make 0..{channels - 1}."
        )
