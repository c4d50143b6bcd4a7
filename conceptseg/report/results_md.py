"""RESULTS.md and benchmarks/<table>/README.md: build products of benchmarks/*/results.json, in marked sections.

RESULTS.md begins with an overview and has a section for each table of which something was computed. A table of which nothing was
run is a line of the overview; what it quotes and needs is in benchmarks/<table>/README.md. Text around the marks is left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from conceptseg.errors import ReportError
from conceptseg.files import locked, write_atomically
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import ABSENT, Column
from conceptseg.report.digits import rounded
from conceptseg.report.figure import figure_svg
from conceptseg.report.results import Results, load

HEADER = """# Results

Numbers of conceptseg, a benchmark harness for zero-shot segmentation with saliency methods. Each has a definition, an interval, a
command that computes it and the runs behind it. Numbers that papers print are quoted in columns of their own.

`conceptseg-report --write` writes what stands between two `conceptseg` marks; edit the text around them, not inside.
"""
README_HEADER = "<!-- Written by conceptseg-report --write. -->\n"
OVERVIEW = "(overview)"
FIGURE = "figure.svg"
MOST_NEEDS = 3  # named in one line of the overview
_MARK = re.compile(r"^<!-- conceptseg:(begin|end) (\S+) -->[ \t\r]*$", re.MULTILINE)
_KINDS = {
    "standard": "standard definition",
    "released": "as released code computes it",
    "quoted": "quoted, not computed here",
    "difference": "paired difference",
    "cost": "what it cost here",
}


def render(results: Results, level: int = 2) -> str:
    """One table as GitHub Markdown, without marks; ends with a newline and depends on nothing but its arguments.

    level: of its heading.
    """
    parts = [f"{'#' * level} {_text(results.title)}", f"```sh\n{' '.join(results.command.split())}\n```", *_needs(results)]
    for block in results.blocks:
        protocol = f" Protocol: {_code(block.protocol)}." if block.protocol else ""
        parts += [
            f"{'#' * (level + 1)} {_text(block.name)}",
            f"{_text(block.text)} Data: {_text(block.dataset)}.{protocol}".strip(),
            _block_table(block, results.columns),
        ]
    cell = "number [interval]" + (f": {_text(results.interval)}" if results.interval else "")
    legend = f"Each cell is {cell}. n counts scored samples. Bold is the best method of a column; controls are in italics."
    if results.computed:
        legend += " Another machine may move a number by one unit of its last digit."
    if results.sheet:
        parts.append(f"![Picture sheet of {_text(results.table)}]({quote(results.sheet)})")
    parts += [
        legend,
        "**Definitions**",
        "\n".join(_definition(column) for column in results.columns),
        *(["**Notes**", "\n".join(f"- {_text(note)}" for note in results.notes)] if results.notes else []),
    ]
    if commands := [line for row in results.unrun if row.command for line in (f"# {' '.join(row.name.split())}", row.command)]:
        parts.append(
            "\n".join(
                ["<details>", "<summary>Commands of single rows</summary>", "", "```sh", *commands, "```", "", "</details>"]
            )
        )
    if results.computed:
        parts += [
            f"<details>\n<summary>Runs behind these numbers (conceptseg {_text(results.conceptseg)})</summary>",
            _runs(results.blocks),
            "</details>",
        ]
    return "\n\n".join(parts) + "\n"


def overview(tables: Sequence[Results], benchmarks: str) -> str:
    """The first screen: headline numbers, then a line for each table. benchmarks: its folder, as a link from RESULTS.md."""
    parts = []
    for table in tables:
        if grid := _headline(table):
            link = f"[all rows, definitions and intervals](#{_anchor(table.title)})"
            drawn = figure_svg(table)
            address = quote(f"{benchmarks}/{table.table}/{FIGURE}")
            picture = [f"![Methods by mIoU and mAP with intervals, controls as lines]({address})"] if drawn else []
            parts += [f"## {_text(table.title)}, in brief", *picture, grid, f"In percent; controls are in italics; {link}."]
    parts.append("## Tables")
    if run := [table for table in tables if table.computed]:
        parts += [
            "Computed:",
            "\n".join(f"- [{_text(t.title)}](#{_anchor(t.title)}), {_size(t)}: {_command(t)}" for t in run),
        ]
    if unrun := [table for table in tables if not table.computed]:
        lines = [
            f"- [{_text(t.title)}]({quote(f'{benchmarks}/{t.table}')}/README.md), {_size(t)}. {_needs_in_brief(t)}{_command(t)}"
            for t in unrun
        ]
        parts += ["Not run; each page has the quoted numbers, what the rows need and their commands:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write(path: Path, benchmarks: Path) -> None:
    """Bring RESULTS.md, at `path`, and each benchmarks/<table>/README.md up to date.

    Processes that write at the same time take turns, so that no section is lost. Raises ReportError for a broken table or mark,
    before anything is written.
    """
    with locked(path):
        _write(path, benchmarks)


def _write(path: Path, benchmarks: Path) -> None:
    tables = [load(file) for file in sorted(benchmarks.glob("*/results.json"))]
    text = page_to_change(path, HEADER)
    wanted = _sections(tables, _link(path, benchmarks))
    for name in [name for name in _spans(text, path) if name not in wanted]:
        text = _without_section(text, name, path)
    for name, body in wanted.items():
        text = _with_section(text, name, body, path)
    pages = {}
    for table in tables:
        page = benchmarks / table.table / "README.md"
        held = page_to_change(page, README_HEADER)
        if not table.computed:
            pages[page] = _with_section(held, table.table, render(table, 1), page)
        elif table.table in _spans(held, page):
            pages[page] = _without_section(held, table.table, page)
    for place, drawn in _figures(tables, benchmarks).items():
        write_atomically(place, drawn.encode())
    for page, content in pages.items():
        if content.strip() in ("", README_HEADER.strip()):
            page.unlink()
        else:
            write_atomically(page, content.encode())
    write_atomically(path, text.encode())


def check(path: Path, benchmarks: Path) -> list[str]:
    """One sentence for each section that is missing, stale or an orphan; empty when all pages are what the tables say."""
    sentences, tables, broken = [], [], set()
    for file in sorted(benchmarks.glob("*/results.json")):
        try:
            results = load(file)
        except ReportError as error:
            sentences.append(str(error))
            broken.add(file.parent.name)
            continue
        if results.table != file.parent.name:
            sentences.append(f'{file} holds table "{results.table}", but its folder is "{file.parent.name}"; rename one of them.')
            broken.add(file.parent.name)
            continue
        if rounded(results) != results:
            again = f"{results.command} report.publish=yes"
            sentences.append(f"{file} holds more digits than are published; publish it again: {again}")
        tables.append(results)
    wanted = _sections(tables, _link(path, benchmarks))
    if broken:  # the overview is of all tables
        wanted.pop(OVERVIEW, None)
    sentences += _page_problems(path, wanted, broken | {OVERVIEW} if broken else set())
    for place, drawn in _figures(tables, benchmarks).items():
        if not place.exists() or place.read_text(encoding="utf-8", errors="replace") != drawn:
            sentences.append(f"{place} is missing or stale; draw it again: conceptseg-report --write")
    pages = {table.table: render(table, 1) for table in tables if not table.computed}
    for folder in sorted(pages.keys() | {page.parent.name for page in benchmarks.glob("*/README.md")}):
        mine = {folder: pages[folder]} if folder in pages else {}
        sentences += _page_problems(benchmarks / folder / "README.md", mine, broken)
    return sentences


def _figures(tables: Iterable[Results], benchmarks: Path) -> dict[Path, str]:
    """Place -> figure of each table that the overview shows one of."""
    headed = [table for table in tables if table.computed and _headline(table)]
    return {benchmarks / table.table / FIGURE: drawn for table in headed if (drawn := figure_svg(table, alone=True))}


def _sections(tables: Iterable[Results], benchmarks: str) -> dict[str, str]:
    """Name -> text of each section of RESULTS.md, the overview first."""
    tables = list(tables)
    found = {OVERVIEW: overview(tables, benchmarks)} if tables else {}
    return found | {table.table: render(table) for table in tables if table.computed}


def _page_problems(path: Path, wanted: Mapping[str, str], unknown: set[str]) -> list[str]:
    """A sentence for each section of a page that is not as it is wanted; those of `unknown` may be as they are."""
    try:
        text = _page(path, "")
        spans = _spans(text, path)
    except ReportError as error:
        return [str(error)]
    sentences = []
    for name, body in wanted.items():
        what = "overview" if name == OVERVIEW else f'section of table "{name}"'
        if name not in spans:
            sentences.append(f"{path} has no {what}; write it: conceptseg-report --write")
        elif text[spans[name][1] : spans[name][2]].replace("\r\n", "\n").strip("\n") != body.strip("\n"):
            sentences.append(f"{path}: the {what} is stale; write it again: conceptseg-report --write")
    for name in spans.keys() - wanted.keys() - unknown:
        sentences.append(
            f'{path}: the section of table "{name}" has no place here, since no results.json wants it; compute the table, or '
            "delete the section: conceptseg-report --write"
        )
    return sentences


def page_to_change(path: Path, absent: str) -> str:
    """The text of a page that is about to be written; `absent` where there is none.

    Raises ReportError for a page that can't be read as text, and for one that its owner has made read-only.
    """
    text = _page(path, absent)
    if path.exists() and not path.stat().st_mode & 0o222:
        raise ReportError(f"writing {path}: the file is read-only. Make it writable, or name another with report.results_md.")
    return text


def _page(path: Path, absent: str) -> str:
    try:
        return path.read_bytes().decode() if path.exists() else absent
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ReportError(f"reading {path}, line {line}: it is not UTF-8. Save it as UTF-8, or move it away.") from error
    except OSError as error:
        raise ReportError(f"reading {path}: {error.strerror}. Move it away, or name another page.") from error


def _link(path: Path, benchmarks: Path) -> str:
    return Path(os.path.relpath(benchmarks, path.parent)).as_posix()


def _with_section(text: str, name: str, body: str, path: Path) -> str:
    """The page with this section replaced, or added: the overview first, then tables by name."""
    spans = _spans(text, path)
    section = f"<!-- conceptseg:begin {name} -->\n{body}<!-- conceptseg:end {name} -->"
    if name in spans:
        begin, _, _, end = spans[name]
        return text[:begin] + section + text[end:]
    if later := [span[0] for other, span in spans.items() if _order(other) > _order(name)]:
        return text[: min(later)] + section + "\n\n" + text[min(later) :]
    if spans:
        end = max(span[3] for span in spans.values())
        return text[:end] + "\n\n" + section + (text[end:] or "\n")
    return (text.rstrip("\n") + "\n\n" if text.strip() else "") + section + "\n"


def _order(name: str) -> tuple[bool, str]:
    return name != OVERVIEW, name


def _without_section(text: str, name: str, path: Path) -> str:
    begin, _, _, end = _spans(text, path)[name]
    return text[:begin] + text[end:].lstrip("\r\n")


def _spans(text: str, path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Table -> offsets of its begin mark, the text after that mark, its end mark, and the text after the section."""
    spans: dict[str, tuple[int, int, int, int]] = {}
    opened: re.Match[str] | None = None
    for mark in _MARK.finditer(text):
        word, name = mark.groups()
        line = text.count("\n", 0, mark.start()) + 1
        if (word == "begin") != (opened is None) or (opened and opened[2] != name) or (word == "begin" and name in spans):
            raise ReportError(
                f'{path}, line {line}: mark "{word} {name}" does not pair with the marks before it.\n'
                "  Each table needs one begin mark and then its end mark; fix the marks, or delete the section."
            )
        if opened is None:
            opened = mark
        else:
            spans[name] = (opened.start(), opened.end(), mark.start(), mark.end())
            opened = None
    if opened is not None:
        raise ReportError(f'{path}: section "{opened[2]}" is never closed. Add <!-- conceptseg:end {opened[2]} --> after it.')
    return spans


