"""A finished table on a terminal or in a log file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import ABSENT, Column, by_kind
from conceptseg.report.results import Results
from conceptseg.report.selection import Selection

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


def print_table(
    results: Results, console: Console | None = None, selection: Selection | None = None, detail: str = "brief"
) -> None:
    """Print a finished table; a file has as many columns as COLUMNS says, else 120.

    detail: "brief", a few rows and columns that fit one screen, or "full", everything that the table holds. Raises ConfigError
    for a selection that names what the table does not have.
    """
    console = console or _stdout()
    if detail == "full":
        _print_full(results, console, selection or Selection())
    else:
        _print_brief(results, console, selection or Selection())


def _stdout() -> Console:
    """Bold and colours on a terminal only, and nowhere if NO_COLOR is set."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_A_FILE
    return Console(width=width, color_system=None if os.environ.get("NO_COLOR") else "auto", highlight=False)


# ---------------------------------------------------------------- brief


def _print_brief(results: Results, console: Console, selection: Selection) -> None:
    shown = selection.brief(results)
    whole = {block.name: block for block in results.blocks}
    notes = _numbered_notes(shown)
    console.print(_cut(Text(results.title, "bold"), console.width))
    for line in _brief_lines(shown, whole, notes, console.width):
        line.rstrip()
        console.print(line, no_wrap=True, crop=False)
    console.print()
    said = [f"[{results.interval}]" if selection.intervals and results.interval and _has_intervals(shown) else ""]
    said += ["bold is best" if console.color_system and _has_best(shown) else ""]
    if any(said):
        _line(console, Text("; ".join(filter(None, said)), "dim"), hang=2)
    given = {block.name: block.names_given for block in shown.blocks if block.names_given}
    if rules := list(dict.fromkeys(given.values())):
        each = rules if len(rules) == 1 else [f"{rule} ({', '.join(b for b in given if given[b] == rule)})" for rule in rules]
        _line(console, Text(f"Names given to methods: {'; '.join(each)}.", "dim"), hang=2)
    for explained in dict.fromkeys(note for block in shown.blocks for note in shown.explained_marks(block)):
        _line(console, Text(explained, "dim"), hang=2)
    for note, place in notes.items():
        console.print(_cut(Text(f"({place}) {note}", "dim"), console.width))
    for needs, names in list(results.needs.items())[:_MOST_LINES]:
        said_needs = f"Not run, {_counted(len(names), 'row')}: needs {'; '.join(needs)}."
        console.print(_cut(Text(said_needs), console.width))
    if (more := len(results.needs) - _MOST_LINES) > 0:
        console.print(f"Not run for {more} more reasons: report.detail=full")
    if command := next((row.command for row in results.unrun if row.command), ""):
        _line(console, Text.assemble("To run one of them: ", (command, "dim")), hang=4)
    for problem in _problems(results):
        _line(console, Text(problem, "bold red"), hang=2)


def _brief_lines(shown: Results, whole: Mapping[str, Block], notes: Mapping[str, int], width: int) -> Iterator[Text]:
    """Every block under its heading, all with the same columns: as many as fit, with names that are cut rather than wrapped."""
    rows = [(block, row) for block in shown.blocks for row in block.ordered_rows]
    titles = {block.name: _heading(block, whole[block.name]) for block in shown.blocks}
    names = {(block.name, row.name): (row.name, _behind_name(row, block, notes)) for block, row in rows}
    columns = [
        _BriefColumn(column.heading + (f", {column.caveat}" if column.caveat else ""), {
            (block.name, row.name): _parts(block, row, column) for block, row in rows
        })
        for column in shown.columns
    ]  # fmt: skip
    longest = max(map(len, (*map("".join, names.values()), *(title.plain for title in titles.values()))))
    given = _BriefColumn(GIVEN, {(block.name, row.name): (Text(_given(row)), "") for block, row in rows})
    fitting = [*columns, given] if any(_given(row) for _, row in rows) else columns
    if given in fitting and _room(fitting, width) < min(longest, _LONG_NAME):
        fitting = columns
    while len(fitting) > 1 and _room(fitting, width) < min(longest, _SHORT_NAME):
        fitting = fitting[:-1]
    name_width = max(min(longest, _room(fitting, width)), _SHORTEST_NAME)
    for block in shown.blocks:
        yield Text()
        yield Text.assemble(_padded(titles[block.name], name_width), *(c.padded(Text(c.heading, "bold")) for c in fitting))
        before = ""
        for row in block.ordered_rows:
            if before == "methods" and row.group == "controls":
                yield Text("\u2500" * (width - _room(fitting, width) + name_width), "dim")
            before = row.group
            place = block.name, row.name
            name, behind = names[place]
            named = _cut(Text(name), max(name_width - len(behind), 1)).append(behind, "dim")
            yield Text.assemble(_padded(named, name_width), *(c.padded(c.cell(place)) for c in fitting))
    if missing := [column.heading for column in columns if column not in fitting]:
        yield Text(f"Too narrow for {'; '.join(missing)}.", "dim")


def _room(columns: Sequence[_BriefColumn], width: int) -> int:
    """Return the width that is left for names beside some columns."""
    return width - sum(2 + column.width for column in columns)


