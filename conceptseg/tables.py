"""Tables: rows are evaluations, columns are metric definitions; what is missing is computed, then printed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conceptseg import __version__
from conceptseg.assemble import Evaluation, assemble
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.extractors.base import Extractor
from conceptseg.keys import canonical_json
from conceptseg.metrics.breakdowns import clusters_by_word
from conceptseg.metrics.comparisons import compare
from conceptseg.metrics.definitions import Rows, definition_of
from conceptseg.metrics.intervals import Interval
from conceptseg.report.results import Block, Column, Results, Row, Value
from conceptseg.run import Reading, carry_out, draw_sheet, interval_text, readings, scored, write_results
from conceptseg.store.cost import read_cost

log = logging.getLogger(__name__)

Compose = Callable[[Sequence[str]], dict[str, Any]]
"""Overrides -> a plain, resolved config."""


@dataclass(frozen=True, slots=True)
class Done:
    """An evaluation that was carried out."""

    evaluation: Evaluation
    readings: tuple[Reading, ...]


def columns_of(names: Sequence[str]) -> tuple[Column, ...]:
    """Raises ConfigError for a metric that is not defined."""
    return tuple(
        Column(d.name, d.label, d.percent, d.text, d.source, "released" if d.name.startswith("published_") else "standard")
        for d in (definition_of(name, "columns") for name in names)
    )


def compute_table(
    name: str, table: Mapping[str, Any], compose: Compose, extra: Sequence[str], folder: Path, command: str
) -> Results:
    """Compute the table's missing rows and return it, with a picture sheet at folder/sheet.png.

    `extra` are the user's own overrides, put after each row's; those of `extractor.` and `backbone@` concern only rows
    that have such a key.
    """
    columns: tuple[Column, ...] = columns_of(table["columns"])
    against: Sequence[Mapping[str, str]] = table.get("against", ())
    columns += tuple(difference_column(other, table["columns"]) for other in against)
    done: dict[str, Done] = {}
    blocks = []
    pictures: list[tuple[str, Evaluation, str, str]] = []
    report: Mapping[str, Any] = {}
    for block in table["blocks"]:
        rows = []
        read: dict[str, tuple[Evaluation, Reading]] = {}
        first: Evaluation | None = None
        for row in block["rows"]:
            config = composed([*block.get("overrides", []), *row["overrides"]], extra, compose)
            finished = evaluated(config, table["columns"], done, row["name"])
            evaluation = finished.evaluation
            report = evaluation.config["report"]
            first = first or evaluation
            reading = chosen(finished, row.get("view"), row.get("segmenter", block["segmenter"]), row["name"])
            rows.append(_row(row, evaluation, reading, row["overrides"]))
            read[row["name"]] = evaluation, reading
            if row.get("picture") and block.get("pictures", False) and reading.n:
                pictures.append((row["name"], evaluation, reading.view, reading.segmenter))
        assert first is not None, "a block has at least one row"
        held = {name: scored(e, r) for name, (e, r) in read.items() if r.n} if against else {}
        for other in against:
            if other["row"] not in read:
                nearest = did_you_mean(other["row"], read)
                raise ConfigError(f'table.against.row: block "{block["name"]}" has no row "{other["row"]}". {nearest}')
            found = differences(held, other, report)
            rows = [replace(row, values={**row.values, **found.get(row.name, {})}) for row in rows]
        count = len(first.dataset.keys())
        blocks.append(Block(block["name"], f"{block['data']}, {count} samples", first.protocol.label, block["text"], tuple(rows)))
    sheet = None
    if pictures:
        sheet = draw_sheet(folder / "sheet.png", pictures, report["pictures"])
    if report["costs"]:
        columns += COSTS
    return Results(
        name, table["title"], command, __version__, columns, tuple(blocks), tuple(table.get("notes", ())), interval_text(report),
        None if sheet is None or sheet.is_absolute() or ".." in sheet.parts else sheet.as_posix(),
    )  # fmt: skip


def difference_column(against: Mapping[str, str], columns: Sequence[str]) -> Column:
    """The column for an entry (row, metric) of a sheet's `against`. Raises ConfigError for a metric the table does not print."""
    metric = against["metric"]
    if metric not in columns:
        raise ConfigError(f'table.against.metric: the table has no column "{metric}". {did_you_mean(metric, columns)}')
    of = definition_of(metric, "table.against.metric")
    text = (
        f"{of.label} less that of {against['row']}, image by image: an interval without 0 says that the two differ measurably "
        "(each row for itself, no correction for many rows)."
    )
    return Column(
        _difference(against), f"{of.label} over {against['row']}", of.percent, text,
        "paired bootstrap, Efron and Tibshirani 1993", "difference",
    )  # fmt: skip


