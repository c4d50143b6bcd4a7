"""A finished table: the contents of benchmarks/<table>/results.json, checked, and how the file is read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from conceptseg.errors import ReportError, printable
from conceptseg.files import write_atomically
from conceptseg.report.blocks import Block, TableRow, row_problems
from conceptseg.report.columns import Column
from conceptseg.report.strict_json import build

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Results:
    """A finished table. Constructing one checks it: a number that may not be printed is an error here, not a footnote.

    Control characters in its texts are written out (`printable`), so that no output of a table obeys them.
    """

    table: str
    """Name of the table's sheet, and of its folder under benchmarks/."""
    title: str
    """Heading."""
    command: str
    """Shell command that computes the table."""
    conceptseg: str
    """Version of the package that computed it."""
    columns: tuple[Column, ...]
    """Metrics in printing order."""
    blocks: tuple[Block, ...]
    """Comparisons in printing order."""
    notes: tuple[str, ...] = ()
    """Sentences printed under the table."""
    interval: str = ""
    """Description of the intervals, such as "95 % bootstrap interval over images, 1000 draws"."""
    sheet: str | None = None
    """Picture sheet, as a path relative to the folder of RESULTS.md."""

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, _printable(getattr(self, one.name)))
        problems = [*_table_problems(self), *row_problems(self.blocks, {column.name: column for column in self.columns})]
        if problems:
            listed = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise ReportError(f'table "{self.table}" can\'t be reported:\n  {listed}\n  Compute it again: {self.command}')

    @property
    def computed(self) -> bool:
        """Whether any row was run."""
        return any(row.runs for block in self.blocks for row in block.rows)

    @property
    def unrun(self) -> tuple[TableRow, ...]:
        """Rows that say what they need, each name once."""
        rows = {row.name: row for block in self.blocks for row in block.ordered_rows if row.needs}
        return tuple(rows.values())

    @property
    def needs(self) -> dict[tuple[str, ...], list[str]]:
        """Map the requirements of rows that were not run to the names of those rows."""
        grouped: dict[tuple[str, ...], list[str]] = {}
        for row in self.unrun:
            grouped.setdefault(row.needs, []).append(row.name)
        return grouped

    def explained_marks(self, block: Block) -> list[str]:
        """The notes that explain the marks behind numbers of a block."""
        marks = {mark for row in block.rows for value in row.values.values() for mark in value.mark}
        return [note for note in self.notes if any(f" {mark} " in note for mark in marks)]

    @classmethod
    def from_json(cls, data: object, where: str = "results") -> Results:
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            got = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise ReportError(
                f"{where}: this version reads tables of schema {SCHEMA}, but the file has schema {got!r}.\n"
                "  Compute the table again, or use the conceptseg version that wrote it."
            )
        body = _with_current_names({key: value for key, value in data.items() if key != "schema"})
        return build(cls, body, where)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts, `from_json`'s inverse. Keys that older tables lack are written only where they say something."""
        body = asdict(self)
        places = [body, *body["columns"], *body["blocks"]]
        places += [row for block in body["blocks"] for row in block["rows"]]
        places += [value for block in body["blocks"] for row in block["rows"] for value in row["values"].values()]
        for place in places:
            for key in [key for key, unset in _OPTIONAL.items() if key in place and place[key] in unset]:
                del place[key]
        plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **body}, allow_nan=False))
        return plain


def _printable(value: Any) -> Any:
    """The value itself where no text in it had to change."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(map(_printable, value))
    if isinstance(value, Mapping):
        return {printable(key): _printable(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        held = {one.name: getattr(value, one.name) for one in fields(value)}
        changed = {name: new for name, old in held.items() if (new := _printable(old)) != old}
        return replace(value, **changed) if changed else value
    return value


_OPTIONAL: dict[str, tuple[object, ...]] = {
    "interval": ("",), "sheet": (None, ""), "places": (1,), "mark": ("",), "told": ("",), "trained_on": ("",), "argmax": ("",),
    "names": ("",), "protocol": ("",),
    "also": ((), []), "series": ("",), "x": (None,), "axis": ("",), "needs": ((), []), "command": ("",), "headline": (False,),
    "intervals": (True,), "higher_is_better": (True,), "remarks": ((), []),
}  # fmt: skip


def _with_current_names(data: Any) -> Any:
    """A plain table with today's names of columns and kinds: quoted columns and released metrics were called published."""
    if isinstance(data, list):
        return [_with_current_names(one) for one in data]
    if not isinstance(data, Mapping):
        return data
    found = {key: _with_current_names(value) for key, value in data.items()}
    if isinstance(found.get("values"), Mapping):
        found["values"] = {_current_column(name): value for name, value in found["values"].items()}
    if "label" in found and isinstance(found.get("name"), str):
        found["name"] = _current_column(found["name"])
        found |= {"kind": "quoted"} if found.get("kind") == "published" else {}
    return found


def _current_column(name: str) -> str:
    """
    >>> [_current_column(n) for n in ("published/miou", "released/published_ap_two_channel", "miou_dataset")]
    ['quoted/miou', 'released/released_ap_two_channel', 'miou_dataset']
    """
    return re.sub(r"^(released/|standard/|)published_", r"\1released_", re.sub("^published/", "quoted/", name))


def load(path: Path) -> Results:
    """Read and check benchmarks/<table>/results.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"can't read the table {path}: {error.strerror}. Compute it: conceptseg table=<name>") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}). Compute the table again.") from error
    return Results.from_json(data, str(path))


def save(path: Path, results: Results) -> None:
    """Write results.json, creating its folder; readers see the old file or the new one, never half of one."""
    write_atomically(path, (json.dumps(results.to_json(), indent=1, ensure_ascii=False) + "\n").encode())


def _table_problems(results: Results) -> list[str]:
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9]+([._-][A-Za-z0-9]+)*", results.table):
        problems.append(f"table name {results.table!r} is not letters and digits, joined by single dots, dashes or underscores")
    if not results.columns:
        problems.append("the table has no columns")
    sheet = results.sheet
    if sheet is not None and (not sheet or re.match(r"/|[A-Za-z][\w+.-]*:", sheet) or ".." in sheet.split("/")):
        problems.append(f"sheet {sheet!r} is no path below RESULTS.md's folder, such as benchmarks/{results.table}/sheet.png")
    repeated = [
        *(f'column "{name}"' for name in _repeated([column.name for column in results.columns])),
        *(f'block "{name}"' for name in _repeated([block.name for block in results.blocks])),
        *(f'row "{name}" of block "{b.name}"' for b in results.blocks for name in _repeated([row.name for row in b.rows])),
    ]
    return problems + [f"{thing} occurs twice; a reader can't tell which is meant" for thing in repeated]


def _repeated(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
