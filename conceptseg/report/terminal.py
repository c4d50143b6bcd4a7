"""A finished table on a terminal or in a log file."""

from __future__ import annotations

import sys
from itertools import groupby

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conceptseg.report.results import ABSENT, Block, Column, Results, Row

WIDTH_OF_A_FILE = 120  # columns where output is no terminal
_NAME_WIDTH = 18  # the least; names wrap
_KINDS = {"standard": "", "released": " (released code)", "published": " (quoted)", "cost": " (cost)"}


def print_table(results: Results, console: Console | None = None) -> None:
    """Print every block with n and intervals, then what the columns mean, what was left out, and the runs behind the numbers.

    Where the metrics don't fit side by side, intervals go to a second line; where that doesn't fit either, a block becomes
    several tables with the same rows.
    """
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    _line(console, Text.assemble((results.title, "bold"), (f"   {results.command}   conceptseg {results.conceptseg}", "dim")))
    for block in results.blocks:
        console.print()
        _line(console, Text.assemble((block.name, "bold"), f": {block.text}" if block.text else ""))
        _line(console, Text(f"{block.dataset}; protocol {block.protocol}", style="dim"))
        for table in _pieces(block, results.columns, console.width):
            console.print(table, highlight=False)
    console.print()
    for column in results.columns:
        source = f" Source: {column.source}" if column.source else ""
        label = f"{column.label}{_KINDS[column.kind]}"
        _line(console, Text.assemble((label, "bold"), f": {column.text}", (source, "dim")), hang=2)
    cell = f"number [interval]: {results.interval}" if results.interval else "number [interval]"
    _line(console, Text(f"Each cell is {cell}. n counts scored samples. Bold is the best method of a column."), hang=2)
    for note in results.notes:
        _line(console, Text(f"Note: {note}"), hang=2)
    for block in results.blocks:
        _line(console, Text(f"Protocol of {block.name}: {block.protocol} on {block.dataset}."), hang=2)
        for row in block.ordered_rows:
            if row.failed or row.excluded:
                style = "bold red" if row.failed else ""
                _line(console, Text(f"{block.name}, {row.name}: {row.failed} failed, {row.excluded} excluded.", style), hang=2)
    _line(console, Text("Runs:"))
    for run_id, rows in _runs(results).items():
        _line(console, Text.assemble(f"  {run_id}", (f"  {'; '.join(rows)}", "dim")), hang=4)


def _line(console: Console, text: Text, hang: int = 0) -> None:
    """Print wrapped prose; lines after the first are indented by `hang`."""
    first, *rest = text.wrap(console, console.width - hang) if hang else [text]
    console.print(first, highlight=False)
    for line in rest:
        console.print(Padding(line, (0, 0, 0, hang), expand=False), highlight=False)


def _runs(results: Results) -> dict[str, list[str]]:
    """Run id -> the rows that it stands behind, with how they were read."""
    runs: dict[str, list[str]] = {}
    for block in results.blocks:
        for row in block.ordered_rows:
            on = f" on {row.backbone}" if row.backbone else ""
            for run in row.runs:
                read = ", ".join(part for part in (f"view {run.view}" if run.view else "", run.segmenter) if part)
                how = f"{row.extractor}{on}, {read}" if read else f"{row.extractor}{on}"
                runs.setdefault(run.run_id, []).append(f"{block.name}, {row.name} ({how})")
    return runs


def _pieces(block: Block, columns: tuple[Column, ...], width: int) -> list[Table]:
    """One table where it fits; else, in a table that quotes, what is quoted, released and standard stands apart."""
    whole = _tables(block, columns, width, notes=True)
    if len(whole) == 1 or not any(column.kind == "published" for column in columns):
        return whole
    kinds = [tuple(group) for _, group in groupby(columns, key=lambda column: column.kind)]
    return [table for place, kind in enumerate(kinds) for table in _tables(block, kind, width, notes=place == 0)]


def _tables(block: Block, columns: tuple[Column, ...], width: int, notes: bool) -> list[Table]:
    texts = [_cell(block, row, column, "\n") for row in block.rows for column in columns]
    headings = [line for column in columns for line in (column.heading, column.caveat)]
    narrow = 2 + max(len(line) for line in headings + [line for text in texts for line in text.plain.split("\n")])
    wide = 2 + max([len(line) for line in headings] + [len(text.plain) for text in texts])
    room = width - 2 - (_NAME_WIDTH + 2) - (len("provenance") + 2) - (len("not run") + 2)
    declared = block.declared
    left = room - sum(_declared_width(block, heading, name) + 2 for heading, name in declared)
    room, declared = (left, declared) if left >= narrow else (room, ())  # on a narrow terminal they go under the name
    separator, per_table = (" ", len(columns)) if wide * len(columns) <= room else ("\n", max(1, room // narrow))
    starts = range(0, len(columns), per_table)
    return [_table(block, columns[i : i + per_table], separator, declared, notes and i == 0) for i in starts]


def _declared_width(block: Block, heading: str, name: str) -> int:
    """Its heading, or the widest word below it: cells wrap between words."""
    return max(len(heading), *(len(word) for row in block.rows for word in getattr(row, name).split()))


def _table(
    block: Block, columns: tuple[Column, ...], separator: str, declared: tuple[tuple[str, str], ...], notes: bool
) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", min_width=_NAME_WIDTH, max_width=44, overflow="fold")
    table.add_column("provenance", no_wrap=True)
    for title, name in declared:
        table.add_column(title, width=_declared_width(block, title, name))
    table.add_column("n", justify="right", no_wrap=True)
    for column in columns:
        heading = Text.assemble(column.heading, (f"\n{column.caveat}" if column.caveat else "", "dim"))
        table.add_column(heading, justify="right", no_wrap=True)
    rows = block.ordered_rows
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        shown = Text.assemble(row.name, (f"\n{row.note}", "italic dim") if row.note and notes else "")
        properties = [getattr(row, field) or ABSENT for _, field in block.declared]
        if block.declared and not declared:
            named = zip(block.declared, properties, strict=True)
            shown.append("\n" + ", ".join(f"{heading} {text}" for (heading, _), text in named), "dim")
        n = Text(str(row.n)) if row.status == "ok" else Text(row.status, "bold red" if row.status == "failed" else "italic")
        table.add_row(
            shown, Text(row.provenance), *(properties if declared else ()), n,
            *(_cell(block, row, column, separator) for column in columns),
            style="dim" if row.group == "controls" else "", end_section=following is not None and following.group != row.group,
        )  # fmt: skip
    return table


def _cell(block: Block, row: Row, column: Column, separator: str) -> Text:
    if column.name not in row.values:
        return Text(ABSENT)
    value = row.values[column.name]
    number, interval = column.written(value)
    is_best = row.group == "methods" and number == block.best(column)
    own_n = f"n={value.n} " if value.n not in (None, row.n) else ""
    return Text.assemble(own_n, (number, "bold" if is_best else ""), f"{separator}{interval}" if interval else "")