# ---------------------------------------------------------------- pieces of the overview


def _headline(table: Results) -> str:
    """The headline rows of a table under its headline columns, block beside block; empty where it has none."""
    columns = [column for column in table.columns if column.headline]
    rows = {row.name: row for block in table.blocks for row in block.ordered_rows if row.headline}
    if not columns or not rows:
        return ""
    head, lines = [""], []
    for block in table.blocks:
        head += [f"{_text(block.name)}:<br>{_text(column.label)}" for column in columns]
    for name, row in rows.items():
        line = [f"*{_text(name)}*" if row.group == "controls" else _text(name)]
        for block in table.blocks:
            mine = next((row for row in block.rows if row.name == name), None)
            cells = [block.cell(mine, column) if mine else None for column in columns]
            line += [ABSENT if cell is None else cell.number for cell in cells]
        lines.append(line)
    return _grid(head, lines, left=1)


def _size(table: Results) -> str:
    rows = [row for block in table.blocks for row in block.rows]
    unrun = sum(row.status == "not run" for row in rows)
    return f"{len(rows)} row{'s' * (len(rows) > 1)}" + (f", {unrun} of them not run" if 0 < unrun < len(rows) else "")


def _command(table: Results) -> str:
    return _code(table.command)


def _needs_in_brief(table: Results) -> str:
    """Return the requirements that all rows share, and the number of further ones."""
    every = [set(needs) for needs in table.needs]
    if not every:
        return ""
    shared = set.intersection(*every)
    named = [one for one in dict.fromkeys(one for needs in table.needs for one in needs)]
    if len(named) > MOST_NEEDS:
        others = len(named) - len(shared)
        named = [one for one in named if one in shared] + [f"{others} others, each for some of the rows"]
    return f"Needs {_text('; '.join(named))}. "


