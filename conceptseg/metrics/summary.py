"""Rows of one view and segmenter -> the numbers that are reported, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptseg.metrics.breakdowns import clusters_by_word
from conceptseg.metrics.definitions import Rows, definition_of
from conceptseg.metrics.intervals import Interval, bootstrap_all

DRAWN = ("images", "words")
"""Units that a bootstrap can draw."""


def summarise(
    records: Iterable[Mapping[str, Any]], names: Sequence[str], resamples: int, level: float, draw: str = "images"
) -> dict[str, Interval]:
    """Values with their bootstrap intervals, under the metrics' current names; undefined metrics are left out.

    The values are those of the torchmetrics objects in `reported`, from the same definitions. They are not formed by them here:
    loading torchmetrics takes three times as long as loading torch, more than printing a finished table may.

    records: rows with status "ok" of one view and one segmenter. draw: "images", or "words" for whole groups of images.
    """
    rows = Rows.from_records(records)
    asked = {one.name: one for one in (definition_of(name, "metrics") for name in names)}
    values = {name: definition.finish(definition.statistics(rows).sum(axis=0)) for name, definition in asked.items()}
    defined = [name for name in asked if not math.isnan(values[name])]
    clusters = list(clusters_by_word(rows).values()) if draw == "words" else None
    intervals = bootstrap_all(
        [(asked[name], rows) for name in defined], resamples, level=level,
        clusters=None if clusters is None else [clusters] * len(defined),
    )  # fmt: skip
    return dict(zip(defined, intervals, strict=True))
