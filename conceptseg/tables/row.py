"""Compute one row of a table: compose its settings, evaluate, choose the reading, state its costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conceptseg.errors import ConfigError, Interrupted, did_you_mean
from conceptseg.evaluation.assemble import Evaluation, assemble
from conceptseg.evaluation.carry_out import Series, carry_out
from conceptseg.evaluation.readings import Reading, readings, write_readings
from conceptseg.extractors.base import WITHOUT_WORDS
from conceptseg.keys import canonical_json
from conceptseg.metrics.intervals import Interval
from conceptseg.report.columns import Column, Value
from conceptseg.store.cost import read_cost

Compose = Callable[[Sequence[str]], dict[str, Any]]
"""Overrides -> a plain, resolved config."""


@dataclass(frozen=True, slots=True)
class Done:
    """An evaluation that was carried out."""

    evaluation: Evaluation
    readings: tuple[Reading, ...]


class Evaluations:
    """The evaluations behind a table: each configuration is carried out once.

    extra: the user's own overrides, put after each row's; those of `extractor.` and `backbone@` concern only rows that have such
    a key.
    """

    def __init__(self, compose: Compose, extra: Sequence[str]) -> None:
        self.compose, self.extra = compose, extra
        self.series: Series | None = None
        self._done: dict[str, Done] = {}
        self._typed: dict[str, list[str]] = {}

    def plan(self, configs: Iterable[Mapping[str, Any]]) -> None:
        """Count the runs to come, so that each can say which of how many it is."""
        self.series = Series(len({canonical_json(config) for config in configs}))

    def config(self, overrides: Sequence[str]) -> dict[str, Any]:
        """A row's config with those of the user's overrides that concern it."""
        mine = list(self.extra)
        if any(o.lstrip("+~").startswith(("backbone@", "extractor.")) for o in mine):  # others concern every row
            config = self.compose(overrides)
            mine = [o for o in mine if concerns(o, config)]
        config = self.compose([*overrides, *mine])
        self._typed.setdefault(canonical_json(config), [*overrides, *mine])
        return config

    def carried_out(self, config: dict[str, Any], metrics: Sequence[str], title: str) -> Done:
        """Compute what is missing."""
        place = canonical_json(config)
        if place not in self._done:
            evaluation = assemble(config, in_table=True, overrides=self._typed.get(place))
            try:
                carry_out(evaluation, title, self.series)
            except Interrupted as stop:
                earlier = {done.evaluation.run_id: done.evaluation for done in self._done.values()}
                others = [e for run, e in earlier.items() if run != evaluation.run_id]
                raise Interrupted(stop.kept + sum(len(e.store.rows()) for e in others), stop.code) from None
            found = readings(evaluation, metrics)
            write_readings(evaluation, found)
            self._done[place] = Done(evaluation, tuple(found))
        return self._done[place]


def concerns(override: str, config: Mapping[str, Any]) -> bool:
    key = override.lstrip("+~").split("=", 1)[0]
    if key.startswith("backbone@"):
        return "backbone" in config["extractor"]
    if key.startswith("extractor."):
        at: Any = config
        for part in key.split("."):
            if not isinstance(at, Mapping) or part not in at:
                return False
            at = at[part]
    return True


def chosen(finished: Done, view: str | None, segmenter: str, row: str) -> Reading:
    names = list(dict.fromkeys(r.name for r in finished.readings))
    wanted = view or names[0]
    for reading in finished.readings:
        if reading.name == wanted and reading.segmenter == segmenter:
            return reading
    if wanted not in names:
        raise ConfigError(f'table row "{row}": unknown view "{wanted}". {did_you_mean(wanted, names)}')
    raise ConfigError(
        f'table row "{row}": unknown segmenter "{segmenter}". {did_you_mean(segmenter, {r.segmenter for r in finished.readings})}'
    )


def declared(evaluation: Evaluation) -> dict[str, Any]:
    """Return the columns that a method declares about itself, and the class names that its protocol gives it."""
    extractor = evaluation.extractor
    names = "none" if extractor.told in WITHOUT_WORDS else evaluation.protocol.names.label
    return {
        "told": extractor.told, "trained_on": extractor.trained_on, "argmax": "yes" if extractor.comparable else "no",
        "names": names,
    }  # fmt: skip


COSTS = (
    Column(
        "cost_seconds", "s/image", False, "Wall time of an image, model and scoring, of the process that computed it.", "", "cost"
    ),
    Column("cost_memory", "peak GB", False, "Most memory a process held: of the accelerator, else resident.", "", "cost"),
    Column(
        "cost_passes",
        "passes/image",
        False,
        "Calls of the backbone's network over images; several images share a call.",
        "",
        "cost",
    ),
)


def costs_of(evaluation: Evaluation) -> dict[str, Value]:
    """Return the recorded cost of the run if report.costs is set. All views of a run share it."""
    cost = read_cost(evaluation.store.folder) if evaluation.config["report"]["costs"] else None
    if cost is None or not cost.images:
        return {}
    passes = cost.passes_per_image
    found = {"cost_seconds": cost.seconds / cost.images, "cost_memory": cost.peak_bytes / 1e9}
    found |= {} if passes is None else {"cost_passes": passes}
    return {name: Value(number, None, None, None) for name, number in found.items()}


def value_of(interval: Interval) -> Value:
    """A printable number; with one image there is no interval."""
    alone = interval.n < 2
    return Value(interval.value, None if alone else interval.low, None if alone else interval.high, interval.n)
