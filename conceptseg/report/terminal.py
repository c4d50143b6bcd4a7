"""A finished table on a terminal or in a log file."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conceptseg.report.results import ABSENT, Block, Column, Results, TableRow, by_kind

WIDTH_OF_A_FILE = 120  # columns where output is no terminal
_NAME_WIDTH = 18  # the least; names wrap
_SHORT = {"told": "shown", "trained_on": "data"}
_CODES = {
    "told": {"nothing": "none", "own prediction": "own", "true name": "name", "name and prompt": "name+"},
    "trained_on": {
        "nothing": "none", "images": "img", "class labels": "label", "images and captions": "text", "masks or boxes": "mask"
    },
}  # fmt: skip
"""Abbreviations of what a method declares, for narrow terminals; a legend explains each."""
_KINDS = {"standard": "", "released": " (released code)", "quoted": " (quoted)", "difference": "", "cost": " (cost)"}


def print_table(results: Results, console: Console | None = None) -> None:
    """Print every block with n and intervals, then what the columns mean, what was left out, and the runs behind the numbers.

    Where the metrics don't fit side by side, intervals go to a second line, then what methods declare is abbreviated; where that
    doesn't fit either, a block becomes several tables with the same rows.
    """
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    _line(console, Text.assemble((results.title, "bold"), (f"   {results.command}   conceptseg {results.conceptseg}", "dim")))
    for block in results.blocks:
        console.print()
        _line(console, Text.assemble((block.name, "bold"), f": {block.text}" if block.text else ""))
        _line(console, Text(f"{block.dataset}; protocol {block.protocol}", style="dim"))
        notes = {note: place for place, note in enumerate(dict.fromkeys(r.note for r in block.ordered_rows if r.note), 1)}
        layouts = _layouts(block, results.columns, console.width)
        for layout in layouts:
            console.print(_table(block, layout, notes), highlight=False)
        for line in _legend(block, results.columns, layouts):
            _line(console, Text(line, style="dim"), hang=2)
        for note, place in notes.items():
            _line(console, Text(f"({place}) {note}"), hang=4)
    for needs, names in results.needs.items():
        _line(console, Text(f"Not run: {'; '.join(names)}. Needs {'; '.join(needs)}."), hang=2)
    for row in results.unrun:
        if row.command:
            _line(console, Text.assemble(f"To run {row.name}: ", (row.command, "dim")), hang=4)
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


@dataclass(frozen=True, slots=True)
class _Layout:
    """One printed table: some of a block's columns, beside the names of all its rows."""

    columns: tuple[Column, ...]
    separator: str
    """Between a number and its interval: a space, or a new line where room is short."""
    declared: tuple[tuple[str, str], ...]
    spelt: bool
    """Whether what methods declare stands in full; else in codes, which a legend explains."""


def _layouts(block: Block, columns: tuple[Column, ...], width: int) -> list[_Layout]:
    """One table where it fits; else several with the same rows, kinds of number kept together where they can be.

    Where it doesn't, what methods declare is abbreviated and stands in the first table only, and empty columns are left out.
    """
    codes = tuple(pair for pair in block.declared if pair[1] in _CODES)
    whole = [_Layout(columns, separator, *how) for separator in (" ", "\n") for how in ((block.declared, True), (codes, False))]
    if fitting := next((layout for layout in whole if _width(block, layout) <= width), None):
        return [fitting]
    columns = tuple(c for c in columns if any(c.name in row.values for row in block.rows)) or columns[:1]
    if _width(block, _Layout(columns[:1], "\n", codes, False)) > width:
        codes = ()  # on so narrow a terminal the legend says it
    parts: list[tuple[Column, ...]] = [()]
    for _, kind in by_kind(columns):
        for more in [kind] if _fits(block, kind, codes, width) else [(column,) for column in kind]:
            declared = codes if len(parts) == 1 else ()
            if parts[-1] and _width(block, _Layout(parts[-1] + more, "\n", declared, False)) > width:
                parts.append(more)
            else:
                parts[-1] += more
    return [_Layout(part, "\n", codes if place == 0 else (), False) for place, part in enumerate(parts)]


def _fits(block: Block, columns: tuple[Column, ...], declared: tuple[tuple[str, str], ...], width: int) -> bool:
    return _width(block, _Layout(columns, "\n", declared, False)) <= width


