"""Finished tables: one that would come out as it stands written is read back, and nothing that makes numbers is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from conceptseg.keys import digest, versions
from conceptseg.report.results import Results, load, write_atomically


class FinishedTable:
    """A table's mark: size and time of every file that it came from (the package with its weights, rows) and that was written.

    path: where the mark is kept; results: the table's results.json; written: what is written beside it; runs: the folder of run
    folders; asked: all else that it depends on, None where that isn't known. Only tables of drawn scenes and of the package's own
    models are marked: what others read is not all known.
    """

    def __init__(self, path: Path, results: Path, written: Sequence[Path], runs: Path, asked: Any | None) -> None:
        self.path, self.results, self.written, self.runs, self.asked = path, results, written, runs, asked

    def read(self) -> Results | None:
        """The table as it stands written; None if anything has changed since, or it was never marked."""
        try:
            mark = json.loads(self.path.read_text(encoding="utf-8"))
            return load(self.results) if self.asked is not None and mark == self._mark(mark["runs"]) else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, table: Results, configs: Iterable[Mapping[str, Any]]) -> None:
        """Mark a table that was just written. configs: those of its runs."""
        rows = [row for block in table.blocks for row in block.rows]
        whole = all(row.run_id and not row.failed and row.provenance in ("control", "lab") for row in rows)
        if self.asked is None or not whole or not all(_is_closed(config) for config in configs):
            self.path.unlink(missing_ok=True)
            return
        runs = sorted(set(_values(table.to_json(), "run_id")))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self._mark(runs)).encode())

    def _mark(self, runs: list[str]) -> dict[str, Any]:
        files = [*_package_files(), self.results, *self.written]
        for run in runs:
            files += sorted((self.runs / run).iterdir())
        states = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]
        return {"runs": runs, "of": digest([self.asked, states, versions()])}


def _package_files() -> Iterator[Path]:
    for package, ending in (("conceptseg", "*"), ("conceptseg.conf", "*.yaml"), ("conceptseg.benchmarks", "*.yaml")):
        yield from (f for f in sorted(Path(str(resources.files(package))).rglob(ending)) if "__pycache__" not in f.parts)


def _is_closed(config: Mapping[str, Any]) -> bool:
    """Whether a run reads drawn scenes and models of the package, and no other file."""
    drawn = str(config["dataset"]["_target_"]).startswith("conceptseg.data.drawn.")
    return drawn and all(path is None or str(path).startswith("lab:") for path in _values(config["extractor"], "path", "tokens"))


def _values(held: Any, *keys: str) -> Iterator[Any]:
    """Every value of these keys, however deep."""
    if isinstance(held, Mapping):
        yield from (value for key, value in held.items() if key in keys)
        held = list(held.values())
    if isinstance(held, list | tuple):
        for value in held:
            yield from _values(value, *keys)
