"""A finished table: what benchmarks/<table>/results.json holds, and the rules that every printed number keeps."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from conceptseg.errors import ReportError, did_you_mean, printable
from conceptseg.files import write_atomically
from conceptseg.report.strict_json import build
from conceptseg.types import Provenance

SCHEMA = 1
ABSENT = "\u2013"  # an en dash, where a row has no such metric

Kind = Literal["standard", "released", "quoted", "difference", "cost"]
KIND_NAMES: dict[Kind, str] = {
    "quoted": "quoted", "released": "released protocol", "standard": "standard protocol",
    "difference": "paired difference", "cost": "cost",
}  # fmt: skip
Group = Literal["controls", "methods"]
Status = Literal["ok", "not run", "failed"]


@dataclass(frozen=True, slots=True)
class Column:
    """One metric, with its definition. No row wins a cost, a quotation or a difference."""

    name: str
    """Key of the metric in every row's `values`."""
    label: str
    """Heading that readers see."""
    percent: bool
    """Whether values are shares that are printed times 100."""
    text: str
    """Definition, in one sentence."""
    source: str
    """Where the definition, or the quoted number, comes from."""
    kind: Kind
    """Correct definition, what released code computes, or quoted (the three never share a column); difference to another row;
    or what computing cost."""
    places: int = 1
    """Decimals of a percentage: one for numbers computed here, as many as were printed for quoted ones."""
    headline: bool = False
    """Whether the first screen of RESULTS.md and the brief screen show it."""
    intervals: bool = True
    """Whether outputs show its intervals; false only where a reader left them out."""
    higher_is_better: bool = True
    """Whether the greatest value of a column of metrics wins; otherwise the least does."""

    @property
    def heading(self) -> str:
        return f"{self.label} %" if self.percent else self.label

    @property
    def caveat(self) -> str:
        """Printed under the heading of every column that is not the correct definition computed here."""
        return {"standard": "", "released": "released", "quoted": "quoted", "difference": "", "cost": ""}[self.kind]

    def written(self, value: Value) -> tuple[str, str]:
        """The number and its interval as text; the interval is empty for a quoted number that has none.

        >>> Column("miou", "mIoU", True, "", "", "standard").written(Value(0.561, 0.503, 0.612, 64))
        ('56.1', '[50.3, 61.2]')
        """
        value_text, *bounds = (self.printed(value, number) for number in value.numbers)
        return value_text + value.mark, f"[{', '.join(bounds)}]" if bounds and self.intervals else ""

    def printed(self, value: Value, number: float) -> str:
        """A number as text with the decimals that `value` and its interval have."""
        scale, shift = (100, 2) if self.percent else (1, 0)
        sign = "+" if self.kind == "difference" else ""
        return f"{scale * number:{sign}.{self.decimals(value) - shift}f}"

    def decimals(self, value: Value) -> int:
        """Decimals of the stored number that are seen in print: three for a percentage printed with one.

        >>> Column("miou", "mIoU", True, "", "", "standard").decimals(Value(0.561, 0.503, 0.612, 64))
        3
        """
        if self.percent:
            return self.places + 2
        largest = max(abs(v) for v in value.numbers)
        return 3 if largest < 10 else 1 if largest < 1000 else 0

    def tolerance(self, value: Value) -> float:
        """How far another machine's rounding may move a number before it is published again: one unit of the last printed digit.

        >>> Column("miou", "mIoU", True, "", "", "standard").tolerance(Value(0.561, 0.503, 0.612, 64))
        0.001
        """
        return float(10 ** -self.decimals(value))


def by_kind(columns: Sequence[Column]) -> list[tuple[Kind, tuple[Column, ...]]]:
    """Neighbouring columns of one kind together."""
    return [(kind, tuple(group)) for kind, group in groupby(columns, key=lambda column: column.kind)]


