"""RESULTS.md: a build product, one marked section per finished table, with any text around the sections left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from conceptseg.errors import ReportError
from conceptseg.files import locked, write_atomically
from conceptseg.report.digits import rounded
from conceptseg.report.results import ABSENT, Block, Column, Results, TableRow, load

HEADER = """# Results

Every section between two `conceptseg` marks is written by the command that it names; edit the text around them, not inside.
"""
_MARK = re.compile(r"^<!-- conceptseg:(begin|end) (\S+) -->[ \t\r]*$", re.MULTILINE)
_KINDS = {
    "standard": "standard definition",
    "released": "as released code computes it",
    "quoted": "quoted, not computed here",
    "difference": "paired difference",
    "cost": "what it cost here",
}


def render(results: Results) -> str:
    """One table as GitHub Markdown, without marks; ends with a newline and depends on nothing but its argument."""
    parts = [f"## {_text(results.title)}", f"```sh\n{' '.join(results.command.split())}\n```"]
    for block in results.blocks:
        parts += [
            f"### {_text(block.name)}",
            f"{_text(block.text)} Data: {_text(block.dataset)}. Protocol: {_code(block.protocol)}.".strip(),
            _block_table(block, results.columns),
        ]
    cell = "number [interval]" + (f": {_text(results.interval)}" if results.interval else "")
    legend = f"Each cell is {cell}. n counts scored samples. Bold is the best method of a column; controls are in italics."
    if results.sheet:
        parts.append(f"![Picture sheet of {_text(results.table)}]({quote(results.sheet)})")
    parts += [
        legend,
        "**Definitions**",
        "\n".join(_definition(column) for column in results.columns),
        *(["**Notes**", "\n".join(f"- {_text(note)}" for note in results.notes)] if results.notes else []),
        f"<details>\n<summary>Runs behind these numbers (conceptseg {_text(results.conceptseg)})</summary>",
        _runs(results.blocks),
        "</details>",
    ]
    return "\n\n".join(parts) + "\n"


def update(path: Path, results: Results) -> None:
    """Replace the section of this table, or add it among the others by name; everything outside its marks stays as it was.

    Processes that write at the same time take turns, so that no section is lost.
    """
    with locked(path):
        _update(path, results)


def _update(path: Path, results: Results) -> None:
    text = path.read_bytes().decode() if path.exists() else HEADER
    spans = _spans(text, path)
    section = f"<!-- conceptseg:begin {results.table} -->\n{render(results)}<!-- conceptseg:end {results.table} -->"
    if results.table in spans:
        begin, _, _, end = spans[results.table]
        text = text[:begin] + section + text[end:]
    elif later := [span[0] for name, span in spans.items() if name > results.table]:
        text = text[: min(later)] + section + "\n\n" + text[min(later) :]
    elif spans:
        end = max(span[3] for span in spans.values())
        text = text[:end] + "\n\n" + section + (text[end:] or "\n")
    else:
        text = (text.rstrip("\n") + "\n\n" if text.strip() else "") + section + "\n"
    write_atomically(path, text.encode())


def check(path: Path, benchmarks: Path) -> list[str]:
    """One sentence for each section that is missing, stale or an orphan; empty when RESULTS.md is what the tables say."""
    sentences, tables = [], set()
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        spans = _spans(text, path)
    except ReportError as error:
        return [str(error)]
    for file in sorted(benchmarks.glob("*/results.json")):
        tables.add(file.parent.name)
        try:
            results = load(file)
        except ReportError as error:
            sentences.append(str(error))
            continue
        if results.table != file.parent.name:
            sentences.append(f'{file} holds table "{results.table}", but its folder is "{file.parent.name}"; rename one of them.')
        elif rounded(results) != results:
            sentences.append(
                f"{file} holds more digits than are published; publish it again: {results.command} report.publish=yes"
            )
        elif results.table not in spans:
            sentences.append(f'{path.name} has no section for table "{results.table}" ({file}); write it from that file.')
        else:
            _, inner_begin, inner_end, _ = spans[results.table]
            if text[inner_begin:inner_end].replace("\r\n", "\n").strip("\n") != render(results).strip("\n"):
                sentences.append(f'{path.name}: the section of table "{results.table}" is stale; write it again from {file}.')
    for name in spans:
        if name not in tables:
            file = benchmarks / name / "results.json"
            sentences.append(f'{path.name}: the section of table "{name}" has no {file}; delete it or compute the table.')
    return sentences


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
                "  Each table wants one begin mark and then its end mark; mend the marks by hand, or delete the section."
            )
        if opened is None:
            opened = mark
        else:
            spans[name] = (opened.start(), opened.end(), mark.start(), mark.end())
            opened = None
    if opened is not None:
        raise ReportError(f'{path}: section "{opened[2]}" is never closed. Add <!-- conceptseg:end {opened[2]} --> after it.')
    return spans


# ---------------------------------------------------------------- pieces of a section


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
    if not rows:
        return "None: no row of this table was run."
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
