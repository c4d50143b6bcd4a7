"""Finished tables: one that would come out as it stands written is read back, and nothing that makes numbers is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from conceptseg.files import write_atomically
from conceptseg.keys import digest, versions
from conceptseg.report.results import Results, load

MOST_FILES = 100_000  # of data and weights; looking at more takes longer than the table


class FinishedTable:
    """A table's mark: size and time of every file that it came from (package, rows, data, weights) and that was written.

    path: where the mark is kept; results: the table's results.json; written: what is written beside it; runs: the folder of run
    folders; asked: all else that it depends on, None where that isn't known. Data and weights are the files and folders that
    the settings of data set, protocol and extractor name; what they name on the Hub is pinned to a commit. Tables with a class
    that isn't ours are not marked: what it reads is not known.
    """

    def __init__(self, path: Path, results: Path, written: Sequence[Path], runs: Path, asked: Any | None) -> None:
        self.path, self.results, self.written, self.runs, self.asked = path, results, written, runs, asked

    def read(self) -> Results | None:
        """The table as it stands written; None if anything has changed since, or it was never marked."""
        try:
            mark = json.loads(self.path.read_text(encoding="utf-8"))
            whole = self.asked is not None and mark == self._mark(mark["runs"], mark["named"])
            return load(self.results) if whole else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, table: Results, configs: Iterable[Mapping[str, Any]]) -> None:
        """Mark a table that was just written. configs: those of its runs."""
        rows = [row for block in table.blocks for row in block.rows]
        read = [[config[part] for part in ("dataset", "protocol", "extractor")] for config in configs]
        ours = all(target.startswith("conceptseg.") for target in _values(read, "_target_"))
        self.path.unlink(missing_ok=True)
        if self.asked is None or not ours or not all(row.run_id and not row.failed for row in rows):
            return
        runs = sorted(set(_values(table.to_json(), "run_id")))
        try:
            mark = self._mark(runs, sorted({value for value in _values(read) if isinstance(value, str)}))
        except (OSError, ValueError):
            return  # data and weights that can't be looked at now, or are too many
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(mark).encode())

    def _mark(self, runs: list[str], named: list[str]) -> dict[str, Any]:
        files = [*_package_files(), self.results, *self.written]
        for run in runs:
            files += sorted(file for file in (self.runs / run).iterdir() if not file.name.startswith("log-"))
        states = [state for file in files if file.is_file() for state in _states(str(file))]
        states += [state for name in named for state in _states(name)]
        return {"runs": runs, "named": named, "of": digest([self.asked, states, versions()])}


def _states(name: str) -> list[tuple[str, int, int, int]]:
    """Path, times and size of the file that this is the name of, or of all files in the folder; none for a word.

    Raises ValueError for too many.
    """
    found = []
    if os.path.isfile(name):
        found.append(name)
    for folder, _, files in os.walk(name, followlinks=True):
        found += [os.path.join(folder, file) for file in files]
        if len(found) > MOST_FILES:
            raise ValueError(f"{name}: more than {MOST_FILES:,} files")
    states = ((file, os.stat(file)) for file in sorted(found))
    return [(file, state.st_mtime_ns, state.st_ctime_ns, state.st_size) for file, state in states]


def _package_files() -> Iterator[Path]:
    for package, ending in (("conceptseg", "*"), ("conceptseg.conf", "*.yaml"), ("conceptseg.benchmarks", "*.yaml")):
        yield from (f for f in sorted(Path(str(resources.files(package))).rglob(ending)) if "__pycache__" not in f.parts)


def _values(held: Any, *keys: str) -> Iterator[Any]:
    """Every plain value of these keys, however deep; of all keys if none is given."""
    if isinstance(held, Mapping):
        for key, value in held.items():
            if isinstance(value, Mapping | list | tuple):
                yield from _values(value, *keys)
            elif not keys or key in keys:
                yield value
    elif isinstance(held, list | tuple):
        for value in held:
            if isinstance(value, Mapping | list | tuple):
                yield from _values(value, *keys)
            elif not keys:
                yield value
