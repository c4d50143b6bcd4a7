"""Rows of a finished table, in blocks that may be compared, and the rules that every row keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from conceptseg.errors import did_you_mean
from conceptseg.report.columns import Column, Value, value_problems
from conceptseg.types import Provenance

Group = Literal["controls", "methods"]
Status = Literal["ok", "not run", "failed"]


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


def row_problems(blocks: Sequence[Block], columns: Mapping[str, Column]) -> list[str]:
    """Sentences about rows that may not be printed, and about their numbers; `columns` by name."""
    problems = []
    for block in blocks:
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
                    problems += [f'{where}, metric "{name}": {problem}' for problem in value_problems(value, columns[name])]
    return problems