def _width(block: Block, layout: _Layout) -> int:
    """Columns of the terminal that a table needs, its names folded to the least width."""
    provenance = max(len(_provenance_heading(layout)), *(len(row.provenance) for row in block.rows))
    declared = [_declared_width(block, heading, name, layout.spelt) for heading, name in layout.declared]
    n = max(len(_n(row).plain) for row in block.rows)
    numbers = [_column_width(block, column, layout.separator) for column in layout.columns]
    return sum(2 + each for each in (_NAME_WIDTH, provenance, *declared, n, *numbers))


def _provenance_heading(layout: _Layout) -> str:
    return "provenance" if layout.spelt else "prov."


def _declared_width(block: Block, heading: str, name: str, spelt: bool) -> int:
    return max(len(heading if spelt else _SHORT[name]), *(len(_declared(row, name, spelt)) for row in block.rows))


def _declared(row: TableRow, name: str, spelt: bool) -> str:
    text = getattr(row, name)
    return (text if spelt else _CODES[name].get(text, text)) or ABSENT


def _column_width(block: Block, column: Column, separator: str) -> int:
    """Its widest cell, or the widest word of its heading."""
    cells = [line for row in block.rows for line in _cell(block, row, column, separator).plain.split("\n")]
    return max(len(text) for text in [*cells, *_heading_words(column), column.caveat])


def _heading_words(column: Column) -> list[str]:
    return column.heading.replace(" %", "\u00a0%").replace(" =", "\u00a0=").split(" ")


def _table(block: Block, layout: _Layout, notes: Mapping[str, int]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("", min_width=_NAME_WIDTH, max_width=44, overflow="fold")
    table.add_column(_provenance_heading(layout), no_wrap=True)
    for heading, name in layout.declared:
        table.add_column(heading if layout.spelt else _SHORT[name], no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for column in layout.columns:
        wrapped = "\n".join(wrap(" ".join(_heading_words(column)), _column_width(block, column, layout.separator)))
        heading_text = Text.assemble(wrapped, (f"\n{column.caveat}" if column.caveat else "", "dim"))
        table.add_column(heading_text, justify="right", no_wrap=True)
    rows = block.ordered_rows
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        table.add_row(
            Text.assemble(row.name, (f" ({notes[row.note]})" if row.note else "", "dim")), Text(row.provenance),
            *(_declared(row, name, layout.spelt) for _, name in layout.declared), _n(row),
            *(_cell(block, row, column, layout.separator) for column in layout.columns),
            style="dim" if row.group == "controls" else "", end_section=following is not None and following.group != row.group,
        )  # fmt: skip
    return table


def _n(row: TableRow) -> Text:
    return Text(str(row.n)) if row.status == "ok" else Text(row.status, "bold red" if row.status == "failed" else "italic")


def _legend(block: Block, columns: Sequence[Column], layouts: Sequence[_Layout]) -> list[str]:
    """Return the legend of abbreviations and omitted columns."""
    printed = [column for layout in layouts for column in layout.columns]
    dropped = [f"{column.heading}{_KINDS[column.kind]}" for column in columns if column not in printed]
    lines = [f"No row has a number in: {'; '.join(dropped)}."] if dropped else []
    if layouts[0].spelt:
        return lines
    for heading, name in block.declared:
        values = Counter(getattr(row, name) for row in block.ordered_rows if getattr(row, name))
        if (heading, name) in layouts[0].declared:
            codes = [f"{code} = {value}" for value in values if (code := _CODES[name].get(value, value)) != value]
            lines.append(f"{_SHORT[name]}{'' if _SHORT[name] == heading else f' ({heading})'}: {', '.join(codes)}")
        else:
            most = values.most_common(1)[0][0]
            named = {v: "; ".join(r.name for r in block.ordered_rows if getattr(r, name) == v) for v in values if v != most}
            lines.append(f"{heading}: " + ", ".join([*(f"{value} ({rows})" for value, rows in named.items()), f"else {most}"]))
    return lines


def _cell(block: Block, row: TableRow, column: Column, separator: str) -> Text:
    cell = block.cell(row, column)
    if cell is None:
        return Text(ABSENT)
    own_n = f"{cell.own_n} " if cell.own_n else ""
    return Text.assemble(
        own_n, (cell.number, "bold" if cell.best else ""), f"{separator}{cell.interval}" if cell.interval else ""
    )
