"""Tables: rows are evaluations, columns are metric definitions; what is missing is computed, then printed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptseg import __version__
from conceptseg.assemble import Evaluation, assemble
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.extractors.base import Extractor
from conceptseg.keys import canonical_json
from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.metrics.intervals import Interval
from conceptseg.report.results import Block, Column, Results, Row, Value
from conceptseg.run import Reading, carry_out, draw_sheet, interval_text, readings, write_results

log = logging.getLogger(__name__)

Compose = Callable[[Sequence[str]], dict[str, Any]]
"""Overrides -> a plain, resolved config."""


@dataclass(frozen=True, slots=True)
class _Done:
    evaluation: Evaluation
    readings: tuple[Reading, ...]


def columns_of(names: Sequence[str]) -> tuple[Column, ...]:
    """Raises ConfigError for a metric that is not defined."""
    for name in names:
        if name not in DEFINITIONS:
            raise ConfigError(f'columns: unknown metric "{name}". {did_you_mean(name, DEFINITIONS)}')
    return tuple(
        Column(d.name, d.label, d.percent, d.text, d.source, "released" if d.name.startswith("published_") else "standard")
        for d in (DEFINITIONS[name] for name in names)
    )


def compute_table(
    name: str, table: Mapping[str, Any], compose: Compose, extra: Sequence[str], folder: Path, command: str
) -> Results:
    """Compute the table's missing rows and return it, with a picture sheet at folder/sheet.png.

    `extra` are the user's own overrides, put after each row's; those of `extractor.` and `backbone@` concern only rows
    that have such a key.
    """
    columns = columns_of(table["columns"])
    done: dict[str, _Done] = {}
    blocks = []
    pictures: list[tuple[str, Evaluation, str, str]] = []
    report: Mapping[str, Any] = {}
    for block in table["blocks"]:
        rows = []
        first: Evaluation | None = None
        for row in block["rows"]:
            finished = _evaluated(
                [*block.get("overrides", []), *row["overrides"]], extra, compose, table["columns"], done, row["name"]
            )
            evaluation = finished.evaluation
            report = evaluation.config["report"]
            first = first or evaluation
            reading = _chosen(finished, row.get("view"), row.get("segmenter", block["segmenter"]), row["name"])
            rows.append(_row(row, evaluation, reading, row["overrides"]))
            if row.get("picture") and block.get("pictures", False) and reading.n:
                pictures.append((row["name"], evaluation, reading.view, reading.segmenter))
        assert first is not None, "a block has at least one row"
        count = len(first.dataset.keys())
        blocks.append(Block(block["name"], f"{block['data']}, {count} samples", first.protocol.label, block["text"], tuple(rows)))
    sheet = None
    if pictures:
        sheet = draw_sheet(folder / "sheet.png", pictures, report["pictures"])
    return Results(
        name, table["title"], command, __version__, columns, tuple(blocks), tuple(table.get("notes", ())), interval_text(report),
        None if sheet is None or sheet.is_absolute() or ".." in sheet.parts else sheet.as_posix(),
    )  # fmt: skip


def _evaluated(
    overrides: Sequence[str], extra: Sequence[str], compose: Compose, metrics: Sequence[str], done: dict[str, _Done], title: str
) -> _Done:
    config = compose(overrides)
    mine = [o for o in extra if _concerns(o, config)]
    if mine:
        config = compose([*overrides, *mine])
    place = canonical_json(config)
    if place not in done:
        evaluation = assemble(config)
        carry_out(evaluation, title)
        found = readings(evaluation, metrics)
        write_results(evaluation, found)
        done[place] = _Done(evaluation, tuple(found))
    return done[place]


def _concerns(override: str, config: Mapping[str, Any]) -> bool:
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


def _chosen(finished: _Done, view: str | None, segmenter: str, row: str) -> Reading:
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
        values={m: value_of(i) for m, i in reading.values.items()}, status="ok" if reading.n else "failed",
        note=note or ("" if reading.n else "no sample could be scored: see the rows of its run"),
        **_declared(evaluation.extractor),
    )  # fmt: skip


def _declared(extractor: Extractor) -> dict[str, str]:
    """What a method says of itself, as columns of its row."""
    return {"told": extractor.told, "trained_on": extractor.trained_on, "argmax": "yes" if extractor.comparable else "no"}


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
            values={m: value_of(i) for m, i in r.values.items()}, status="ok" if r.n else "failed",
            note=f"{r.waiting} samples are not computed yet" if r.waiting else "", **_declared(evaluation.extractor),
        )
        for r in found
    )  # fmt: skip
    data = f"{evaluation.dataset.name}, {len(evaluation.dataset.keys())} samples"
    block = Block(type(evaluation.extractor).__name__, data, evaluation.protocol.label, "", rows_)
    report = evaluation.config["report"]
    return Results(
        "evaluation", f"Run {evaluation.run_id}", command, __version__, columns_of(report["columns"]), (block,), (),
        interval_text(report),
    )  # fmt: skip