@dataclass(frozen=True, slots=True)
class Value:
    """One number with what makes it readable. Only quoted numbers and costs may lack interval and n."""

    value: float
    """The metric, as a share where its column is in percent."""
    low: float | None
    """Lower end of the interval."""
    high: float | None
    """Upper end of the interval."""
    n: int | None
    """Samples that the number rests on."""
    mark: str = ""
    """A sign printed behind the number and explained in the table's notes, such as one for another definition."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value, and the ends of its interval where it has one."""
        return tuple(v for v in (self.value, self.low, self.high) if v is not None)


@dataclass(frozen=True, slots=True)
class Behind:
    """A further run behind a row, where a table reads one method under several protocols side by side."""

    kind: str
    """Columns that it fills: "released" or "standard"."""
    protocol: str
    """Name and version."""
    run_id: str
    view: str
    segmenter: str
    n: int
    excluded: int
    failed: int


@dataclass(frozen=True, slots=True)
class TableRow:
    """One method or control, on one data set under one protocol."""

    name: str
    """Name of the row for readers; unique in its block."""
    group: Group
    """Controls are printed below the methods and never win a column."""
    extractor: str
    """Name of the extractor's sheet."""
    backbone: str | None
    """Name of the backbone's sheet; None for a control that has no model."""
    provenance: Provenance
    """Kind of weights behind the numbers."""
    run_id: str
    """Run folder that holds the counts; empty only where nothing was run."""
    view: str
    """Key of the view that was read."""
    segmenter: str
    """How maps became labels."""
    n: int
    """Samples that were scored."""
    excluded: int
    """Samples left out by the protocol."""
    failed: int
    """Samples that raised an error."""
    values: Mapping[str, Value]
    """Column name -> number; a metric that does not apply has no key."""
    status: Status
    """Whether the row was computed."""
    note: str
    """Anything a reader must know beside the number."""
    told: str = ""
    """Information about the image that is shown to the model; empty in tables of older versions."""
    trained_on: str = ""
    """Supervision of the model."""
    names: str = ""
    """Class names that the method is given for an image, by the protocol's rule (such as "truth" or "all"); "none" for a method
    that reads no names. Of a row that is only quoted, what its source says; empty where that is not known."""
    protocol: str = ""
    """Protocols here that compute the row, "none" where nothing here does; empty where the block's holds for every row."""
    argmax: str = ""
    """Whether its channels may be compared by argmax: "yes" or "no"."""
    also: tuple[Behind, ...] = ()
    """Runs of other protocols that fill the columns which this row's own run does not."""
    series: str = ""
    """In a table that is a curve: the line that this row is a point of."""
    x: float | None = None
    """In a table that is a curve: where on the axis."""
    needs: tuple[str, ...] = ()
    """Weights and data that a row which was not run needs, each with its size or the script that fetches it."""
    command: str = ""
    """Command that runs it once they are there."""
    headline: bool = False
    """Whether the first screen of RESULTS.md and the brief screen show the row."""

    @property
    def runs(self) -> tuple[Behind, ...]:
        """Every run that fills a column of this row, its own first; empty where nothing was run."""
        own = Behind("", "", self.run_id, self.view, self.segmenter, self.n, self.excluded, self.failed)
        return (own, *self.also) if self.run_id else self.also


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as every output prints it."""

    number: str
    interval: str
    """Empty where there is none."""
    best: bool
    """Whether it is the best method's of its column."""
    own_n: str
    """Such as "n=60", where the number rests on other samples than its row."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that may be compared: one data set, one protocol."""

    name: str
    """Heading; unique in the table."""
    dataset: str
    """Data set, split and size in words."""
    protocol: str
    """Name and version of the protocol."""
    text: str
    """Task of the methods, in one sentence."""
    rows: tuple[TableRow, ...]
    """In printing order within each group."""
    axis: str = ""
    """Label of a curve's x axis, such as "layer"; empty if rows are not points of a curve."""
    remarks: tuple[str, ...] = ()
    """Sentences about its numbers, such as a sweep's best view; printed below them."""

    @property
    def ordered_rows(self) -> tuple[TableRow, ...]:
        """Methods, then controls."""
        return tuple(sorted(self.rows, key=lambda row: row.group == "controls"))

    @property
    def declared(self) -> tuple[tuple[str, str], ...]:
        """(heading, field of TableRow) of the declared properties that some row has: columns of the printed table."""
        headings = (
            ("shown to the model", "told"), ("names given", "names"), ("trained on", "trained_on"), ("argmax", "argmax"),
            ("protocol here", "protocol"),
        )  # fmt: skip
        return tuple((heading, name) for heading, name in headings if any(getattr(row, name) for row in self.rows))

    @property
    def names_given(self) -> str:
        """The rules by which methods that read names are given them, such as "truth"; empty where no row says it."""
        return ", ".join(dict.fromkeys(row.names for row in self.rows if row.names not in ("", "none")))

    def cell(self, row: TableRow, column: Column) -> Cell | None:
        """Return the printed form of a value; None if the row has no such number."""
        if column.name not in row.values:
            return None
        value = row.values[column.name]
        number, interval = column.written(value)
        own_n = f"n={value.n}" if value.n not in (None, row.n) else ""
        return Cell(number, interval, row.group == "methods" and number == self.best(column), own_n)

    def best(self, column: Column) -> str | None:
        """The best value of a method as it is printed, so that rows that look alike share the place; None for quotations."""
        values = [row.values[column.name] for row in self.rows if row.group == "methods" and column.name in row.values]
        if column.kind in ("quoted", "difference", "cost") or not values:
            return None
        chosen = max if column.higher_is_better else min
        return column.written(chosen(values, key=lambda value: value.value))[0]


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
        problems = [*_table_problems(self), *_row_problems(self)]
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


