"""Percentile bootstrap over images, for one method and for the difference of two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics.definitions import Definition, Rows, Statistics, entering

CELLS_AT_ONCE = 2**22
"""Resamples times images held in memory together: about 100 MB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value in 0..1 with its percentile bootstrap interval; NaN ends where n is 1 or some resample is undefined."""

    value: float
    low: float
    high: float
    n: int
    """Images that enter."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Interval of a minus b over the images that both have, and a two-sided bootstrap p of no difference."""

    interval: Interval
    p: float


def bootstrap(definition: Definition, rows: Rows, resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Images are drawn with replacement; the whole statistic, not a mean of per-image values, is formed anew each time.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, the percentile interval.
    """
    statistics = definition.statistics(rows)
    statistics = statistics[entering(statistics)]
    values = _resampled(definition, [statistics], resamples, seed)[0]
    return _interval(definition.value(rows), values, len(statistics), level)


def paired_difference(
    definition: Definition, rows_a: Rows, rows_b: Rows, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """The same images are drawn for a and b. Images that only one of them has are left out: n says how many are in."""
    common = sorted(set(rows_a.samples) & set(rows_b.samples))
    if not common:
        raise DataError(f"Cannot pair {len(rows_a)} rows with {len(rows_b)}: they share no sample.")
    a, b = (_statistics_of(definition, rows, common) for rows in (rows_a, rows_b))
    kept = entering(a) | entering(b)
    a, b = a[kept], b[kept]
    value = float(definition.finish(a.sum(axis=0)) - definition.finish(b.sum(axis=0)))
    values_a, values_b = _resampled(definition, [a, b], resamples, seed)
    differences = values_a - values_b
    interval = _interval(value, differences, len(a), level)
    return Difference(interval, float("nan") if np.isnan(interval.low) else _two_sided(differences))


def _statistics_of(definition: Definition, rows: Rows, samples: list[str]) -> Statistics:
    place = {sample: row for row, sample in enumerate(rows.samples)}
    return definition.statistics(rows)[[place[sample] for sample in samples]]


def _resampled(
    definition: Definition, tables: list[Statistics], resamples: int, seed: int
) -> Float[np.ndarray, "tables resamples"]:
    if resamples < 1:
        raise ConfigError(f"Cannot bootstrap with resamples={resamples}; wanted 1 or more.")
    chunks = [
        np.stack([definition.finish(weights @ statistics) for statistics in tables])
        for weights in _weights(len(tables[0]), resamples, seed)
    ]
    return np.concatenate(chunks, axis=-1)


def _weights(n: int, resamples: int, seed: int) -> Iterable[Float[np.ndarray, "chunk n"]]:
    """How often each image is drawn: multinomial, by counting draws, which is ten times faster than drawing multinomials."""
    if n * resamples <= CELLS_AT_ONCE:
        return (_drawn_once(n, resamples, seed),)  # a small table asks for the same draws for every metric and row
    step = max(1, CELLS_AT_ONCE // max(n, 1))
    generator = np.random.default_rng(seed)
    return (_drawn(n, min(step, resamples - start), generator) for start in range(0, resamples, step))


@lru_cache(maxsize=2)
def _drawn_once(n: int, resamples: int, seed: int) -> Float[np.ndarray, "resamples n"]:
    return _drawn(n, resamples, np.random.default_rng(seed))


def _drawn(n: int, chunk: int, generator: np.random.Generator) -> Float[np.ndarray, "chunk n"]:
    draws = generator.integers(n, size=(chunk, n)) if n else np.zeros((chunk, 0), np.int64)
    draws += n * np.arange(chunk)[:, None]
    return np.bincount(draws.ravel(), minlength=chunk * n).reshape(chunk, n).astype(np.float64)


def _interval(value: float, values: Float[np.ndarray, " resamples"], n: int, level: float) -> Interval:
    if not 0 < level < 1:
        raise ConfigError(f"Cannot take a level={level} interval; wanted a share between 0 and 1, such as 0.95.")
    if n < 2:
        return Interval(value, float("nan"), float("nan"), n)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)


def _two_sided(differences: Float[np.ndarray, " resamples"]) -> float:
    """Twice the smaller tail beyond zero, the observed value counted in, so that p is never 0."""
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + differences.size))
