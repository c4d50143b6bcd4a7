"""A run's folder: opened by content address, appended to by any number of processes, read as one."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from conceptseg.errors import ConfigError, ResumeError, StoreError
from conceptseg.files import remove_abandoned_parts, write_atomically, written_aside
from conceptseg.keys import run_id
from conceptseg.store.lines import DamagedRow, line_of, row_of, sealed
from conceptseg.store.schema import SCHEMA, TIMING_FIELDS, Manifest, Row, RowKey
from conceptseg.types import PER_IMAGE

log = logging.getLogger(__name__)

WARNINGS = 20
"""Damaged lines of a file that are named one by one; further ones are counted."""


class RunStore:
    """Rows of one run. Files rows-<shard>of<count>.jsonl are only ever appended to; done-ness is the union over all of them.

    A line that a killed process left half written is cut off when that shard opens its file again, and ignored until then.
    A line that is damaged otherwise is named in a warning and skipped, so that its sample is computed again.
    Use as a context manager when writing: the shard's file is locked, so that two processes can't share a shard.
    """

    def __init__(self, folder: Path, shard: int = 0, count: int = 1) -> None:
        self.folder, self.shard, self.count = folder, shard, count
        self._file: int | None = None
        self._made = False
        self._rows: dict[RowKey, Row] | None = None
        self._told: set[Path] = set()

    @cached_property
    def run_id(self) -> str:
        """The folder's own name, also where it is reached through a link."""
        return self.folder.resolve().name

    # ------------------------------------------------------------ opening

    def open(self, manifest: Manifest, on_code_change: str = "refuse") -> None:
        """Write the manifest, or check it against the one that is there. Removes what killed processes left half written.

        Raises ResumeError if the folder was written by other code, unless on_code_change is "accept"; if its manifest is damaged
        or belongs to another folder; or if it holds rows without a manifest.
        """
        path = self.folder / "manifest.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned_parts(self.folder)
            rows = any(file.stat().st_size for file in self.folder.glob("rows-*.jsonl"))  # asked first: others may be writing
            if not path.exists():
                if rows and on_code_change == "refuse":
                    raise ResumeError(
                        f"{self.folder} holds rows, but no manifest.json that says which code wrote them.\n  Keep them all the "
                        "same (runtime.on_code_change=accept), start again beside them (=fork), or delete the folder."
                    )
                self._write_manifest(path, {**manifest, "checked_rows": not rows})
                self._made = not rows
                return
        except OSError as error:
            raise _store_error(self.folder, error) from error
        held = self.manifest()
        if reason := _other_code(held, manifest):
            if on_code_change == "refuse":
                raise ResumeError(
                    f"{self.folder} was written {reason}.\n  Keep adding to it (runtime.on_code_change=accept), start again "
                    f"beside it (runtime.on_code_change=fork), or delete the folder. Its rows can be read as they are."
                )
            self._write_manifest(path, {**manifest, "checked_rows": held.get("checked_rows", False)})

    @contextmanager
    def withdrawn_if_refused(self) -> Iterator[None]:
        """Where the block raises ConfigError, remove the folder if this process made it and it has no row.

        Other shards may be at work in the folder of a run that has several; it stays.
        """
        try:
            yield
        except ConfigError:
            if self._made and self.count == 1 and not any(file.stat().st_size for file in self.folder.glob("rows-*.jsonl")):
                shutil.rmtree(self.folder, ignore_errors=True)
                with suppress(OSError):  # it holds other runs
                    self.folder.parent.rmdir()
            raise

    @staticmethod
    def _write_manifest(path: Path, manifest: Manifest) -> None:
        try:
            write_atomically(path, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        except OSError as error:
            raise _store_error(path, error) from error

    def manifest(self) -> Manifest:
        """Raises ResumeError if the folder has none, it can't be read, or it is not the manifest of this folder."""
        path = self.folder / "manifest.json"
        try:
            found = json.loads(path.read_bytes().decode())
            if fault := _manifest_fault(found, self.run_id):
                raise ValueError(fault)
            return cast(Manifest, found)
        except (OSError, ValueError, RecursionError) as error:
            raise ResumeError(f"reading {path}: {error}. Delete the folder to start the run again.") from error

    # ------------------------------------------------------------ writing

    @property
    def shard_file(self) -> Path:
        return self.folder / f"rows-{self.shard}of{self.count}.jsonl"

    def __enter__(self) -> RunStore:
        try:
            self._file = os.open(self.shard_file, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise StoreError(
                f"{self.shard_file} is being written by another process. Give each process its own runtime.shard_index, "
                f"or wait for the other to finish."
            ) from error
        except OSError as error:
            self._close()
            raise _store_error(self.shard_file, error) from error
        self._cut_torn_line(self._file)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @staticmethod
    def _cut_torn_line(file: int) -> None:
        size = os.lseek(file, 0, os.SEEK_END)
        keep = size
        while keep > 0:
            step = min(65536, keep)
            block = os.pread(file, step, keep - step)
            if (found := block.rfind(b"\n")) >= 0:
                keep = keep - step + found + 1
                break
            keep -= step
        if keep < size:
            os.ftruncate(file, keep)
        os.lseek(file, keep, os.SEEK_SET)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows that are not held yet, in one write and one fsync. Raises StoreError, with all earlier rows safe."""
        if self._file is None:
            raise StoreError(f"{self.folder}: append needs the store to be entered (with store: ...).")
        held = self.rows()
        new = [row for row in rows if _supersedes(row, held.get(_key(row)))]
        if not new:
            return
        block = b"".join(line_of(sealed(row, self.run_id)) for row in new)
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            written = 0
            while written < len(block):
                written += os.write(self._file, block[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, start)  # never leave half a block: what was there before stays whole
            os.lseek(self._file, start, os.SEEK_SET)
            raise _store_error(self.shard_file, error) from error
        for row in new:
            held[_key(row)] = row
            if row["status"] == "ok":
                held.pop(RowKey(row["sample"], "*", "*"), None)

    # ------------------------------------------------------------ reading

    def rows(self) -> dict[RowKey, Row]:
        """Every row of every shard, by key. Raises StoreError if two shards contradict each other."""
        if self._rows is None:
            self._rows, scored = {}, set()
            for path in sorted(self.folder.glob("rows-*.jsonl")):
                for row in self._read(path):
                    if row["status"] == "ok":
                        scored.add(row["sample"])
                    held = self._rows.get(_key(row))
                    if _supersedes(row, held):
                        self._rows[_key(row)] = row
                    elif held is not None and held["status"] == row["status"] == "ok" and _content(held) != _content(row):
                        raise StoreError(
                            f"{path}: the row of {_key(row)} contradicts one written before. Were two versions of the code "
                            f"run on this folder? Delete it and run again."
                        )
            for sample in scored:  # it failed as a whole once, and was scored when tried again
                self._rows.pop(RowKey(sample, "*", "*"), None)
        return self._rows

    def _read(self, path: Path) -> Iterator[Row]:
        """Whole and valid rows of a file, without run and check. A damaged line is named in a warning, once a file."""
        checked = (self.folder / "manifest.json").exists() and self.manifest().get("checked_rows", False)
        damaged = unchecked = 0
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break  # torn by a kill; its sample will be computed again
                    try:
                        row = row_of(line, self.run_id)
                        if "check" not in row and checked:
                            raise DamagedRow("it lacks the run and check digest that rows of this run carry")
                    except DamagedRow as reason:
                        damaged += 1
                        if path not in self._told and damaged <= WARNINGS:
                            log.warning(
                                "%s, line %d: %s. It is skipped; the next run computes its sample again.", path, number, reason
                            )
                        continue
                    if "check" in row:
                        checked = True  # older versions wrote before newer ones
                    else:
                        unchecked += 1
                    row.pop("run", None)
                    row.pop("check", None)
                    yield row
        except OSError as error:
            raise StoreError(f"reading {path}: {error.strerror}.") from error
        if path not in self._told and damaged > WARNINGS:
            log.warning("%s: %d more lines are damaged and skipped.", path, damaged - WARNINGS)
        if path not in self._told and unchecked:
            log.warning(
                "%s: %d rows are of a version without check digests. They are read; a changed digit in them can't be noticed.",
                path, unchecked,
            )  # fmt: skip
        self._told.add(path)

    def samples(self) -> set[str]:
        """Keys of all samples that have a row."""
        return {key.sample for key in self.rows()}

    def refresh(self) -> None:
        """Forget what was read, so that rows of other processes are seen."""
        self._rows = None

    def settled(self, sample: str, retry_failed: bool = False) -> bool:
        """Whether the sample was left out or failed as a whole, so that no view of it is missing."""
        row = self.rows().get(RowKey(sample, "*", "*"))
        return row is not None and (row["status"] == "excluded" or not retry_failed)

    def missing(self, sample: str, views: Iterable[str], segmenters: Iterable[str], retry_failed: bool = False) -> list[str]:
        """Views of which this sample lacks a row for at least one segmenter."""
        if self.settled(sample, retry_failed):
            return []
        held = self.rows()
        names = list(segmenters)

        def lacks(view: str, segmenter: str) -> bool:
            row = held.get(RowKey(sample, view, segmenter))
            return row is None or (retry_failed and row["status"] == "failed")

        return [view for view in views if any(lacks(view, s) for s in names)]

    def compact(self) -> Path:
        """All rows as rows.parquet, sorted by key: the file to share. The shards stay; running it again changes nothing."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.refresh()
        rows = [dict(self.rows()[key]) for key in sorted(self.rows())]
        path = self.folder / "rows.parquet"
        try:
            with written_aside(path) as part:
                pq.write_table(pa.Table.from_pylist(rows, _parquet_schema()), part)
        except OSError as error:
            raise _store_error(path, error) from error
        return path


def _parquet_schema() -> Any:
    """Every field of a row, spelt out: rows that failed lack most of them, and must not decide the layout."""
    import pyarrow as pa

    counts = pa.list_(pa.int64())
    return pa.schema(
        [(name, pa.string()) for name in ("sample", "view", "segmenter", "status", "error")]
        + [("words", pa.list_(pa.string()))]
        + [(name, counts) for name in ("classes", "inter", "pred", "label", "pred_void")]
        + [(name, pa.int64()) for name in ("valid", "correct", "void")]
        + [("ap", pa.struct([(name, pa.float64()) for name in PER_IMAGE]))]
        + [("measured", pa.map_(pa.string(), pa.float64())), ("seconds", pa.float64())]
    )


def _key(row: Row) -> RowKey:
    return RowKey(row["sample"], row["view"], row["segmenter"])


def _content(row: Row) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in TIMING_FIELDS}


def _other_code(held: Manifest, now: Manifest) -> str:
    """How the code that wrote a folder differs from that which would go on; empty if it does not."""
    if held.get("source_form") != now.get("source_form"):
        return "by a version that recorded its code in another form, so a change of its numbers can't be ruled out"
    names = sorted(held["source"].keys() | now["source"].keys())
    changed = [name for name in names if held["source"].get(name) != now["source"].get(name)]
    more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
    return f"by other code: {', '.join(changed[:6])}{more} changed" if changed else ""


def _supersedes(row: Row, held: Row | None) -> bool:
    """A new key always; a good row replaces a failed one."""
    return held is None or (held["status"] == "failed" and row["status"] != "failed")


def _manifest_fault(found: Any, name: str) -> str | None:
    """Why this is not the manifest of the folder of this name."""
    if not isinstance(found, dict) or not isinstance(found.get("schema"), int):
        return "not a manifest of this program"
    if found["schema"] != SCHEMA:
        return f"rows of schema {found['schema']}, this version writes {SCHEMA}"
    for key in ("identity", "source", "config"):
        if not isinstance(found.get(key), dict):
            return f"not a manifest of this program: {key} is missing or no table"
    if found.get("run_id") != name:
        return f'it is of run "{found.get("run_id")}", but its folder is named "{name}": name the folder after the run'
    if not re.fullmatch(re.escape(run_id(found["identity"])) + "(-[0-9a-f]{6})?", name):  # a fork carries its code's digest
        return f"its identity was changed: it would name run {run_id(found['identity'])}, the folder is {name}"
    return None


def _store_error(path: Path, error: OSError) -> StoreError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else (error.strerror or str(error))
    return StoreError(
        f"writing {path}: {what}. Every row written before is kept: {'free some space' if full else 'mend that'} or change "
        f"runtime.runs, then run the same command again and it goes on from here."
    )
