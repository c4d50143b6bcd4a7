"""Rows of one view and segmenter -> the numbers that are reported, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptseg.metrics.breakdowns import clusters_by_word
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.intervals import Interval, bootstrap_all
from conceptseg.metrics.reported import metric

DRAWN = ("images", "words")
"""What a bootstrap may draw."""


def summarise(
    records: Iterable[Mapping[str, Any]], names: Sequence[str], resamples: int, level: float, draw: str = "images"
) -> dict[str, Interval]:
    """The value comes from the torchmetrics object, the interval from a bootstrap; undefined metrics are left out.

    records: rows with status "ok" of one view and one segmenter. draw: "images", or "words" for whole groups of images.
    """
    listed = list(records)
    rows = Rows.from_records(listed)
    values = {}
    for name in names:
        measure = metric(name, rows.classes)
        measure.update(listed)
        values[name] = float(measure.compute())
    defined = [name for name, value in values.items() if not math.isnan(value)]
    clusters = list(clusters_by_word(rows).values()) if draw == "words" else None
    intervals = bootstrap_all(
        [(DEFINITIONS[name], rows) for name in defined], resamples, level=level,
        clusters=None if clusters is None else [clusters] * len(defined),
    )  # fmt: skip
    for name, interval in zip(defined, intervals, strict=True):
        assert math.isclose(values[name], interval.value, abs_tol=1e-9), f"{name}: two ways to form it disagree"
    return dict(zip(defined, intervals, strict=True))
