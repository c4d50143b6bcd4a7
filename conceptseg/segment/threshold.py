"""Cuts through one map: what counts as foreground."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float


def above_mean(scores: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the pixels strictly above the map's own mean: the cut of ConceptAttention's ImageNet protocol."""
    return scores > scores.mean(dtype=scores.dtype)


def above_level(scores: Float[np.ndarray, "H W"], level: float) -> Bool[np.ndarray, "H W"]:
    """Return the pixels strictly above `level`, 0..1, of the way from the map's least to its greatest value.

    A constant map has no foreground.
    """
    low, high = scores.min(), scores.max()
    return scores > low + level * (high - low)


def from_share(scores: Float[np.ndarray, "H W"], share: float) -> Bool[np.ndarray, "H W"]:
    """Return the pixels with at least `share`, 0..1, of the map's greatest value: DAAM's rule; 0.4 is best in its paper.

    Source: Tang et al. 2023, arXiv:2210.04885; castorini/daam at 09564e0, daam/heatmap.py.
    """
    return scores >= share * scores.max()


def above_quantile(scores: Float[np.ndarray, "H W"], quantile: float) -> Bool[np.ndarray, "H W"]:
    """Return the pixels strictly above the map's own quantile, 0..1.

    About 1 - `quantile` of the pixels are foreground, fewer with ties.
    """
    return scores > np.quantile(scores, quantile)


def above_otsu(scores: Float[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Return the pixels above the cut that maximises the variance between the two sides, over 256 bins (Otsu 1979)."""
    low, high = float(scores.min()), float(scores.max())
    if high <= low:
        return np.zeros_like(scores, dtype=bool)
    counts, edges = np.histogram(scores, bins=256, range=(low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts)[:-1].astype(np.float64)
    total = float(counts.sum())
    mass = np.cumsum(counts * centres)[:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = weight * (total - weight) * (mass / weight - ((counts * centres).sum() - mass) / (total - weight)) ** 2
    return scores > edges[1:-1][int(np.nanargmax(between))]
