"""Many methods against one baseline on the same images: difference, two paired tests, Holm's correction, win rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from conceptseg.errors import DataError
from conceptseg.metrics.definitions import Definition, Rows, Statistics
from conceptseg.metrics.intervals import (
    CELLS_AT_ONCE,
    Interval,
    interval_of,
    paired_statistics,
    resampled,
    summed_by,
    two_sided,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One method minus the baseline under one metric, over the images that both have. Every p is two-sided."""

    metric: str
    difference: Interval
    p_bootstrap: float
    """Twice the smaller tail of the paired bootstrap beyond zero."""
    p_sign_flip: float
    """Share of random exchanges of the two methods' answers, image by image, that differ at least as much."""
    p_bootstrap_holm: float
    p_sign_flip_holm: float
    """The same after Holm's correction over all methods compared under this metric."""
    wins: int
    """Images on which the method is better; images where either is undefined count for neither."""
    ties: int
    losses: int

    @property
    def win_rate(self) -> float:
        """Wins plus half the ties, over all images that were compared; NaN where there are none."""
        compared = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / compared if compared else float("nan")


def compare(
    definitions: Sequence[Definition],
    baseline: Rows,
    others: Mapping[str, Rows],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Mapping[str, str] | None = None,
) -> dict[str, list[Comparison]]:
    """Name of the other -> its comparison under each definition, in the order of `definitions`.

    clusters: sample -> label; then clusters, not images, are drawn and exchanged.

    Source: paired bootstrap, Efron and Tibshirani 1993; sign-flip (paired permutation) test, Fisher 1935; Holm 1979.
    Raises DataError where a method shares no image with the baseline.
    """
    pairs: dict[tuple[str, str], tuple[Statistics, Statistics, int]] = {}
    seen: dict[tuple[str, tuple[str, ...]], Statistics] = {}
    for definition in definitions:
        for name, rows in others.items():
            a, b, samples = paired_statistics(definition, rows, baseline)
            labels = None if clusters is None else _labels(clusters, samples)
            a, b = summed_by(a, labels), summed_by(b, labels)
            b = seen.setdefault((definition.name, tuple(samples)), b)
            pairs[definition.name, name] = a, b, len(samples)
    named = {d.name: d for d in definitions}
    drawn = resampled([(named[metric], side) for (metric, _), (a, b, _) in pairs.items() for side in (a, b)], resamples, seed)
    flipped = _sign_flip_ps([(named[metric], a, b) for (metric, _), (a, b, _) in pairs.items()], resamples, seed)
    found: dict[str, list[Comparison]] = {name: [] for name in others}
    for definition in definitions:
        keys = [(place, name) for place, (metric, name) in enumerate(pairs) if metric == definition.name]
        p_bootstrap = [
            two_sided(drawn[2 * i] - drawn[2 * i + 1]) if len(pairs[definition.name, n][0]) > 1 else np.nan for i, n in keys
        ]
        p_flip = [flipped[i] for i, _ in keys]
        corrected = zip(holm(p_bootstrap), holm(p_flip), strict=True)
        for (i, name), p1, p2, (h1, h2) in zip(keys, p_bootstrap, p_flip, corrected, strict=True):
            a, b, n = pairs[definition.name, name]
            value = float(definition.finish(a.sum(axis=0)) - definition.finish(b.sum(axis=0)))
            interval = interval_of(value, drawn[2 * i] - drawn[2 * i + 1], n, level, len(a))
            found[name].append(Comparison(definition.name, interval, p1, p2, h1, h2, *_wins(definition, others[name], baseline)))
    return found


def _labels(clusters: Mapping[str, str], samples: Sequence[str]) -> list[str]:
    if missing := [sample for sample in samples if sample not in clusters]:
        raise DataError(f"Cannot draw clusters: {len(missing)} samples belong to none, {missing[0]} the first.")
    return [clusters[sample] for sample in samples]


def _wins(definition: Definition, rows: Rows, baseline: Rows) -> tuple[int, int, int]:
    a, b, _ = paired_statistics(definition, rows, baseline)
    difference = definition.finish(a) - definition.finish(b)
    if not definition.higher_is_better:
        difference = -difference
    close = np.isclose(difference, 0, atol=1e-12)
    return int((difference[~close] > 0).sum()), int(close.sum()), int((difference[~close] < 0).sum())


def _sign_flip_ps(tables: Sequence[tuple[Definition, Statistics, Statistics]], resamples: int, seed: int) -> list[float]:
    """For pooled statistics: a's and b's images change places with chance 1/2, and both statistics are recomputed.

    With m the sum of the halves and d the half differences, a side is m + sum(s d) and the other m - sum(s d), s = ±1.
    """
    exceeding = [0] * len(tables)
    undefined = [False] * len(tables)
    observed = [abs(float(d.finish(a.sum(axis=0)) - d.finish(b.sum(axis=0)))) for d, a, b in tables]
    for n in sorted({len(a) for _, a, _ in tables}):
        members = [place for place, (_, a, _) in enumerate(tables) if len(a) == n]
        halves = [(tables[place][1] - tables[place][2]) / 2 for place in members]
        edges = np.cumsum([0, *(half.shape[1] for half in halves)])
        together = np.concatenate(halves, axis=1)
        for signs in _signs(n, resamples, seed):
            moved = signs @ together
            for i, place in enumerate(members):
                definition, a, b = tables[place]
                middle, shift = (a.sum(axis=0) + b.sum(axis=0)) / 2, moved[:, edges[i] : edges[i + 1]]
                values = definition.finish(middle + shift) - definition.finish(middle - shift)
                undefined[place] |= bool(np.isnan(values).any())
                # Rounding must not turn the observed arrangement itself into a miss.
                exceeding[place] += int((np.abs(values) >= observed[place] - 1e-12).sum())
    return [
        float("nan") if bad or np.isnan(seen) else (1 + count) / (1 + resamples)
        for count, bad, seen in zip(exceeding, undefined, observed, strict=True)
    ]


def _signs(n: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "chunk n"]]:
    generator = np.random.default_rng([seed, 1])  # not the stream that draws images
    step = max(1, CELLS_AT_ONCE // max(n, 1))
    for start in range(0, resamples, step):
        chunk = min(step, resamples - start)
        bits = np.unpackbits(generator.integers(0, 256, (chunk, -(-n // 8)), np.uint8), axis=1, count=n)
        yield 2.0 * bits - 1.0


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction of a family of p values; NaN stays NaN and is not counted.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]

    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    adjusted = [float("nan")] * len(ps)
    order = sorted((place for place, p in enumerate(ps) if not np.isnan(p)), key=lambda place: ps[place])
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * ps[place]))
        adjusted[place] = least
    return adjusted
