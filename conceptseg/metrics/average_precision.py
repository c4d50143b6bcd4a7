"""Average precision of a score map against a mask: exact, with ties, by rank only."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8

from conceptseg.errors import DataError
from conceptseg.types import VOID


def average_precision(scores: Float[np.ndarray, "*batch P"], truth: Bool[np.ndarray, "*batch P"]) -> Float[np.ndarray, "*batch"]:
    """Return the mean, over the positive of P pixels, of the precision among all pixels that score at least as high; in 0..1.

    Tied pixels enter together, so the order of pixels is irrelevant; it is the step-wise sum over recall that
    scikit-learn's `average_precision_score` returns. NaN where nothing is positive. Scores are compared in their own
    dtype: only their order counts.

    >>> average_precision(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False])).item()
    0.8333333333333333
    """
    if scores.shape != truth.shape:
        raise DataError(f"Cannot rank: scores are {scores.shape} and the truth {truth.shape}; both must be one shape.")
    if truth.dtype != np.bool_:
        raise DataError(f"Cannot rank: the truth is {truth.dtype}; wanted bool (void pixels dropped, positives True).")
    if np.isnan(scores).any():
        raise DataError(
            f"Cannot rank: {int(np.isnan(scores).sum())} of {scores.size} scores are NaN; fix the map, not the metric."
        )
    values = np.empty(scores.shape[:-1], np.float64)
    for at in np.ndindex(values.shape):
        values[at] = _ranked(scores[at], truth[at])
    return values


def _ranked(scores: Float[np.ndarray, " P"], truth: Bool[np.ndarray, " P"]) -> float:
    # Two plain sorts instead of one argsort: numpy sorts values many times faster than it sorts indices.
    values, tied = np.unique(scores[truth], return_counts=True)
    if not values.size:
        return float("nan")
    negatives = np.sort(scores[~truth])
    hits = np.cumsum(tied[::-1])[::-1]
    misses = negatives.size - np.searchsorted(negatives, values)
    return float(np.sum(tied * (hits / (hits + misses))) / hits[0])


def foreground_average_precision(
    scores: Float[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], label: int = 1
) -> float | None:
    """Return the average precision, 0..1, of class `label` against every other pixel that is not void (255).

    None if the class is absent.
    """
    if scores.shape != truth.shape:
        raise DataError(f"Cannot rank: the map is {scores.shape} and the truth {truth.shape}; enlarge the map first.")
    scored = truth != VOID
    value = average_precision(scores[scored], truth[scored] == label).item()
    return None if np.isnan(value) else value


def minmax_scaled(scores: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """Scale a map to 0..1 by its own extremes, in its own dtype and without an epsilon: a constant map becomes NaN."""
    low, high = scores.min(), scores.max()
    with np.errstate(invalid="ignore"):
        return np.asarray((scores - low) / (high - low))


def two_channel_average_precision(scores: Float[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], minmax: bool) -> float:
    """Return the released ConceptAttention "AP", 0..1: pixels of (1 - s, s) pooled and ranked against (1 - t, t), without void.

    Depends on the offset and scale of s, not only on its order. NaN scores count as 0, an undefined value as 0. The
    ImageNet script scales the map at its own resolution, before any shrinking and enlarging: where that loses the extremes
    of the map, pass `minmax_scaled(map)` resized, and minmax=False.

    Source: ConceptAttention (arXiv:2502.04320), released code; ImageNet-Segmentation scales, PASCAL VOC does not.
    """
    if scores.shape != truth.shape:
        raise DataError(f"Cannot rank: the map is {scores.shape} and the truth {truth.shape}; enlarge the map first.")
    if strange := sorted(set(np.unique(truth).tolist()) - {0, 1, VOID}):
        raise DataError(f"Two-channel average precision is for one class: the truth holds {strange}; wanted 0, 1 and 255 (void).")
    scored = truth != VOID
    foreground = truth[scored] == 1
    kept = (minmax_scaled(scores) if minmax else scores)[scored]
    # 1 - s is taken in the map's dtype: in float32 it makes ties, and ties change the value.
    stacked = np.concatenate([1 - kept, kept])
    value = average_precision(np.where(np.isnan(stacked), 0, stacked), np.concatenate([~foreground, foreground])).item()
    return 0.0 if np.isnan(value) else value
