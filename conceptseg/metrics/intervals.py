"""Percentile bootstrap over images or clusters of images, for one method, for many at once, and for differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def bootstrap(
    definition: Definition,
    rows: Rows,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[str] | None = None,
) -> Interval:
    """Images are drawn with replacement; the whole statistic, not a mean of per-image values, is recomputed each time.

    clusters: one label an image; then whole clusters are drawn, which is wider where images of a cluster are alike.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, the percentile interval.
    """
    return bootstrap_all([(definition, rows)], resamples, seed, level, None if clusters is None else [clusters])[0]


def bootstrap_all(
    readings: Sequence[tuple[Definition, Rows]],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Sequence[str]] | None = None,
) -> list[Interval]:
    """`bootstrap` of every (definition, rows), drawing once for all that have equally many images: the costly part."""
    units, images = [], []
    for place, (definition, rows) in enumerate(readings):
        statistics = definition.statistics(rows)
        kept = entering(statistics)
        images.append(int(kept.sum()))
        labels = None if clusters is None else [c for c, k in zip(clusters[place], kept, strict=True) if k]
        units.append(summed_by(statistics[kept], labels))
    values = resampled([(d, u) for (d, _), u in zip(readings, units, strict=True)], resamples, seed)
    return [
        interval_of(definition.value(rows), drawn, n, level, len(unit))
        for (definition, rows), drawn, n, unit in zip(readings, values, images, units, strict=True)
    ]


def paired_difference(
    definition: Definition, rows_a: Rows, rows_b: Rows, resamples: int = 10_000, seed: int = 0, level: float = 0.95
) -> Difference:
    """The same images are drawn for a and b. Images that only one of them has are left out: n says how many are in."""
    a, b, _ = paired_statistics(definition, rows_a, rows_b)
    value = float(definition.finish(a.sum(axis=0)) - definition.finish(b.sum(axis=0)))
    values_a, values_b = resampled([(definition, a), (definition, b)], resamples, seed)
    interval = interval_of(value, values_a - values_b, len(a), level)
    return Difference(interval, float("nan") if len(a) < 2 else two_sided(values_a - values_b))


def paired_statistics(definition: Definition, rows_a: Rows, rows_b: Rows) -> tuple[Statistics, Statistics, list[str]]:
    """Statistics of both over the images that both have and that say something in either, and those images' names.

    Raises DataError where they share none.
    """
    common = sorted(set(rows_a.samples) & set(rows_b.samples))
    if not common:
        raise DataError(f"Cannot pair {len(rows_a)} rows with {len(rows_b)}: they share no sample.")
    a, b = (_statistics_of(definition, rows, common) for rows in (rows_a, rows_b))
    kept = entering(a) | entering(b)
    return a[kept], b[kept], [sample for sample, k in zip(common, kept, strict=True) if k]


def _statistics_of(definition: Definition, rows: Rows, samples: list[str]) -> Statistics:
    place = {sample: row for row, sample in enumerate(rows.samples)}
    return definition.statistics(rows)[[place[sample] for sample in samples]]


def summed_by(statistics: Statistics, clusters: Sequence[str] | None) -> Statistics:
    """Sums over each cluster, by label; the statistics as they are where there are no clusters."""
    if clusters is None:
        return statistics
    labels, place = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums = np.zeros((len(labels), statistics.shape[1]))
    np.add.at(sums, place, statistics)
    return sums


def resampled(
    tables: Sequence[tuple[Definition, Statistics]], resamples: int, seed: int
) -> list[Float[np.ndarray, " resamples"]]:
    """Return the values of every table under the same draws: tables of one length are resampled together, image by image."""
    if resamples < 1:
        raise ConfigError(f"Cannot bootstrap with resamples={resamples}; wanted 1 or more.")
    found: dict[int, list[np.ndarray]] = {place: [] for place in range(len(tables))}
    for n in sorted({len(statistics) for _, statistics in tables}):
        members = [place for place, (_, statistics) in enumerate(tables) if len(statistics) == n]
        # A table that stands for several readings, such as a baseline, is multiplied once.
        distinct = list({id(tables[place][1]): tables[place][1] for place in members}.values())
        edges = np.cumsum([0, *(table.shape[1] for table in distinct)])
        columns = {id(table): slice(*edges[i : i + 2]) for i, table in enumerate(distinct)}
        together = np.concatenate(distinct, axis=1)
        for weights in _weights(n, resamples, seed):
            sums = weights @ together
            for place in members:
                definition, statistics = tables[place]
                found[place].append(definition.finish(sums[:, columns[id(statistics)]]))
    return [np.concatenate(found[place]) for place in range(len(tables))]


def _weights(n: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "chunk n"]]:
    """How often each image is drawn: multinomial, by counting draws, which is ten times faster than drawing multinomials."""
    if n * resamples <= CELLS_AT_ONCE:
        yield _drawn_once(n, resamples, seed)  # a small table asks for the same draws for every metric and row
        return
    step = max(1, CELLS_AT_ONCE // max(n, 1))
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, step):
        yield _drawn(n, min(step, resamples - start), generator)


@lru_cache(maxsize=2)
def _drawn_once(n: int, resamples: int, seed: int) -> Float[np.ndarray, "resamples n"]:
    return _drawn(n, resamples, np.random.default_rng(seed))


def _drawn(n: int, chunk: int, generator: np.random.Generator) -> Float[np.ndarray, "chunk n"]:
    draws = generator.integers(n, size=(chunk, n)) if n else np.zeros((chunk, 0), np.int64)
    draws += n * np.arange(chunk)[:, None]
    return np.bincount(draws.ravel(), minlength=chunk * n).reshape(chunk, n).astype(np.float64)


def interval_of(
    value: float, values: Float[np.ndarray, " resamples"], n: int, level: float, units: int | None = None
) -> Interval:
    """Return the percentile interval of resampled values. units: the number of drawn units if those are not the n images."""
    if not 0 < level < 1:
        raise ConfigError(f"Cannot take a level={level} interval; wanted a share between 0 and 1, such as 0.95.")
    if (n if units is None else units) < 2:
        return Interval(value, float("nan"), float("nan"), n)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), n)


def two_sided(differences: Float[np.ndarray, " resamples"]) -> float:
    """Return p in 0..1: twice the smaller tail beyond zero, with the observed value counted, so never 0; NaN if undefined."""
    if np.isnan(differences).any():
        return float("nan")
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + differences.size))