def _anchor(title: str) -> str:
    """The address that GitHub gives a heading.

    >>> _anchor("The lab: every method in miniature, on drawn scenes")
    'the-lab-every-method-in-miniature-on-drawn-scenes'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ---------------------------------------------------------------- pieces of a section


def _needs(results: Results) -> list[str]:
    """Return a paragraph with the requirements of rows that were not run; rows with the same ones are listed together."""
    if len(results.needs) == 1 and not results.computed:
        (needs,) = results.needs
        return [f"Not run. Needs {_text('; '.join(needs))}."]
    lines = [f"- {_text('; '.join(needs))}: {_text('; '.join(names))}" for needs, names in results.needs.items()]
    return ["Rows that were not run need:", "\n".join(lines)] if lines else []


def _block_table(block: Block, columns: Sequence[Column]) -> str:
    headings = [_text(column.heading) + (f"<br>{column.caveat}" if column.caveat else "") for column in columns]
    rows = []
    for row in block.ordered_rows:
        name = f"*{_text(row.name)}*" if row.group == "controls" else _text(row.name)
        note = f"<br><sub>{_text(row.note)}</sub>" if row.note else ""
        n = str(row.n) if row.status == "ok" else row.status
        declared = [_text(getattr(row, name)) or ABSENT for _, name in block.declared]
        rows.append([name + note, row.provenance, *declared, n, *(_cell(block, row, column) for column in columns)])
    properties = [heading for heading, _ in block.declared]
    return _grid(["row", "provenance", *properties, "n", *headings], rows, left=2 + len(properties))


def _cell(block: Block, row: TableRow, column: Column) -> str:
    cell = block.cell(row, column)
    if cell is None:
        return ABSENT
    return " ".join(part for part in (f"**{cell.number}**" if cell.best else cell.number, cell.interval, cell.own_n) if part)


def _definition(column: Column) -> str:
    source = f" Source: {_text(column.source)}" if column.source else ""
    return f"- **{_text(column.label)}** ({_KINDS[column.kind]}; {_code(column.name)}): {_text(column.text)}{source}"


def _runs(blocks: Sequence[Block]) -> str:
    rows = [
        [
            _text(block.name), _text(row.name), _code(run.run_id), _code(row.extractor), _code(row.backbone or ""),
            _code(run.view), _code(run.segmenter), str(run.n), str(run.excluded), str(run.failed),
        ]
        for block in blocks
        for row in block.ordered_rows
        for run in row.runs
    ]  # fmt: skip
    head = ["block", "row", "run id", "extractor", "backbone", "view", "segmenter", "n", "excluded", "failed"]
    return _grid(head, rows, left=7)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are aligned left, the others right."""
    rule = [":--"] * left + ["--:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def _text(text: str) -> str:
    """Someone's words as one line of Markdown that can't open a tag or a table cell."""
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|")):
        text = text.replace(raw, safe)
    return " ".join(text.split())


def _code(text: str) -> str:
    """A name as code, empty as an en dash. A pipe is escaped even here: a table cell ends at any other."""
    if not text.strip():
        return ABSENT
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"