def differences(held: Mapping[str, Rows], against: Mapping[str, str], report: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """Row name -> its paired difference to the row that the entry `against` names, under the difference's column.

    held: scored rows behind every row of a block that has some. Rows that share no sample with that row have no difference.
    """
    if (baseline := held.get(against["row"])) is None:
        return {}
    rows = {
        name: mine
        for name, mine in held.items()
        if name != against["row"] and not set(mine.samples).isdisjoint(baseline.samples)
    }  # fmt: skip
    clusters = clusters_by_word(baseline) if report["draw"] == "words" else None
    of = definition_of(against["metric"], "table.against.metric")
    compared = compare([of], baseline, rows, report["resamples"], level=report["level"], clusters=clusters)
    return {
        name: {_difference(against): value_of(comparison.difference)}
        for name, (comparison,) in compared.items()
        if math.isfinite(comparison.difference.value)
    }


def _difference(against: Mapping[str, str]) -> str:
    return f"{against['metric']} over {against['row']}"


def composed(overrides: Sequence[str], extra: Sequence[str], compose: Compose) -> dict[str, Any]:
    """A row's config with those of the user's overrides that concern it."""
    if not any(o.lstrip("+~").startswith(("backbone@", "extractor.")) for o in extra):  # these concern every row
        return compose([*overrides, *extra])
    config = compose(overrides)
    mine = [o for o in extra if concerns(o, config)]
    return compose([*overrides, *mine]) if mine else config


def evaluated(config: dict[str, Any], metrics: Sequence[str], done: dict[str, Done], title: str) -> Done:
    """Compute what is missing, once for every config of a table."""
    place = canonical_json(config)
    if place not in done:
        evaluation = assemble(config)
        carry_out(evaluation, title)
        found = readings(evaluation, metrics)
        write_results(evaluation, found)
        done[place] = Done(evaluation, tuple(found))
    return done[place]


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


def _row(row: Mapping[str, Any], evaluation: Evaluation, reading: Reading, overrides: Sequence[str]) -> Row:
    named = dict(o.split("=", 1) for o in overrides if "=" in o)
    backbone = getattr(getattr(evaluation.extractor, "backbone", None), "checkpoint", None)
    note = row.get("note", "")
    if reading.waiting:
        note = (note + " " if note else "") + f"{reading.waiting} samples are not computed yet"
    extractor = named.get("extractor", type(evaluation.extractor).__name__)
    return Row(
        name=row["name"], group=row.get("group", "methods"), extractor=extractor,
        backbone=backbone.path if backbone else None, provenance=evaluation.extractor.provenance, run_id=evaluation.run_id,
        view=reading.view, segmenter=reading.segmenter, n=reading.n, excluded=reading.excluded, failed=reading.failed,
        values={m: value_of(i) for m, i in reading.values.items()} | costs_of(evaluation), status="ok" if reading.n else "failed",
        note=note or ("" if reading.n else "no sample could be scored: see the rows of its run"),
        **declared(evaluation.extractor),
    )  # fmt: skip


def declared(extractor: Extractor) -> dict[str, Any]:
    """What a method says of itself, as columns of its row."""
    return {"told": extractor.told, "trained_on": extractor.trained_on, "argmax": "yes" if extractor.comparable else "no"}


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
    """What the run recorded of its cost, where report.costs asks for it; all views of a run share it."""
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


def single_table(evaluation: Evaluation, found: Sequence[Reading], command: str) -> Results:
    """One evaluation as a table: a row for each view and segmenter."""
    if not any(r.n for r in found):
        failed = max(r.failed for r in found)
        rows = [r for r in evaluation.store.rows().values() if r["status"] in ("failed", "excluded")]
        last = f" The last: {rows[-1]['sample']}: {rows[-1]['error']}" if rows else ""
        raise DataError(
            f"no sample could be scored: {failed} failed, {max(r.excluded for r in found)} were left out by the protocol.{last}"
        )
    many = len({r.segmenter for r in found}) > 1
    rows_ = tuple(
        Row(
            name=f"{r.name}, {r.segmenter}" if many else r.name,
            group="methods" if evaluation.extractor.provenance != "control" else "controls",
            extractor=type(evaluation.extractor).__name__, backbone=None, provenance=evaluation.extractor.provenance,
            run_id=evaluation.run_id, view=r.view, segmenter=r.segmenter, n=r.n, excluded=r.excluded, failed=r.failed,
            values={m: value_of(i) for m, i in r.values.items()} | costs_of(evaluation), status="ok" if r.n else "failed",
            note=f"{r.waiting} samples are not computed yet" if r.waiting else "", **declared(evaluation.extractor),
        )
        for r in found
    )  # fmt: skip
    data = f"{evaluation.dataset.name}, {len(evaluation.dataset.keys())} samples"
    block = Block(type(evaluation.extractor).__name__, data, evaluation.protocol.label, "", rows_)
    report = evaluation.config["report"]
    columns = columns_of(report["columns"]) + (COSTS if report["costs"] else ())
    return Results(
        "evaluation", f"Run {evaluation.run_id}", command, __version__, columns, (block,), (), interval_text(report)
    )  # fmt: skip
