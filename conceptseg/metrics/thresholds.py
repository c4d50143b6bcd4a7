"""How much of a number is the threshold: fixed rules, the best cut of a data set, and the best cut of each image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from conceptseg.errors import DataError
from conceptseg.metrics.definitions import Definition, Rows
from conceptseg.metrics.intervals import Interval, bootstrap_all, interval_of, resampled

_QUANTILE = re.compile(r"quantile([\d.]+)@")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """One rule of cutting and what it gives."""

    rule: str
    """ "mean", "otsu", "level0.5", "best of data set" or "best of each image"."""
    cut: str
    """The segmenter behind it; for the best of the data set the one that won; empty for the best of each image."""
    value: Interval


def quantile_of(segmenter: str) -> float | None:
    """The quantile that a segmenter cuts at, None for other rules.

    >>> quantile_of("quantile0.75@mask/bilinear")
    0.75
    """
    found = _QUANTILE.match(segmenter)
    return float(found[1]) if found else None


def sensitivity(
    definition: Definition, by_cut: Mapping[str, Rows], resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> list[Sensitivity]:
    """Every fixed rule, then the best quantile of the data set (chosen again in each resample), then of each image.

    by_cut: segmenter -> rows of one view, all of the same images. The two best rules see the truth: they are bounds, not methods.
    Raises DataError where the cuts do not share their images.
    """
    if len(differing := {rows.samples for rows in by_cut.values()}) > 1:
        sizes = sorted({len(samples) for samples in differing})
        raise DataError(f"Cannot compare cuts: they are scored on different images ({sizes}). Compute the missing rows first.")
    quantiles = [segmenter for segmenter in by_cut if quantile_of(segmenter) is not None]
    fixed = [segmenter for segmenter in by_cut if segmenter not in quantiles]
    values = bootstrap_all([(definition, by_cut[segmenter]) for segmenter in fixed], resamples, seed, level)
    found = [Sensitivity(s.partition("@")[0], s, v) for s, v in zip(fixed, values, strict=True)]
    if quantiles:
        found += [
            _best_of_dataset(definition, {s: by_cut[s] for s in quantiles}, resamples, seed, level),
            Sensitivity(
                "best of each image", "",
                bootstrap_all([(definition, best_cuts(definition, [by_cut[s] for s in quantiles]))], resamples, seed, level)[0],
            ),
        ]  # fmt: skip
    return found


def curve(
    definition: Definition, by_cut: Mapping[str, Rows], resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> list[tuple[float, Interval]]:
    """(quantile, value) for every quantile cut, by quantile."""
    ordered = sorted((q, s) for s in by_cut if (q := quantile_of(s)) is not None)
    values = bootstrap_all([(definition, by_cut[s]) for _, s in ordered], resamples, seed, level)
    return [(q, value) for (q, _), value in zip(ordered, values, strict=True)]


def best_cuts(definition: Definition, cuts: Sequence[Rows]) -> Rows:
    """For each image the rows of the cut under which that image alone scores best; an undefined value never wins."""
    values = np.stack([definition.finish(definition.statistics(rows)) for rows in cuts])
    signed = values if definition.higher_is_better else -values
    chosen = np.where(np.isnan(signed), -np.inf, signed).argmax(axis=0)
    first = cuts[0]

    def picked(tables: list[np.ndarray]) -> np.ndarray:
        return np.stack(tables)[chosen, np.arange(len(first))]

    return replace(
        first, inter=picked([c.inter for c in cuts]), pred=picked([c.pred for c in cuts]), label=picked([c.label for c in cuts]),
        pred_void=picked([c.pred_void for c in cuts]), correct=picked([c.correct for c in cuts]),
    )  # fmt: skip


def _best_of_dataset(definition: Definition, by_cut: Mapping[str, Rows], resamples: int, seed: int, level: float) -> Sensitivity:
    names = list(by_cut)
    sign = 1.0 if definition.higher_is_better else -1.0
    statistics = [definition.statistics(by_cut[name]) for name in names]
    drawn = sign * np.max(sign * np.stack(resampled([(definition, s) for s in statistics], resamples, seed)), axis=0)
    values = [definition.value(by_cut[name]) for name in names]
    best = int(np.argmax(sign * np.array(values)))
    n = len(by_cut[names[0]])
    return Sensitivity("best of data set", names[best], interval_of(values[best], drawn, n, level))
