"""Small pictures kept beside the rows, so that a sheet can be drawn later without a model."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from conceptseg.errors import StoreError
from conceptseg.reading import open_regular
from conceptseg.types import Prediction, Task

log = logging.getLogger(__name__)


class MapKeeper:
    """8-bit maps (min to max of each) and predicted labels as PNG, by sample, view and segmenter: about 1 kB each.

    All pictures of a shard stand in one tar file, which is only ever appended to: a picture that a killed process left half
    written is cut off when that shard appends again, and ignored until then. Earlier versions wrote a file a picture; those are
    read too. folder: maps/ of the run's folder. samples: keys of all samples of the run, asked for when a map is found under a
    name that older versions gave, which several samples could share. shard, count: which of how many processes this is.
    """

    def __init__(
        self,
        folder: Path,
        views: frozenset[str],
        samples: Callable[[], Iterable[str]] = tuple,
        shard: int = 0,
        count: int = 1,
    ) -> None:
        self.folder, self.views = folder, views
        self._samples, self._sharing = samples, Counter[str]()
        self._own = folder / f"maps-{shard}of{count}.tar"
        self._members: dict[str, tuple[int, int]] = {}
        self._end = 0

    def keep(self, task: Task, view: str, segmenter: str, maps: np.ndarray, prediction: Prediction) -> None:
        """The map of the target, or of the present class that covers most pixels; on the method's own grid."""
        if view not in self.views:
            return
        channel = shown_channel(task)
        low, high = maps[channel].min(), maps[channel].max()
        scaled = np.zeros_like(maps[channel]) if high <= low else (maps[channel] - low) / (high - low)
        self._write(_member(task.key, view, "map"), np.round(255 * scaled).astype(np.uint8))
        self._write(_member(task.key, view, segmenter), prediction.labels)

    def _write(self, name: str, picture: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        try:
            self._append(name, buffer.getvalue())
        except OSError as error:
            raise StoreError(
                f"writing {self._own}: {error.strerror}. Every row written before is kept: free some space, change runtime.runs, "
                f"or set runtime.keep_maps=false, then run again."
            ) from error

    def _append(self, name: str, content: bytes) -> None:
        """Add a member in one write, after the last whole one, unless it is there already."""
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(self._own, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            if size != self._end:
                found, self._end = _whole_members(*_state(self._own))
                self._members = dict(found)
            if (place := self._members.get(name)) is not None and os.pread(file, place[1], place[0]) == content:
                return
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            head = entry.tobuf(tarfile.USTAR_FORMAT)
            block = head + content + bytes(-len(content) % tarfile.BLOCKSIZE)
            if size > self._end:
                os.ftruncate(file, self._end)
            os.lseek(file, self._end, os.SEEK_SET)
            try:
                written = 0
                while written < len(block):
                    written += os.write(file, block[written:])
            except OSError:
                os.ftruncate(file, self._end)
                raise
            self._members[name] = self._end + len(head), len(content)
            self._end += len(block)
        finally:
            os.close(file)

    def read(self, sample: str, view: str, segmenter: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(map, labels), or None where they were not kept, or, with a warning, where a file is damaged."""
        first = self._picture(sample, view, "map")
        second = None if first is None else self._picture(sample, view, segmenter)
        return None if first is None or second is None else (first, second)

    def _picture(self, sample: str, view: str, what: str) -> np.ndarray | None:
        found = self._appended(_member(sample, view, what))
        if found is None:
            named = self.folder / _folder_name(view) / f"{file_name(sample, what)}.png"
            path = named if named.exists() else self._older(sample, view, what)
            if path is None:
                return None
            found = path, None
        path, content = found
        try:
            picture = np.asarray(Image.open(path if content is None else io.BytesIO(content)))
            if picture.ndim != 2 or picture.dtype != np.uint8:
                raise ValueError(f"{picture.dtype} {list(picture.shape)}, wanted one channel of uint8")
            return picture
        except Exception as error:  # Pillow raises SyntaxError, struct.error, zlib.error and others for a damaged file
            log.warning("%s is damaged (%s): sample %s is left out of pictures.", path, error, sample)
            return None

    def _appended(self, name: str) -> tuple[Path, bytes | None] | None:
        """(file, content) of a member of any shard's file."""
        for path in sorted(self.folder.glob("maps-*.tar")):
            try:
                members, _ = _whole_members(*_state(path))
                if name in members:
                    start, size = members[name]
                    with open_regular(path) as file:
                        file.seek(start)
                        return path, file.read(size)
            except OSError as error:
                log.warning("%s can't be read (%s): its maps are left out of pictures.", path, error)
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


def _state(path: Path) -> tuple[str, int, int, int]:
    """Return the state of a file by which its list of members is cached; a change reads the list again."""
    status = os.stat(path)
    return str(path), status.st_size, status.st_mtime_ns, status.st_ino


@lru_cache(maxsize=64)
def _whole_members(path: str, size: int, modified: int, inode: int) -> tuple[Mapping[str, tuple[int, int]], int]:
    """Member -> (first byte, bytes) of all that are whole, the later of two of one name; and where the last one ends.

    A damaged head costs its own member: the search goes on behind it. Raises OSError.
    """
    members: dict[str, tuple[int, int]] = {}
    end = 0
    # TarError: of a file that is empty, or ends within its first head.
    with open_regular(path) as file, suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as held:
        for entry in held:
            stop = entry.offset_data + -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if stop > size:
                break
            if entry.offset > end:
                log.warning("%s: bytes %d to %d are damaged: the maps in them are left out.", path, end, entry.offset)
            members[entry.name] = entry.offset_data, entry.size
            end = stop
    return members, end


def _member(sample: str, view: str, what: str) -> str:
    """Name of a picture in its file: short enough for the oldest form of tar."""
    return f"{file_name(view, sample, what, width=24)}.png"


def shown_channel(task: Task) -> int:
    """The channel whose map stands for the task in pictures."""
    if task.concepts.target is not None:
        return task.concepts.target
    area = {label: int((task.truth == label).sum()) for label in task.classes if label}
    return task.concepts.labels.index(max(area, key=lambda label: area[label]))


def file_name(*names: str, width: int = 60) -> str:
    """A name for a file or folder that no other names give, also on disks that fold case: readable parts and a digest of all.

    width: most characters of a readable part.

    >>> file_name("trip 1", "map"), file_name("trip_1", "map")
    ('trip_1.map-7532c616457a0b82', 'trip_1.map-0bec611efc24a743')
    """
    told = json.dumps(names).encode()
    readable = ".".join(_slug(name)[:width] for name in names).lstrip(".")
    return f"{readable}-{hashlib.blake2b(told, digest_size=8).hexdigest()}"


def _folder_name(view: str) -> str:
    """The view itself where it is a plain word, which no `file_name` is: those end in a hyphen and a digest."""
    return view if re.fullmatch("[a-z0-9_]{1,60}", view) else file_name(view)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.,_-]+", "_", text)
