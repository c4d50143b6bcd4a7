"""Rows of one view and segmenter -> the numbers that are reported, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.intervals import Interval, bootstrap
from conceptseg.metrics.reported import metric


def summarise(records: Iterable[Mapping[str, Any]], names: Sequence[str], resamples: int, level: float) -> dict[str, Interval]:
    """The value comes from the torchmetrics object, the interval from a bootstrap over images; undefined metrics are left out.

    records: rows with status "ok" of one view and one segmenter.
    """
    listed = list(records)
    rows = Rows.from_records(listed)
    found: dict[str, Interval] = {}
    for name in names:
        measure = metric(name, rows.classes)
        measure.update(listed)
        value = float(measure.compute())
        if math.isnan(value):
            continue
        interval = bootstrap(DEFINITIONS[name], rows, resamples, level=level)
        assert math.isclose(value, interval.value, abs_tol=1e-9), f"{name}: two ways to form it disagree"
        found[name] = interval
    return found
