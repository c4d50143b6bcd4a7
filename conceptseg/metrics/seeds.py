"""How far a number moves with the seed of the noise, beside how far it moves with the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conceptseg.metrics.definitions import Definition, Rows


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric under several seeds."""

    values: Mapping[str, float]
    """Seed (or run) -> value in 0..1."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def standard_deviation(self) -> float:
        """Between seeds, with n - 1; NaN for fewer than two."""
        values = list(self.values.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")

    @property
    def range(self) -> float:
        values = list(self.values.values())
        return max(values) - min(values)


def seed_spread(definitions: Sequence[Definition], by_seed: Mapping[str, Rows]) -> dict[str, Spread]:
    """Metric -> its values under every seed, over the images that all seeds have."""
    common = set.intersection(*(set(rows.samples) for rows in by_seed.values()))
    shared = {
        seed: rows.at([place for place, sample in enumerate(rows.samples) if sample in common]) for seed, rows in by_seed.items()
    }
    return {d.name: Spread({seed: d.value(rows) for seed, rows in shared.items()}) for d in definitions}