# ---------------------------------------------------------------- checks: each problem is one sentence


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


def _row_problems(results: Results) -> list[str]:
    columns = {column.name: column for column in results.columns}
    problems = []
    for block in results.blocks:
        for row in block.rows:
            where = f'block "{block.name}", row "{row.name}"'
            if min(row.n, row.excluded, row.failed) < 0:
                problems.append(f"{where}: n={row.n}, excluded={row.excluded}, failed={row.failed}, but counts can't be negative")
            if row.status == "ok" and (row.n < 1 or not row.run_id):
                problems.append(f"{where}: status is ok with n={row.n} and run id {row.run_id!r}, but a number needs both")
            if (row.x is not None) != bool(row.series and block.axis):
                problems.append(f"{where}: a point of a curve has series, x and an axis, or none of them")
            for name, value in row.values.items():
                if name not in columns:
                    problems.append(f'{where}: unknown metric "{name}". {did_you_mean(name, columns)}')
                elif row.status != "ok" and columns[name].kind != "quoted":
                    problems.append(f'{where}: has a value of "{name}", but its status is "{row.status}"')
                else:
                    problems += [f'{where}, metric "{name}": {problem}' for problem in _value_problems(value, columns[name])]
    return problems


def _value_problems(value: Value, column: Column) -> list[str]:
    numbers = value.numbers
    if not all(math.isfinite(v) for v in numbers):
        return [f"{list(numbers)} is not finite; leave a metric out where it is undefined"]
    problems = []
    if (value.low is None) != (value.high is None):
        problems.append("has one end of an interval without the other")
    elif value.low is None or value.high is None:
        if column.kind not in ("quoted", "cost") and value.n != 1:
            problems.append("has no interval; only quoted numbers, costs and single images may lack one")
    elif value.low > value.high:  # the value itself may lie outside: percentile intervals of skewed statistics do that
        problems.append(f"its interval [{value.low:g}, {value.high:g}] is upside down")
    if (value.n is None and column.kind not in ("quoted", "cost")) or (value.n is not None and value.n < 1):
        problems.append(f"n is {value.n}, but a number rests on at least one sample")
    if column.percent and any(abs(v) > 1 + 1e-9 for v in numbers):
        problems.append(f"{value.value:g} is not a share between -1 and 1, as a column in percent wants")
    return problems
