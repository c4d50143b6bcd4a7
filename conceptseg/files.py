"""Write files so that a reader never sees half of one, and two writers never lose a change. What stands here makes no number."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = re.compile(r"\..+\.(?P<pid>\d+)(@(?P<host>[0-9a-f]{8}))?\.part")
"""Name of a file or folder that is being written: its own name, the process and the machine."""
ABANDONED_SECONDS = 24 * 3600
"""Age at which a part of another machine, whose processes can't be seen from here, counts as abandoned."""
_swept: set[Path] = set()


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends well.

    Creates the folder around it; a link keeps pointing where it pointed. On the first write of a process into a folder, parts
    that killed processes left there are removed. Raises OSError.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:
        _swept.add(path.parent)
        remove_abandoned_parts(path.parent)
    part = _part_of(path)
    try:
        yield part
        if part.is_dir() and path.exists():  # a folder can't be replaced by a rename while it holds files
            shutil.rmtree(path)
        part.replace(path)
    except BaseException:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename; see `written_aside`. Raises OSError."""
    with written_aside(path) as part:
        part.write_bytes(content)


def takes_files(folder: Path) -> bool:
    """Whether a file can be made in a folder, or in the nearest one above that is there.

    A file is made and removed: permissions do not tell of /proc or a full disk.
    """
    nearest = next((one for one in (folder.absolute(), *folder.absolute().parents) if one.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=nearest) as probe:
            probe.write(b"0")
            probe.flush()
    except OSError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder so that nobody meets half of it; what a killed process leaves is swept like any part. Raises OSError."""
    folder = folder.resolve()
    remove_abandoned_parts(folder.parent)
    part = _part_of(folder)
    folder.rename(part)
    shutil.rmtree(part)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name[:180]}.{os.getpid()}@{_host()}.part")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time read, change and write `path`; the others wait. The lock is on its folder and leaves no file."""
    folder = path.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def remove_abandoned_parts(folder: Path) -> None:
    """Remove what killed processes were writing in this folder. Parts of running processes stay."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(".part")]
    for name in names:
        found = PART.fullmatch(name)
        if found is None or not _abandoned(folder / name, int(found["pid"]), found["host"]):
            continue
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def _abandoned(part: Path, pid: int, host: str | None) -> bool:
    if host not in (None, _host()):
        try:
            return time.time() - part.stat().st_mtime > ABANDONED_SECONDS
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process; no number of a process
        return False
    return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
