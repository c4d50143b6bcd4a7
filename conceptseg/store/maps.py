"""Small pictures kept beside the rows, so that a sheet can be drawn later without a model."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg.errors import StoreError
from conceptseg.files import write_atomically
from conceptseg.types import Prediction, Task

log = logging.getLogger(__name__)


class MapKeeper:
    """8-bit maps (min to max of each) and predicted labels as PNG, by sample, view and segmenter: about 1 kB each.

    samples: keys of all samples of the run, asked for when a map is found under a name that older versions gave, which several
    samples could share.
    """

    def __init__(self, folder: Path, views: frozenset[str], samples: Callable[[], Iterable[str]] = tuple) -> None:
        self.folder, self.views = folder, views
        self._samples, self._sharing = samples, Counter[str]()

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
        return self.folder / _folder_name(view) / f"{file_name(sample, what)}.png"

    def _write(self, path: Path, picture: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise StoreError(
                f"writing {path}: {error.strerror}. Every row written before is kept: free some space, change runtime.runs, "
                f"or set runtime.keep_maps=false, then run again."
            ) from error

    def read(self, sample: str, view: str, segmenter: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(map, labels), or None where they were not kept, or, with a warning, where a file is damaged."""
        first = self._picture(sample, view, "map")
        second = None if first is None else self._picture(sample, view, segmenter)
        return None if first is None or second is None else (first, second)

    def _picture(self, sample: str, view: str, what: str) -> np.ndarray | None:
        named = self._path(sample, view, what)
        path = named if named.exists() else self._older(sample, view, what)
        if path is None:
            return None
        try:
            picture = np.asarray(Image.open(path))
            if picture.ndim != 2 or picture.dtype != np.uint8:
                raise ValueError(f"{picture.dtype} {list(picture.shape)}, wanted one channel of uint8")
            return picture
        except Exception as error:  # Pillow raises SyntaxError, struct.error, zlib.error and others for a damaged file
            log.warning("%s is damaged (%s): sample %s is left out of pictures.", path, error, sample)
            return None

    def _older(self, sample: str, view: str, what: str) -> Path | None:
        """The file of a version whose names several samples could share; None where there is none or samples do share it."""
        path = self.folder / _slug(view) / f"{_slug(sample)}.{_slug(what)}.png"
        if len(path.name) > 255 or not path.exists():
            return None
        if not self._sharing:
            self._sharing = Counter(_slug(one).casefold() for one in set(self._samples()))
        if self._sharing[_slug(sample).casefold()] > 1:
            log.warning("%s: %s and other samples share this file of an older version: left out of pictures.", path, sample)
            return None
        return path


def shown_channel(task: Task) -> int:
    """The channel whose map stands for the task in pictures."""
    if task.concepts.target is not None:
        return task.concepts.target
    area = {label: int((task.truth == label).sum()) for label in task.classes if label}
    return task.concepts.labels.index(max(area, key=lambda label: area[label]))


def file_name(*names: str) -> str:
    """A name for a file or folder that no other names give, also on disks that fold case: readable parts and a digest of all.

    >>> file_name("trip 1", "map"), file_name("trip_1", "map")
    ('trip_1.map-7532c616457a0b82', 'trip_1.map-0bec611efc24a743')
    """
    told = json.dumps(names).encode()
    readable = ".".join(_slug(name)[:60] for name in names).lstrip(".")
    return f"{readable}-{hashlib.blake2b(told, digest_size=8).hexdigest()}"


def _folder_name(view: str) -> str:
    """The view itself where it is a plain word, which no `file_name` is: those end in a hyphen and a digest."""
    return view if re.fullmatch("[a-z0-9_]{1,60}", view) else file_name(view)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,_-]+", "_", text)
