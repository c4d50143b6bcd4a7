"""Metrics that installed packages add: the entry point group `conceptseg.metrics`, and numbers that are measured from maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from conceptseg.entry_points import METRICS, entry_points
from conceptseg.errors import ConfigError
from conceptseg.types import Task

Measure = Callable[[Task, Float[np.ndarray, "C H W"], UInt8[np.ndarray, "H W"]], float | None]


@dataclass(frozen=True, slots=True)
class MapMetric:
    """A number per image that counts of pixels can't give, reported as its mean over the images that have one.

    A protocol measures it where `protocol.measures` names it, while the maps are at hand, and rows keep it.
    """

    name: str
    label: str
    """Column head."""
    version: int
    """Raised whenever the numbers change; part of the run id."""
    measure: Measure
    """(task, scores, labels) -> the number, or None where it is undefined. task.truth [H W]: class indices, 255 void; scores: the
    enlarged maps, one channel per word of task.concepts, larger where the word is; labels: class indices that were predicted."""
    text: str
    """One sentence, printed beside every table."""
    source: str
    percent: bool = True
    """Printed times 100."""
    higher_is_better: bool = True
    asks_again: bool = False
    """Whether the number asks the method's classifier again (see `metrics.perturbation`), so that `measure` is never called."""


def names() -> list[str]:
    """Names of the metrics that installed packages add."""
    return sorted(entry_points(METRICS).names)


def installed(name: str) -> Any:
    """The object of the entry point of that name, a `Definition` or a `MapMetric`; None where there is none.

    Raises ConfigError where its package can't be imported, or names its metric otherwise.
    """
    found = list(entry_points(METRICS).select(name=name))
    if not found:
        return None
    try:
        metric = found[0].load()
    except Exception as error:
        raise ConfigError(
            f'the metric "{name}" can\'t be loaded from {found[0].value}: {type(error).__name__}: {error}. '
            "Mend or uninstall the package that adds it."
        ) from error
    if getattr(metric, "name", None) != name:
        raise ConfigError(
            f'the entry point "{name}" of {METRICS} gives {found[0].value}, which is named "{getattr(metric, "name", None)}". '
            "Give both one name."
        )
    return metric
