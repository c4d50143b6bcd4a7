"""Numbers that others printed: benchmarks/<claim>/quoted.yaml, each with its source and the definition that it obeys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from conceptseg.errors import DataError, ReportError, did_you_mean
from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.reading import read_yaml

ELSEWHERE = ("unknown", "iou_of_nouns", "iod", "ioh", "iou", "miou_21", "miou_20")
"""Definitions that a quoted number may obey beside the package's own."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a number is printed, and where it was read."""

    cite: str
    """Paper with its version and table."""
    read_in: str
    """Text that was read; third-party notes and memory are named as such."""


@dataclass(frozen=True, slots=True)
class QuotedColumn:
    """A column of the quoted table."""

    label: str
    text: str
    """Meaning, in one sentence."""


@dataclass(frozen=True, slots=True)
class QuotedRow:
    """A row of the quoted table, in percent as printed."""

    row: str
    """Name; unique in its claim."""
    model: str
    source: Source
    versions: tuple[str, ...]
    """Versions of the paper that print it."""
    verified: bool
    """Whether it was seen in the source or a full transcription of it; false for third-party notes and memory."""
    values: Mapping[str, float]
    """Column -> percent."""
    obeys: Mapping[str, str]
    """Column -> name of the definition behind this cell, "unknown" where the source does not settle it."""
    note: str
    names: str = ""
    """Class names that the method was given for an image: "truth", "all", "predicted" or another word; empty if not known."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One quoted table or curve."""

    name: str
    """Folder under benchmarks/."""
    title: str
    columns: Mapping[str, QuotedColumn]
    rows: tuple[QuotedRow, ...]

    def row(self, name: str) -> QuotedRow:
        """Raises ReportError for a row that is not quoted."""
        for row in self.rows:
            if row.row == name:
                return row
        raise ReportError(f'{self.name}: no quoted row "{name}". {did_you_mean(name, [row.row for row in self.rows])}')


def shipped(claim: str) -> Path:
    """quoted.yaml of a claim."""
    return Path(str(resources.files("conceptseg.benchmarks"))) / claim / "quoted.yaml"


def load_claim(path: Path) -> Claim:
    """Read and check one file. Raises ReportError for a missing file, unknown keys, sources or definitions, or a repeated row."""
    try:
        data = read_yaml(path)
    except DataError as error:
        raise ReportError(f"can't read the quoted numbers: {error}") from error
    _keys(data, ("title", "sources", "columns", "rows"), str(path))
    sources = {name: Source(**_keys(one, _names(Source), f"{path}: source {name}")) for name, one in data["sources"].items()}
    columns = {
        name: QuotedColumn(**_keys(one, _names(QuotedColumn), f"{path}: column {name}")) for name, one in data["columns"].items()
    }
    rows = tuple(_row(one, sources, columns, str(path)) for one in data["rows"])
    names = [row.row for row in rows]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ReportError(f'{path}: row "{repeated[0]}" occurs twice.')
    return Claim(path.parent.name, data["title"], columns, rows)


def _row(data: Any, sources: Mapping[str, Source], columns: Mapping[str, QuotedColumn], where: str) -> QuotedRow:
    found = _keys(data, tuple(n for n in _names(QuotedRow) if n not in ("note", "names")), where, ("note", "names"))
    here = f'{where}: row "{found["row"]}"'
    if found["source"] not in sources:
        raise ReportError(f'{here}: unknown source "{found["source"]}". {did_you_mean(found["source"], sources)}')
    for key in ("values", "obeys"):
        if strange := sorted(set(found[key]) - set(columns)):
            raise ReportError(f'{here}: {key} of unknown column "{strange[0]}". {did_you_mean(strange[0], columns)}')
    if found["values"].keys() != found["obeys"].keys():
        raise ReportError(f"{here}: every value needs the definition that it obeys, and no other.")
    for name in found["obeys"].values():
        if name not in DEFINITIONS and name not in ELSEWHERE:
            raise ReportError(f'{here}: obeys unknown definition "{name}". {did_you_mean(name, [*DEFINITIONS, *ELSEWHERE])}')
    if not all(isinstance(v, (int, float)) and 0 <= v <= 100 for v in found["values"].values()):
        raise ReportError(f"{here}: values are percents from 0 to 100, got {found['values']}.")
    return QuotedRow(
        found["row"], found["model"], sources[found["source"]], tuple(map(str, found["versions"])), found["verified"],
        {k: float(v) for k, v in found["values"].items()}, dict(found["obeys"]), found.get("note", ""), found.get("names", ""),
    )  # fmt: skip


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _keys(data: Any, wanted: tuple[str, ...], where: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ReportError(f"{where}: wanted the keys {', '.join(wanted)}, got {type(data).__name__}.")
    if missing := [key for key in wanted if key not in data]:
        raise ReportError(f"{where}: lacks {', '.join(missing)}.")
    if strange := [key for key in data if key not in (*wanted, *optional)]:
        raise ReportError(f'{where}: unknown key "{strange[0]}". {did_you_mean(str(strange[0]), (*wanted, *optional))}')
    return data


def on_the_identity(accuracy: float, miou: float) -> bool:
    """Whether a printed mIoU is acc / (2 - acc) of the printed accuracy, both percents of two decimals.

    Rounding of both explains 0.010 to 0.015, by the accuracy; the least gap of a row that is no such number is 0.8.

    >>> on_the_identity(83.07, 71.04), on_the_identity(79.70, 61.95)
    (True, False)
    """
    share = accuracy / 100
    return abs(100 * share / (2 - share) - miou) <= 0.015
