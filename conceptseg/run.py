"""Carry out an evaluation that was assembled: open the store, loop, write what the run folder holds, sum up."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conceptseg.assemble import Evaluation
from conceptseg.errors import ConfigError
from conceptseg.evaluate import Tally, evaluate
from conceptseg.metrics.definitions import Rows
from conceptseg.metrics.intervals import Interval
from conceptseg.metrics.summary import summarise
from conceptseg.report.panels import PanelCell, PanelRow, picture_sheet
from conceptseg.report.results import write_atomically
from conceptseg.store.cost import measured
from conceptseg.store.maps import shown_channel
from conceptseg.store.schema import RowKey
from conceptseg.types import Task

log = logging.getLogger(__name__)


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


def check_decisions(evaluation: Evaluation) -> None:
    """Raise ConfigError where a protocol decides between words only, and the extractor's maps of words can't be compared."""
    protocol, extractor = evaluation.protocol, evaluation.extractor
    if not extractor.comparable and all(s.decision == "argmax" for s in protocol.segmenters):
        raise ConfigError(
            f"protocol {protocol.label} gives a pixel to the word with the greatest score, and {type(extractor).__name__}'s maps "
            "of different words can't be compared: nothing would be scored. Take a protocol that cuts one word's map, such as "
            "protocol=scenes_single 'dataset.objects=[1,1]' (its key: protocol.segmenters)"
        )


def carry_out(evaluation: Evaluation, title: str = "") -> Tally:
    """Compute what is missing, with a progress bar where there is a terminal."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runtime = evaluation.config["runtime"]
    if runtime["threads"]:
        torch.set_num_threads(runtime["threads"])
    take_own_accelerator()
    shown = runtime["progress"] and evaluation.shard.index == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    from rich.console import Console

    shard = evaluation.shard
    with (
        ending_in_order(),
        evaluation.store as store,
        measured(store.folder, shard.index, shard.count, evaluation.extractor) as cost,
        Progress(*columns, console=Console(file=sys.stderr), disable=not shown, transient=True) as bar,
    ):
        task = bar.add_task(title or evaluation.run_id, total=None)
        tally = evaluate(
            store, evaluation.dataset, evaluation.extractor, evaluation.protocol, evaluation.views, evaluation.shard,
            evaluation.maps if runtime["keep_maps"] else None, runtime["retry_failed"], runtime["max_failures"],
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
        cost.images, cost.stages = tally.computed, tally.stages
    log.info(
        "%s: %d samples computed, %d held already, %d excluded, %d failed", evaluation.store.folder, tally.computed, tally.held,
        tally.excluded, tally.failed,
    )  # fmt: skip
    return tally


def take_own_accelerator() -> None:
    """Let "cuda" mean the accelerator of this process's number, where torchrun or accelerate started several on one machine."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def ending_in_order() -> Iterator[None]:
    """What schedulers send before they kill (SIGTERM) ends the loop like Ctrl-C does: what the model has answered is written."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def readings(evaluation: Evaluation, metrics: Sequence[str], segmenters: Iterable[str] | None = None) -> list[Reading]:
    """Numbers of every view and segmenter, over the samples that the config asks for now."""
    store, report = evaluation.store, evaluation.config["report"]
    store.refresh()
    rows = store.rows()
    keys = evaluation.dataset.keys()
    found = []
    for name, view in evaluation.views.items():
        for segmenter in [s.key for s in evaluation.protocol.segmenters]:
            if segmenters is not None and segmenter not in segmenters:
                continue
            mine = [rows.get(RowKey(k, view.key, segmenter)) or rows.get(RowKey(k, "*", "*")) for k in keys]
            by_status = {s: [r for r in mine if r is not None and r["status"] == s] for s in ("ok", "failed", "excluded")}
            values = {}
            if by_status["ok"]:
                values = summarise(by_status["ok"], metrics, report["resamples"], report["level"], report["draw"])
            found.append(
                Reading(
                    name, view.key, segmenter, len(by_status["ok"]), len(by_status["excluded"]), len(by_status["failed"]),
                    sum(r is None for r in mine), values,
                )
            )  # fmt: skip
    return found


def scored(evaluation: Evaluation, reading: Reading) -> Rows:
    """The scored rows behind a reading, of the samples that the config asks for now."""
    rows, keys = evaluation.store.rows(), evaluation.dataset.keys()
    mine = (rows.get(RowKey(key, reading.view, reading.segmenter)) for key in keys)
    return Rows.from_records(row for row in mine if row is not None and row["status"] == "ok")


def write_results(evaluation: Evaluation, found: Sequence[Reading]) -> Path:
    """results.json of the run folder: every reading, with what it rests on."""
    path = evaluation.store.folder / "results.json"
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
    """What every interval is."""
    drawn = DRAWN_IN_WORDS[report["draw"]]
    return f"{100 * report['level']:g} % percentile bootstrap over {drawn}, {report['resamples']:,} resamples"


def panel_rows(evaluations: Sequence[tuple[Evaluation, str, str]], keys: Sequence[str]) -> list[PanelRow]:
    """Rows of a picture sheet from kept maps: for each sample, every (evaluation, view key, segmenter key) side by side.

    Samples that some of them lack are left out; all must share data set and protocol.
    """
    first = evaluations[0][0]
    rows = []
    for key in keys:
        sample = first.dataset.read(key)
        task = first.protocol.prepare(sample)
        if not isinstance(task, Task):
            continue
        cells = []
        for evaluation, view, segmenter in evaluations:
            held = evaluation.maps.read(key, view, segmenter)
            row = evaluation.store.rows().get(RowKey(key, view, segmenter))
            if held is None or row is None or row["status"] != "ok":
                break
            iou = summarise([row], ["miou_image"], 1, 0.95)["miou_image"].value
            cells.append(PanelCell(held[0], held[1], f"mIoU {iou:.2f}", tuple(c for c in task.classes if c)))
        if len(cells) == len(evaluations):
            image = np.round(255 * task.image).astype(np.uint8)
            word = task.concepts.names[shown_channel(task)]
            truth = task.truth
            if image.shape[:2] != truth.shape:
                from conceptseg.segment.resize import resize_image

                image = resize_image(image, (truth.shape[0], truth.shape[1]), "bicubic")
            rows.append(PanelRow("\n".join([word, key.split("/", 1)[-1]]), image, truth, tuple(cells)))
    return rows


def draw_sheet(path: Path, named: Sequence[tuple[str, Evaluation, str, str]], count: int) -> Path | None:
    """A picture sheet of `count` samples spread over the data set; None when no maps were kept."""
    first = named[0][1]
    settled = first.store.rows()
    scored = [k for k in tuple(first.dataset.keys()) if RowKey(k, named[0][2], named[0][3]) in settled]
    chosen = [scored[i * len(scored) // count] for i in range(min(count, len(scored)))] if scored else []
    rows = panel_rows([(e, v, s) for _, e, v, s in named], list(dict.fromkeys(chosen)))
    if not rows:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(path, [name for name, *_ in named], rows)
    return path
