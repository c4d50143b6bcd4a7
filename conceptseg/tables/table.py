"""Compute tables: rows are evaluations, columns are metrics; only missing rows are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conceptseg import __version__
from conceptseg.errors import DataError
from conceptseg.evaluation.assemble import Evaluation
from conceptseg.evaluation.readings import Reading, interval_text, nothing_scored, scored
from conceptseg.metrics.breakdowns import clusters_by_word
from conceptseg.metrics.comparisons import compare
from conceptseg.metrics.definitions import Definition, Rows, definition_of
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results
from conceptseg.tables.pictures import draw_sheet
from conceptseg.tables.row import COSTS, Compose, Evaluations, chosen, costs_of, declared, value_of
from conceptseg.tables.sheet import Against, RowSheet, TableSheet

STANDS = "†"
"""Behind a paired difference of a row that its table expects to be worse than another, and that is not measurably so."""


def columns_of(names: Sequence[str]) -> tuple[Column, ...]:
    """Raises ConfigError for a metric that is not defined."""
    return tuple(
        Column(
            d.name,
            d.label.removeprefix("released "),
            d.percent,
            d.text,
            d.source,
            "released" if d.name.startswith("released_") else "standard",
            higher_is_better=d.higher_is_better,
        )
        for d in (definition_of(name, "columns") for name in names)
    )


def compute_table(name: str, table: TableSheet, compose: Compose, extra: Sequence[str], folder: Path, command: str) -> Results:
    """Compute the table's missing rows and return it, with a picture sheet at folder/sheet.png.

    `extra` are the user's own overrides, put after each row's; those of `extractor.` and `backbone@` concern only rows
    that have such a key.
    """
    evaluations = Evaluations(compose, extra)
    configs = {(b.name, r.name): evaluations.config([*b.overrides, *r.overrides]) for b in table.blocks for r in b.rows}
    evaluations.plan(configs.values())
    blocks = []
    pictures: list[tuple[str, Evaluation, str, str]] = []
    report: Mapping[str, Any] = {}
    for block in table.blocks:
        rows = []
        read: dict[str, tuple[Evaluation, Reading]] = {}
        for row in block.rows:
            finished = evaluations.carried_out(configs[block.name, row.name], table.columns, f"{row.name} ({block.name})")
            evaluation = finished.evaluation
            report = evaluation.config["report"]
            reading = chosen(finished, row.view, row.segmenter or block.segmenter, row.name)
            rows.append(_row(row, evaluation, reading))
            read[row.name] = evaluation, reading
            if row.picture and block.pictures and reading.n:
                pictures.append((row.name, evaluation, reading.view, reading.segmenter))
        held = {name: scored(e, r) for name, (e, r) in read.items() if r.n} if table.against else {}
        for against in table.against:
            found = differences(held, against, report)
            rows = [replace(row, values={**row.values, **found.get(row.name, {})}) for row in rows]
        first, _ = next(iter(read.values()))
        count = len(first.dataset.keys())
        blocks.append(Block(block.name, f"{block.data}, {count} samples", first.protocol.label, block.text, tuple(rows)))
    sheet = None
    if pictures:
        sheet = draw_sheet(folder / "sheet.png", pictures, report["pictures"])
    columns = columns_of_table(table, report)
    return Results(
        name, table.title, command, __version__, columns, tuple(blocks), table.notes, interval_text(report),
        None if sheet is None or sheet.is_absolute() or ".." in sheet.parts else sheet.as_posix(),
    )  # fmt: skip


def difference_column(against: Against) -> Column:
    """The column for an entry of a sheet's `against`. Raises ConfigError for a metric that is not defined."""
    of = definition_of(against.metric, "table.against.metric")
    text = (
        f"{of.label} less that of {against.row}, image by image: an interval without 0 says that the two differ measurably "
        "(each row for itself, no correction for many rows)."
    )
    return Column(
        _difference(against), f"{of.label} over {against.row}", of.percent, text,
        "paired bootstrap, Efron and Tibshirani 1993", "difference",
    )  # fmt: skip


