"""Run folders as things: list, find by a part of the id, remove, export. Needs no model."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, StoreError, did_you_mean
from conceptseg.files import PART, remove_folder, written_aside
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Manifest

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's folder, with what can be told of it without reading its rows."""

    folder: Path
    manifest: Manifest
    written: datetime
    """When a row was last written, in local time."""
    size: int
    """Bytes of all its files."""

    @property
    def run_id(self) -> str:
        return self.folder.name

    @property
    def method(self) -> str:
        """The extractor's class."""
        identity = self.manifest["identity"]
        return str((identity.get("method") or identity.get("extractor") or {}).get("class", "unknown"))

    @property
    def data(self) -> str:
        return str(self.manifest["identity"].get("dataset", {}).get("name", "unknown"))

    @property
    def protocol(self) -> str:
        found = self.manifest["identity"].get("protocol", {})
        return f"{found.get('name', 'unknown')} v{found.get('version', '?')}"

    def readings(self) -> list[dict[str, Any]]:
        """Return the contents of readings.json; see `readings_of`."""
        return readings_of(self.folder)


def readings_of(folder: Path) -> list[dict[str, Any]]:
    """The readings that a run's folder holds; [] if there are none yet, or the file is damaged."""
    try:
        found = json.loads((folder / "readings.json").read_bytes())["readings"]
        return [one for one in found if isinstance(one, dict)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def run_folders(runs: Path) -> tuple[list[RunFolder], list[str]]:
    """Every run below `runs`, the one that was written last first; and what can't be read, a line each."""
    found, faults = [], []
    for path in _manifests(runs):
        try:
            found.append(_read(path.parent))
        except (StoreError, OSError) as error:
            faults.append(" ".join(str(error).split()))
    return sorted(found, key=lambda one: (one.written, one.run_id), reverse=True), faults


def find(runs: Path, prefix: str) -> RunFolder:
    """The run whose id begins with `prefix`. Raises ConfigError for none or several, StoreError for one that can't be read."""
    known = [path.parent.name for path in _manifests(runs)]
    matching = [name for name in known if name.startswith(prefix)] if prefix else []
    if prefix in matching:
        matching = [prefix]
    if not matching:
        raise ConfigError(f'no run "{prefix}" in {runs}. {did_you_mean(prefix, known)} Another folder: --folder.')
    if len(matching) > 1:
        raise ConfigError(f'"{prefix}" begins the ids of {len(matching)} runs: {", ".join(matching[:8])}. Write one more letter.')
    return _read(runs / matching[0])


def remove(run: RunFolder) -> None:
    """Remove the folder, all or nothing. Raises StoreError if a process is writing it, and then removes nothing."""
    with ExitStack() as held:
        for rows in sorted(run.folder.glob("rows-*.jsonl")):
            handle = os.open(rows, os.O_RDONLY)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"{rows} is being written by another process: the run is kept. End that process first."
                ) from error
        try:
            remove_folder(run.folder)
        except OSError as error:
            raise StoreError(f"removing {run.folder}: {error.strerror or error}.") from error


def export(found: Sequence[RunFolder], path: Path) -> None:
    """Write runs into one file: .zip, .tar, .tar.gz or .tgz with all their files, or .csv with their rows.

    Damaged rows are named in warnings; archives hold them as they are. Raises ConfigError for another ending and for a file that
    exists.
    """
    if path.exists():
        raise ConfigError(f"{path} exists already. Name another file, or remove it first.")
    kind = next((end for end in (*ARCHIVES, ".csv") if path.name.endswith(end)), None)
    if kind is None:
        raise ConfigError(f"{path}: wanted a name that ends in {', '.join(ARCHIVES)}, or in .csv for rows alone.")
    try:
        with written_aside(path) as part:
            if kind == ".csv":
                part.write_text(_as_csv(found), encoding="utf-8")
            else:
                for run in found:
                    RunStore(run.folder).rows()  # says which are damaged
            if kind == ".zip":
                with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
                    for file, name in _files(found):
                        archive.write(file, name)
            elif kind != ".csv":
                with tarfile.open(part, "w" if kind == ".tar" else "w:gz") as archive:
                    for file, name in _files(found):
                        archive.add(file, name, recursive=False, filter=_without_owner)
    except OSError as error:
        raise StoreError(f"writing {path}: {error.strerror or error}.") from error


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _files(found: Sequence[RunFolder]) -> list[tuple[Path, str]]:
    return [
        (file, f"{run.run_id}/{file.relative_to(run.folder).as_posix()}")
        for run in found
        for file in sorted(run.folder.rglob("*"))
        if file.is_file() and not file.is_symlink() and not PART.fullmatch(file.name)
    ]


def _as_csv(found: Sequence[RunFolder]) -> str:
    """A line a row; lists in JSON, average precisions as columns of their own."""
    lines: list[dict[str, Any]] = []
    for run in found:
        for _, row in sorted(RunStore(run.folder).rows().items()):
            flat: dict[str, Any] = {"run": run.run_id, "method": run.method, "dataset": run.data, "protocol": run.protocol}
            for name, value in row.items():
                if name == "ap" and isinstance(value, dict):
                    flat |= {f"ap.{key}": number for key, number in value.items()}
                else:
                    flat[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
            lines.append(flat)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _manifests(runs: Path) -> list[Path]:
    """Of every run; hidden folders are parts that are being removed."""
    return sorted(path for path in runs.glob("*/manifest.json") if not path.parent.name.startswith("."))


def _read(folder: Path) -> RunFolder:
    manifest = RunStore(folder).manifest()
    files = [file.stat() for file in folder.rglob("*") if file.is_file()]
    rows = [file.stat().st_mtime for file in folder.glob("rows-*.jsonl")] or [(folder / "manifest.json").stat().st_mtime]
    return RunFolder(folder, manifest, datetime.fromtimestamp(max(rows)), sum(file.st_size for file in files))
