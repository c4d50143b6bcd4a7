"""Which columns and rows of a finished table are shown, in which order and with how many decimals: one choice for all outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column, Kind
from conceptseg.report.results import Results

TOP = 7
"""Methods of a block on the brief screen: three blocks of the lab's table fit 45 lines."""
SHOWN = ("detail", "columns", "rows", "top", "sort", "intervals", "digits")
"""Settings of report that change what is shown of a table, and nothing in it."""
_RANK: dict[Kind, int] = {"standard": 0, "released": 1, "quoted": 2, "difference": 3, "cost": 4}


@dataclass(frozen=True, slots=True)
class Selection:
    """The part of a table that is shown. The fields are settings of `report`; see docs/tables.md."""

    columns: tuple[str, ...] = ()
    """Names of columns; () takes the output's own. In a paper's table a metric's name takes it in every group of columns."""
    rows: tuple[str, ...] = ()
    """Names of rows, or patterns such as "*DAAM*"; () takes all, as far as `top` goes."""
    top: int | None = None
    """Methods of a block, the sheet's headline rows first, then the best; 0 takes all. None: TOP on the brief screen, else 0."""
    sort: str | None = None
    """Order of the methods: "best" by the first column, "sheet", or a column's name. None: "best" on the brief screen, else
    "sheet"."""
    intervals: bool = True
    """Whether intervals stand beside the numbers."""
    digits: int | None = None
    """Decimals of percentages that were computed; None keeps the table's own. Quoted numbers keep those that were printed."""

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Selection:
        """From the settings `report` of a plain configuration."""
        columns, rows = tuple(report["columns"]), tuple(report["rows"])
        return cls(columns, rows, report["top"], report["sort"], report["intervals"], report["digits"])

    def check(self, table: str, columns: Sequence[str], rows: Sequence[str] | None) -> None:
        """Raises ConfigError for a column or row that the table does not have. rows: None where they are not known yet."""
        for name in self.columns:
            _columns_named(name, columns, table, "report.columns")
        if self.sort not in (None, "best", "sheet"):
            _columns_named(self.sort, columns, table, "report.sort")
        for name in self.rows if rows is not None else ():
            if not any(_fits(row, name) for row in rows or ()):
                raise ConfigError(f'report.rows: table {table} has no row "{name}". {did_you_mean(name, rows or ())}')

    def all_columns(self, results: Results) -> Results:
        """The table as CSV and the full screen show it: every column and row that the settings do not leave out."""
        return self._applied(results, results.columns, 0, "sheet")

    def few_columns(self, results: Results) -> Results:
        """The table as LaTeX shows it: mIoU and mAP of every row, unless the settings say otherwise."""
        return self._applied(results, headline_columns(results), 0, "sheet")

    def brief(self, results: Results) -> Results:
        """The table as the brief screen shows it: mIoU and mAP of the best methods, unless the settings say otherwise.

        The best method of each shown column is always among them, so that bold means the best of all methods.
        """
        return self._applied(results, headline_columns(results), TOP, "best")

    def _applied(self, results: Results, columns: Sequence[Column], top: int, sort: str) -> Results:
        """Raises ConfigError for a column or row that the table does not have."""
        names = [row.name for block in results.blocks for row in block.rows]
        self.check(results.table, [column.name for column in results.columns], names)
        if self.columns:
            columns = [column for name in self.columns for column in _named(results, name, "report.columns")]
            columns += [column for column in results.columns if column.kind == "cost"]
        shown = tuple(dict.fromkeys(map(self._formatted, columns)))
        by = self.sort or sort
        sorting = shown if by in ("best", "sheet") else tuple(_named(results, by, "report.sort"))
        most = self.top if self.top is not None else 0 if self.rows else top
        blocks = []
        for block in results.blocks:
            rows = [row for row in block.rows if not self.rows or any(_fits(row.name, name) for name in self.rows)]
            ranked = _best_first(rows, sorting)
            if most:
                rows = _leading(replace(block, rows=tuple(rows)), ranked, shown, most)
            if by != "sheet" and not (by == "best" and block.axis):
                rows = [row for row in ranked if row in rows]
            held = {column.name for column in shown}
            pruned = [replace(r, values={n: v for n, v in r.values.items() if n in held}) for r in rows]
            if pruned:
                blocks.append(replace(block, rows=tuple(pruned)))
        return replace(results, columns=shown, blocks=tuple(blocks))

    def _formatted(self, column: Column) -> Column:
        digits = self.digits_of(column)
        return replace(column, places=column.places if digits is None else digits, intervals=self.intervals)

    def digits_of(self, column: Column) -> int | None:
        """Decimals that were asked for of a column's percentages; None where it keeps its own."""
        return self.digits if column.percent and column.kind != "quoted" else None