class _BriefColumn:
    """A heading above a cell for every (block, row): numbers end below one another, what follows them begins so."""

    def __init__(self, heading: str, cells: Mapping[tuple[str, str], tuple[Text, str]]) -> None:
        self.heading, self._cells = heading, cells
        self._first = max(first.cell_len for first, _ in cells.values())
        self.width = max(len(heading), *(len(self.cell(place).plain) for place in cells))

    def cell(self, place: tuple[str, str]) -> Text:
        first, rest = self._cells[place]
        return Text.assemble(" " * (self._first - first.cell_len if rest else 0), first, f" {rest}".rstrip())

    def padded(self, text: Text) -> Text:
        return Text.assemble("  ", text, " " * (self.width - text.cell_len))


GIVEN = "shown/trained"
"""Heading of what a method is shown of an image and what its model was trained on."""
_GIVEN_TOLD = {
    "nothing": "-", "own prediction": "guess", "true name": "name", "name and prompt": "prompt", "truth": "truth"
}  # fmt: skip
_GIVEN_TRAINED = {
    "nothing": "-", "images": "images", "class labels": "labels", "images and captions": "captions", "masks or boxes": "masks"
}  # fmt: skip
_LONG_NAME, _SHORT_NAME, _SHORTEST_NAME = 40, 24, 8
"""Columns that names keep: beside what methods are shown, beside a further metric, and in any case."""


def _given(row: TableRow) -> str:
    if not row.told and not row.trained_on:
        return ""
    return f"{_GIVEN_TOLD.get(row.told, row.told) or '-'}/{_GIVEN_TRAINED.get(row.trained_on, row.trained_on) or '-'}"


def _heading(block: Block, whole: Block) -> Text:
    """The block's name, how many of its methods are shown, and the samples behind each number."""
    methods, of = (sum(row.group == "methods" for row in b.rows) for b in (block, whole))
    n, status = _usual_n(block), " and ".join(sorted({row.status for row in block.rows}))
    said = ", ".join([*([f"{methods} of {of}"] if methods < of else []), f"n={n}" if n else status])
    return Text.assemble((block.name, "bold"), (f" ({said})" if said else "", "dim"))


def _usual_n(block: Block) -> int:
    counted = Counter(row.n for row in block.rows if row.status == "ok")
    return counted.most_common(1)[0][0] if counted else 0


def _behind_name(row: TableRow, block: Block, notes: Mapping[str, int]) -> str:
    """Return the text behind a row's name: its n or status where that is not its block's, and the number of its note."""
    n = f" n={row.n}" if row.status == "ok" and row.n != _usual_n(block) else ""
    status = f" {row.status}" if row.status != "ok" and _usual_n(block) else ""
    return f"{n}{status}" + (f" ({notes[row.note]})" if row.note else "")


def _padded(text: Text, width: int) -> Text:
    text = _cut(text, width)
    text.pad_right(width - text.cell_len)
    return text


def _cut(text: Text, width: int) -> Text:
    """One line, with an ellipsis where it is too long."""
    text = text.copy()
    text.truncate(width, overflow="ellipsis")
    return text


def _numbered_notes(results: Results) -> dict[str, int]:
    """Note of a row -> its number; the same note has one number."""
    rows = [row for block in results.blocks for row in block.ordered_rows]
    return {note: place for place, note in enumerate(dict.fromkeys(row.note for row in rows if row.note), 1)}


def _has_intervals(results: Results) -> bool:
    return any(value.low is not None for block in results.blocks for row in block.rows for value in row.values.values())


def _has_best(results: Results) -> bool:
    return any(block.best(column) for block in results.blocks for column in results.columns)


def _problems(results: Results) -> list[str]:
    """Samples that failed or were left out, of every row, also of those that are not shown."""
    lines = [
        f"{block.name}, {row.name}: {row.failed} failed, {row.excluded} excluded."
        for block in results.blocks
        for row in block.ordered_rows
        if row.failed or row.excluded
    ]
    more = len(lines) - _MOST_LINES
    return lines if more <= 0 else [*lines[:_MOST_LINES], f"{more} more rows have failed or excluded samples."]


_MOST_LINES = 3
"""About rows that were not run, and about rows with samples that failed."""


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# ---------------------------------------------------------------- full


def _print_full(results: Results, console: Console, selection: Selection) -> None:
    """Print every block with n and intervals, then what the columns mean, what was left out, and the runs behind the numbers.

    Where the metrics don't fit side by side, intervals go to a second line, then what methods declare is abbreviated; where that
    doesn't fit either, a block becomes several tables with the same rows.
    """
    results = selection.all_columns(results)
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
    cell = "number" + (f" [interval]{f': {results.interval}' if results.interval else ''}" if selection.intervals else "")
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
            rest = f"else {most}" if values.total() == len(block.rows) else f"else {most} where a row says it"
            lines.append(f"{heading}: " + ", ".join([*(f"{value} ({rows})" for value, rows in named.items()), rest]))
    return lines


def _cell(block: Block, row: TableRow, column: Column, separator: str) -> Text:
    number, interval = _parts(block, row, column)
    return Text.assemble(number, f"{separator}{interval}" if interval else "")


def _parts(block: Block, row: TableRow, column: Column) -> tuple[Text, str]:
    """A number, behind its own n where that differs from the row's, and its interval."""
    cell = block.cell(row, column)
    if cell is None:
        return Text(ABSENT), ""
    return Text.assemble(f"{cell.own_n} " if cell.own_n else "", (cell.number, "bold" if cell.best else "")), cell.interval
