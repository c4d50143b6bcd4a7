"""Read the numbers of a run off its rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conceptseg.evaluation.assemble import Evaluation, check_measured
from conceptseg.files import write_atomically
from conceptseg.metrics.definitions import Rows
from conceptseg.metrics.intervals import Interval
from conceptseg.metrics.summary import summarise
from conceptseg.store.folders import readings_of
from conceptseg.store.schema import RowKey


@dataclass(frozen=True, slots=True)
class Reading:
    """The numbers of one view under one segmenter."""

    name: str
    view: str
    segmenter: str
    n: int
    excluded: int
    failed: int
    waiting: int
    """Samples that no process has finished yet."""
    values: Mapping[str, Interval]


def readings(evaluation: Evaluation, metrics: Sequence[str], segmenters: Iterable[str] | None = None) -> list[Reading]:
    """Numbers of every view and segmenter, over the samples that the config asks for now."""
    check_measured(evaluation.protocol, metrics)
    evaluation.store.refresh()
    offered = [s.key for s in evaluation.protocol.segmenters if segmenters is None or s.key in segmenters]
    return [_reading(evaluation, metrics, name, v.key, s) for name, v in evaluation.views.items() for s in offered]


def other_readings(evaluation: Evaluation, metrics: Sequence[str], found: Sequence[Reading]) -> list[Reading]:
    """Numbers of the views and segmenters that earlier commands read of the same run, over the samples that are asked for now.

    found: those that the config asks for now, as `readings` returns them; the others follow in the order of their rows.
    """
    taken = {one.name for one in found}
    before = [one for one in readings_of(evaluation.store.folder) if {"view", "name"} <= one.keys()]
    named = {one["view"]: one["name"] for one in before if one["name"] not in taken}
    mine, keys = {(one.view, one.segmenter) for one in found}, set(evaluation.dataset.keys())
    rows = evaluation.store.rows().items()
    held = dict.fromkeys((k.view, k.segmenter) for k, row in rows if row["status"] == "ok" and k.sample in keys)
    return [_reading(evaluation, metrics, named.get(view, view), view, s) for view, s in held if (view, s) not in mine]


def _reading(evaluation: Evaluation, metrics: Sequence[str], name: str, view: str, segmenter: str) -> Reading:
    rows, report = evaluation.store.rows(), evaluation.config["report"]
    keys = evaluation.dataset.keys()
    mine = [rows.get(RowKey(k, view, segmenter)) or rows.get(RowKey(k, "*", "*")) for k in keys]
    by_status = {s: [r for r in mine if r is not None and r["status"] == s] for s in ("ok", "failed", "excluded")}
    values = {}
    if by_status["ok"]:
        values = summarise(by_status["ok"], metrics, report["resamples"], report["level"], report["draw"])
    return Reading(
        name, view, segmenter, len(by_status["ok"]), len(by_status["excluded"]), len(by_status["failed"]),
        sum(r is None for r in mine), values,
    )  # fmt: skip


def nothing_scored(evaluation: Evaluation) -> str:
    """Why no sample that the config asks for has a number: each reason with how many samples it stands for, and which.

    The message of an error: a run without a number must not look like a finished one.
    """
    rows, keys = evaluation.store.rows(), set(evaluation.dataset.keys())
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows.values():
        if row["status"] != "ok" and row["sample"] in keys:
            said = row["error"].removeprefix(f"{row['sample']}: ").strip()
            where = "left out" if row["status"] == "excluded" else "failed"
            reasons.setdefault((where, said.replace(row["sample"], "<sample>")), []).append(row["sample"])
    lines = [
        f"  {len(names)} {where}: {reason}\n    {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for (where, reason), names in sorted(reasons.items(), key=lambda item: -len(item[1]))[:5]
    ]
    if len(reasons) > 5:
        lines.append(f"  and {len(reasons) - 5} more reasons: {evaluation.store.folder}")
    return "\n".join([f"no sample could be scored, of {len(keys)} under protocol {evaluation.protocol.label}:", *lines])


def scored(evaluation: Evaluation, reading: Reading) -> Rows:
    """The scored rows behind a reading, of the samples that the config asks for now."""
    rows, keys = evaluation.store.rows(), evaluation.dataset.keys()
    mine = (rows.get(RowKey(key, reading.view, reading.segmenter)) for key in keys)
    return Rows.from_records(row for row in mine if row is not None and row["status"] == "ok")


def write_readings(evaluation: Evaluation, found: Sequence[Reading]) -> Path:
    """readings.json of the run folder: every reading, with what it rests on."""
    path = evaluation.store.folder / "readings.json"
    body = {
        "run_id": evaluation.run_id, "provenance": evaluation.extractor.provenance, "protocol": evaluation.protocol.label,
        "dataset": evaluation.dataset.name, "interval": interval_text(evaluation.config["report"]),
        "readings": [
            {**{k: v for k, v in asdict(r).items() if k != "values"}, "values": {m: _finite(i) for m, i in r.values.items()}}
            for r in found
        ],
    }  # fmt: skip
    write_atomically(path, (json.dumps(body, indent=1) + "\n").encode())
    return path


def _finite(interval: Interval) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(interval).items()}


DRAWN_IN_WORDS = {"images": "images", "words": "groups of images with the same words"}


def interval_text(report: Mapping[str, Any]) -> str:
    """Describe the intervals of a table."""
    drawn = DRAWN_IN_WORDS[report["draw"]]
    return f"{100 * report['level']:g} % percentile bootstrap over {drawn}, {report['resamples']:,} resamples"
