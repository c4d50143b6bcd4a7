"""A run whose views span layers or noise levels: its sweep, and the view that development samples choose."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from conceptseg.evaluation.assemble import Evaluation
from conceptseg.files import write_atomically
from conceptseg.metrics.definitions import Rows, definition_of
from conceptseg.metrics.intervals import Interval, bootstrap
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column
from conceptseg.report.results import Results
from conceptseg.report.selection import headline_columns
from conceptseg.report.sweeps import Numbers, Sweep, SweptView, draw_curves, draw_heat_map, shown_kinds
from conceptseg.saliency.views import axes_of

LEAST = 2
"""Samples that either part of the split needs."""


def sweeps_of(table: Results, block: Block) -> tuple[Sweep, ...]:
    """The sweeps of a table's block, one for each run whose rows differ only in layers or noise levels; mIoU and mAP of them."""
    columns = [column for column in headline_columns(table) if column.kind == "standard" and column.percent]
    grouped: dict[tuple[str, str], list[TableRow]] = {}
    for row in block.rows:
        if row.status == "ok" and row.x is None:
            grouped.setdefault((row.run_id, row.segmenter), []).append(row)
    found: dict[str, Sweep] = {}
    for (run, segmenter), rows in grouped.items():
        placed = {row.view: axes_of(row.view) for row in rows}
        if run in found or not _spans(placed.values()):
            continue  # a run's further segmenters read the same maps
        drawn = [c for c in columns if any(c.name in row.values for row in rows)]
        names = shown_kinds([kind for kind, _, _ in placed.values()])
        views = []
        for row in rows:
            kind, layers, timesteps = placed[row.view]
            numbers = {column.name: _numbers(row, column) for column in drawn if column.name in row.values}
            views.append(SweptView(names[kind], layers, timesteps, numbers))
        title = f"{rows[0].extractor}, {segmenter}, n={max(row.n for row in rows)}"
        if drawn:
            found[run] = Sweep(title, tuple(views), {column.name: column.heading for column in drawn})
    return tuple(found.values())


def _numbers(row: TableRow, column: Column) -> Numbers:
    value = row.values[column.name]
    low, high = (math.nan if end is None else end for end in (value.low, value.high))
    return value.value, low, high


def _spans(placed: Iterable[tuple[str, str, str]]) -> bool:
    """Whether two views differ only in layers or noise levels."""
    kinds = [kind for kind, _, _ in set(placed)]
    return len(kinds) > len(set(kinds))


# ---------------------------------------------------------------- which view is best


@dataclass(frozen=True, slots=True)
class Choice:
    """The view that is best by one metric on the development samples, and its number on the others."""

    metric: str
    view: str
    development: float
    n_development: int
    rest: Interval

    def sentence(self) -> str:
        of = definition_of(self.metric, "report.columns")
        ends = "" if math.isnan(self.rest.low) else f" [{100 * self.rest.low:.1f}, {100 * self.rest.high:.1f}]"
        return (
            f"Best view by {of.label}: {self.view}, chosen on {self.n_development} development samples "
            f"({100 * self.development:.1f}); on the {self.rest.n} others it has {100 * self.rest.value:.1f}{ends}."
        )


def in_development(sample: str, share: float, seed: int) -> bool:
    """Whether a sample is one on which choices are made: by its key alone, so that a run that is extended moves none."""
    drawn = hashlib.sha256(f"{seed}:{sample}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") < share * 2**64


def choose_views(
    rows: Mapping[str, Rows], metrics: Sequence[str], share: float, seed: int, resamples: int, level: float
) -> list[Choice]:
    """For each metric the best of the views on development samples, with its number on the rest.

    [] where either part is too small. rows: view -> its scored rows; only samples that all views scored enter. share: of
    development samples, in 0..1.
    """
    held = set.intersection(*(set(one.samples) for one in rows.values()))
    development = {sample for sample in held if in_development(sample, share, seed)}
    if min(len(development), len(held - development)) < LEAST:
        return []
    found = []
    for definition in (definition_of(name, "report.columns") for name in metrics):
        values = {view: definition.value(_of(one, development)) for view, one in rows.items()}
        values = {view: value for view, value in values.items() if not math.isnan(value)}
        if values:
            view = max(values, key=lambda name: values[name])
            rest = bootstrap(definition, _of(rows[view], held - development), resamples, level=level)
            found.append(Choice(definition.name, view, values[view], len(development), rest))
    return found


def _of(rows: Rows, samples: set[str]) -> Rows:
    return rows.at([place for place, sample in enumerate(rows.samples) if sample in samples])


def with_sweep(evaluation: Evaluation, table: Results) -> Results:
    """The table of an evaluation with a sweep's best views as remarks; the table itself where its views are no sweep."""
    (block,) = table.blocks
    if not (sweeps := sweeps_of(table, block)):
        return table
    choices, report = _choices(evaluation, block, sweeps[0]), evaluation.config["report"]
    remarks = tuple(choice.sentence() for choice in choices) or (
        f"No best view is named: choosing one and reporting its number take {LEAST} samples each. Add samples, or set "
        f"report.development (now {report['development']:g}).",
    )
    return replace(table, blocks=(replace(block, remarks=remarks),))


def write_sweep(evaluation: Evaluation, table: Results) -> list[Path]:
    """Write heat_map.png, curves.png and sweep.json to the run's folder where its views are a sweep; the files' paths.

    sweep.json holds how samples were split and the choices.
    """
    (block,) = table.blocks
    folder, report = evaluation.store.folder, evaluation.config["report"]
    if not (sweeps := sweeps_of(table, block)):
        return []
    draw_heat_map(sweeps[0], folder / "heat_map.png")
    files = [folder / "heat_map.png"]
    if draw_curves(sweeps[0], folder / "curves.png"):
        files.append(folder / "curves.png")
    body = {
        "split": {"development": report["development"], "split_seed": report["split_seed"], "by": "sample key"},
        "choices": [asdict(choice) for choice in _choices(evaluation, block, sweeps[0])],
    }
    write_atomically(folder / "sweep.json", (json.dumps(body, indent=1) + "\n").encode())
    return [*files, folder / "sweep.json"]


def _choices(evaluation: Evaluation, block: Block, sweep: Sweep) -> list[Choice]:
    """Choices among a block's views under its first segmenter, over the samples that are asked for now."""
    segmenter = next(row.segmenter for row in block.rows if row.status == "ok")
    records: dict[str, list[Mapping[str, Any]]] = {
        row.view: [] for row in block.rows if row.segmenter == segmenter and row.status == "ok"
    }
    wanted = set(evaluation.dataset.keys())
    for key, row in evaluation.store.rows().items():
        if key.segmenter == segmenter and key.view in records and key.sample in wanted and row["status"] == "ok":
            records[key.view].append(row)
    rows, report = {view: Rows.from_records(held) for view, held in records.items()}, evaluation.config["report"]
    return choose_views(
        rows, tuple(sweep.metrics), report["development"], report["split_seed"], report["resamples"], report["level"]
    )
