"""Small pictures kept beside the rows, so that a sheet can be drawn later without a model."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg.errors import StoreError
from conceptseg.types import Prediction, Task


class MapKeeper:
    """8-bit maps (min to max of each) and predicted labels as PNG, by sample, view and segmenter: about 1 kB each."""

    def __init__(self, folder: Path, views: frozenset[str]) -> None:
        self.folder, self.views = folder, views

    def keep(self, task: Task, view: str, segmenter: str, maps: np.ndarray, prediction: Prediction) -> None:
        """The map of the target, or of the present class that covers most pixels; on the method's own grid."""
        if view not in self.views:
            return
        channel = shown_channel(task)
        low, high = maps[channel].min(), maps[channel].max()
        scaled = np.zeros_like(maps[channel]) if high <= low else (maps[channel] - low) / (high - low)
        self._write(self._path(task.key, view, "map"), np.round(255 * scaled).astype(np.uint8))
        self._write(self._path(task.key, view, segmenter), prediction.labels)

    def _path(self, sample: str, view: str, what: str) -> Path:
        return self.folder / _slug(view) / f"{_slug(sample)}.{_slug(what)}.png"

    def _write(self, path: Path, picture: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
        except OSError as error:
            raise StoreError(
                f"writing {path}: {error.strerror}. Every row written before is kept: free some space, change runtime.runs, "
                f"or set runtime.keep_maps=false, then run again."
            ) from error

    def read(self, sample: str, view: str, segmenter: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(map, labels), or None where they were not kept."""
        paths = self._path(sample, view, "map"), self._path(sample, view, segmenter)
        if not all(p.exists() for p in paths):
            return None
        first, second = (np.asarray(Image.open(p)) for p in paths)
        return first, second


def shown_channel(task: Task) -> int:
    """The channel whose map stands for the task in pictures."""
    if task.concepts.target is not None:
        return task.concepts.target
    area = {label: int((task.truth == label).sum()) for label in task.classes if label}
    return task.concepts.labels.index(max(area, key=lambda label: area[label]))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,_-]+", "_", text)
