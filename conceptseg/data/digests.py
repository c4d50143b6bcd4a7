"""Digests of file contents, kept between commands under each file's size, times and inode.

A digest is used again only while size, modification time, change time, inode and device of its file are what they were. Writing
to a file changes its change time, which no ordinary program can set back. Where the clock is too coarse to tell (a file that was
changed within the last two seconds), nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conceptseg.files import write_atomically
from conceptseg.reading import open_regular

SETTLED_SECONDS = 2.0
"""Age of a change from which a later one is sure to have another time: that of FAT, the coarsest clock of a file system."""
WORTH_KEEPING = 1 << 26
"""Bytes from which digests are kept; opening a file counts as much as reading 64 KiB."""
_OPENING = 1 << 16
_BLOCK = 1 << 20
_BATCH = 64

State = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Extent:
    """A file, or a part of one: `size` bytes from `start`; without a size all of it."""

    path: Path | str
    start: int = 0
    size: int | None = None

    @cached_property
    def name(self) -> str:
        """Key under which its digest is stored."""
        whole = str(self.path) if os.path.isabs(self.path) else os.path.abspath(self.path)
        return whole if self.size is None else f"{whole}:{self.start}+{self.size}"


def cache_folder() -> Path:
    """CONCEPTSEG_CACHE, or the user's cache folder: deleting it costs time and nothing else."""
    if named := os.environ.get("CONCEPTSEG_CACHE"):
        return Path(named).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "conceptseg"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "conceptseg"


def content_digests(extents: Sequence[Extent], owner: Path) -> list[str]:
    """SHA-256 of each extent's content, in hexadecimal; "absent" or "unreadable" where there is no regular file to read.

    owner: the folder or file that the data set was named by; what is kept of one is apart from what is kept of others.
    """
    kept = _Kept(owner)
    found: dict[str, str] = {}
    unknown: list[Extent] = []
    for extent in extents:
        if extent.name in found:
            continue
        state = _state(extent.path)
        if isinstance(state, str):
            found[extent.name] = state
        elif (known := kept.get(extent.name, state)) is not None:
            found[extent.name] = known
        else:
            unknown.append(extent)

    def work(batch: Sequence[Extent]) -> list[tuple[str, State | None]]:
        return [_digest(extent) for extent in batch]

    batches = [unknown[start : start + _BATCH] for start in range(0, len(unknown), _BATCH)]
    with ThreadPoolExecutor(4) as pool:  # hashing and waiting for a disk both leave other threads free
        for batch, results in zip(batches, pool.map(work, batches), strict=True):
            for extent, (value, settled) in zip(batch, results, strict=True):
                found[extent.name] = value
                if settled is not None:
                    kept.put(extent.name, settled, value, extent.size)
    kept.write()
    return [found[extent.name] for extent in extents]


def kept_digest(name: str, files: Sequence[Path], compute: Callable[[], str], owner: Path) -> str:
    """A digest of something that is read from `files`, computed again when one of them has changed."""
    states = [_state(path) for path in files]
    known = [state for state in states if not isinstance(state, str)]
    if not known or len(known) < len(states):
        return compute()
    # Every file's state stands in the name: the state kept beside it is that of any of them.
    whole = hashlib.sha256(repr((name, [os.path.abspath(path) for path in files], states)).encode()).hexdigest()
    kept = _Kept(owner)
    value = kept.get(whole, known[0])
    if value is None:
        started = time.time_ns()
        value = compute()
        if [_state(path) for path in files] == states and all(_settled(state, started) for state in known):
            kept.put(whole, known[0], value, sum(state[0] for state in known))
            kept.write()
    return value


def _state(path: Path | str) -> State | str:
    """(bytes, modified, changed, inode, device), or a word where there is no file."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except OSError:
        return "unreadable"
    return _as_state(status)


def _as_state(status: os.stat_result) -> State:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def _settled(state: State, now: int) -> bool:
    """Whether a change after `now` (nanoseconds) is sure to be seen in the times. Windows has no change time."""
    return (state[1] if os.name == "nt" else state[2]) + SETTLED_SECONDS * 1e9 < now


def _digest(extent: Extent) -> tuple[str, State | None]:
    """The digest, and the state it may be kept under."""
    started = time.time_ns()
    digest = hashlib.sha256()
    try:
        with open_regular(extent.path) as file:
            before = _as_state(os.fstat(file.fileno()))
            file.seek(extent.start)
            left = before[0] if extent.size is None else extent.size
            while left and (block := file.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            same = _as_state(os.fstat(file.fileno())) == before
    except OSError:
        return "unreadable", None
    return digest.hexdigest(), before if same and _settled(before, started) else None


class _Kept:
    """Digests of one owner on disk: a checksum in the first line, then name -> state and digest in JSON."""

    def __init__(self, owner: Path) -> None:
        name = hashlib.sha256(os.path.abspath(owner).encode(errors="surrogateescape")).hexdigest()[:24]
        self.path = cache_folder() / "digests" / f"{name}.json"
        self._cost = 0
        self._held: dict[str, list[object]] = {}
        try:
            mark, _, body = self.path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() == mark:
                self._held = json.loads(body)
        except (OSError, ValueError):  # nothing was kept, or it can't be read: all is read anew
            pass

    def get(self, name: str, state: State) -> str | None:
        held = self._held.get(name)
        return str(held[5]) if held is not None and tuple(held[:5]) == state else None

    def put(self, name: str, state: State, value: str, size: int | None) -> None:
        self._held[name] = [*state, value]
        self._cost += _OPENING + (state[0] if size is None else size)

    def write(self) -> None:
        if self._cost < WORTH_KEEPING:
            return
        body = json.dumps(self._held).encode()
        with suppress(OSError):  # a cache folder that can't be written costs time, no number
            write_atomically(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