def headline_columns(results: Results) -> tuple[Column, ...]:
    """The sheet's headline columns; where it names none, mIoU and mAP of each kind that have a number, else every column."""
    costs = tuple(column for column in results.columns if column.kind == "cost")
    if found := tuple(column for column in results.columns if column.headline):
        return found + costs
    filled = {name for block in results.blocks for row in block.rows for name in row.values}
    kinds: dict[Kind, dict[str, Column]] = {}
    for column in results.columns:
        measure = _measure(column.name)
        if measure and column.name in filled and column.kind not in ("difference", "cost"):
            kinds.setdefault(column.kind, {}).setdefault(measure, column)
    measures = tuple(column for kind in kinds.values() for column in kind.values())
    return measures + costs if measures else results.columns


def _measure(name: str) -> str:
    """
    >>> [_measure(n) for n in ("quoted/miou", "released_miou_from_accuracy", "miou_image", "ap_image", "accuracy")]
    ['miou', 'miou', '', 'ap', '']
    """
    if re.search(r"(^|[/_])miou($|_(?!image))", name):
        return "miou"
    return "ap" if re.search(r"(^|[/_])ap($|_)", name) else ""


def _named(results: Results, name: str, setting: str) -> list[Column]:
    """The column of this name, or those of a paper's table whose name ends with it."""
    named = _columns_named(name, [column.name for column in results.columns], results.table, setting)
    return [column for column in results.columns if column.name in named]


def _columns_named(name: str, columns: Sequence[str], table: str, setting: str) -> list[str]:
    found = [column for column in columns if name in (column, column.rpartition("/")[2])]
    if not found:
        more = ["best", "sheet"] if setting == "report.sort" else []
        raise ConfigError(
            f'{setting}: table {table} has no column "{name}". {did_you_mean(name, [*columns, *more])} table.columns adds others.'
        )
    return found


def _fits(row: str, name: str) -> bool:
    """Whether a row has this name, or fits it as a pattern."""
    return row == name or fnmatchcase(row, name)


def _best_first(rows: Sequence[TableRow], columns: Sequence[Column]) -> list[TableRow]:
    """Rows by the first column, standard ones before others, in which any has a number; rows without one stand last."""
    ranked = sorted(columns, key=lambda column: _RANK[column.kind])
    column = next((c for c in ranked if any(c.name in row.values for row in rows)), None)
    if column is None:
        return list(rows)
    sign = 1 if column.kind == "cost" or not column.higher_is_better else -1

    def place(row: TableRow) -> tuple[bool, float]:
        value = row.values.get(column.name)
        return value is None, sign * value.value if value else 0.0

    return sorted(rows, key=place)


def _leading(block: Block, ranked: Sequence[TableRow], columns: Sequence[Column], most: int) -> list[TableRow]:
    """At most `most` methods of a block, in its order: the best of each column, headline rows, then the best of the others.

    Controls: those that are headline rows, all of them in a block without any.
    """
    controls = [row for row in block.rows if row.group == "controls"]
    methods = [row for row in ranked if row.group == "methods"]
    winners = [row for c in columns for row in methods if (cell := block.cell(row, c)) is not None and cell.best]
    wanted = [*dict.fromkeys(row.name for row in (*winners, *(r for r in methods if r.headline), *methods))][:most]
    flagged = [row for row in controls if row.headline]
    kept = {*wanted, *(row.name for row in flagged or controls)}
    return [row for row in block.rows if row.name in kept]