def differences(held: Mapping[str, Rows], against: Against, report: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """Row name -> its paired difference to the row that the entry `against` names, under the difference's column.

    held: scored rows behind every row of a block that has some. Rows that share no sample with that row have no difference.
    """
    if (baseline := held.get(against.row)) is None:
        return {}
    rows = {
        name: mine
        for name, mine in held.items()
        if name != against.row and not set(mine.samples).isdisjoint(baseline.samples)
    }  # fmt: skip
    clusters = clusters_by_word(baseline) if report["draw"] == "words" else None
    of = definition_of(against.metric, "table.against.metric")
    compared = compare([of], baseline, rows, report["resamples"], level=report["level"], clusters=clusters)
    return {
        name: {_difference(against): _marked(value_of(comparison.difference), against, of)}
        for name, (comparison,) in compared.items()
        if math.isfinite(comparison.difference.value)
    }


def _marked(value: Value, against: Against, of: Definition) -> Value:
    """The value with `STANDS` behind it where the row was to be measurably worse and is not."""
    nearest_to_zero = value.high if of.higher_is_better else value.low
    worse = nearest_to_zero is not None and (nearest_to_zero < 0 if of.higher_is_better else nearest_to_zero > 0)
    return value if worse or not against.falls else replace(value, mark=STANDS)


def _difference(against: Against) -> str:
    return f"{against.metric} over {against.row}"


def _row(row: RowSheet, evaluation: Evaluation, reading: Reading) -> TableRow:
    named = dict(o.split("=", 1) for o in row.overrides if "=" in o)
    backbone = getattr(getattr(evaluation.extractor, "backbone", None), "checkpoint", None)
    note = row.note
    if reading.waiting:
        note = (note + " " if note else "") + f"{reading.waiting} samples are not computed yet"
    extractor = named.get("extractor", type(evaluation.extractor).__name__)
    return TableRow(
        name=row.name, group=row.group, extractor=extractor,
        backbone=backbone.path if backbone else None, provenance=evaluation.extractor.provenance, run_id=evaluation.run_id,
        view=reading.view, segmenter=reading.segmenter, n=reading.n, excluded=reading.excluded, failed=reading.failed,
        values={m: value_of(i) for m, i in reading.values.items()} | costs_of(evaluation), status="ok" if reading.n else "failed",
        note=note or ("" if reading.n else "no sample could be scored: see the rows of its run"),
        headline=row.headline, **declared(evaluation),
    )  # fmt: skip


COLUMNS_OF_EVALUATION = ("accuracy", "miou_dataset", "miou_image", "foreground_iou", "ap_image")
"""Metrics of a single evaluation, where report.columns names none."""


def columns_of_evaluation(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the metrics that a single evaluation computes."""
    return tuple(report["columns"]) or COLUMNS_OF_EVALUATION


def columns_of_table(table: TableSheet, report: Mapping[str, Any]) -> tuple[Column, ...]:
    """Columns of a table of evaluations. Raises ConfigError for a metric that is not defined."""
    headline = [definition_of(name, "table.headline").name for name in table.headline]
    columns = tuple(replace(column, headline=column.name in headline) for column in columns_of(table.columns))
    return (*columns, *map(difference_column, table.against), *(COSTS if report["costs"] else ()))


def single_table(evaluation: Evaluation, found: Sequence[Reading], command: str) -> Results:
    """One evaluation as a table: a row for each view and segmenter."""
    if not any(r.n for r in found):
        raise DataError(nothing_scored(evaluation))
    cuts = [
        s.key for s in evaluation.protocol.segmenters if evaluation.extractor.comparable or not s.decision.startswith("argmax")
    ]
    found = [r for r in found if r.segmenter in cuts]
    views, method = {r.name for r in found}, type(evaluation.extractor).__name__
    rows_ = tuple(
        TableRow(
            name=", ".join([method, *([r.name] if len(views) > 1 else []), *([r.segmenter] if len(cuts) > 1 else [])]),
            group="methods" if evaluation.extractor.provenance != "control" else "controls",
            extractor=method, backbone=None, provenance=evaluation.extractor.provenance, run_id=evaluation.run_id,
            view=r.view, segmenter=r.segmenter, n=r.n, excluded=r.excluded, failed=r.failed,
            values={m: value_of(i) for m, i in r.values.items()} | costs_of(evaluation), status="ok" if r.n else "failed",
            note=f"{r.waiting} samples are not computed yet" if r.waiting else "", **declared(evaluation),
        )
        for r in found
    )  # fmt: skip
    data = f"{evaluation.dataset.name}, {len(evaluation.dataset.keys())} samples"
    block = Block(evaluation.protocol.label, data, evaluation.protocol.label, "", rows_)
    report = evaluation.config["report"]
    columns = columns_of(columns_of_evaluation(report)) + (COSTS if report["costs"] else ())
    title = f"{method} on {data}"
    return Results("evaluation", title, command, __version__, columns, (block,), (), interval_text(report))
