"""Draw picture sheets of finished evaluations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conceptseg.evaluation.assemble import Evaluation
from conceptseg.metrics.summary import summarise
from conceptseg.report.panels import PanelCell, PanelRow, picture_sheet
from conceptseg.store.maps import shown_channel
from conceptseg.store.schema import RowKey
from conceptseg.types import Task

log = logging.getLogger(__name__)


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
            if held[1].shape != task.truth.shape:
                log.warning("%s: the kept labels of %s have another size than its truth: left out.", evaluation.run_id, key)
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
