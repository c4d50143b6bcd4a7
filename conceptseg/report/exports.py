"""A finished table for other programs: CSV with full precision, and LaTeX with bold and intervals."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from conceptseg.files import write_atomically
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import ABSENT, KIND_NAMES, Column, by_kind
from conceptseg.report.results import Results
from conceptseg.report.selection import Selection

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    "†": r"$\dagger$", "∞": r"$\infty$", "α": r"$\alpha$", "λ": r"$\lambda$", "−": "$-$", "×": r"$\times$",
}  # fmt: skip


def write_exports(table: Results, folder: Path, selection: Selection | None = None, stem: str = "") -> list[Path]:
    """Write <stem>.csv and <stem>.tex to a folder; see `to_csv` and `to_latex`. stem: the table's name unless said."""
    stem = stem or table.table
    files = {folder / f"{stem}.csv": to_csv(table, selection), folder / f"{stem}.tex": to_latex(table, selection)}
    for file, text in files.items():
        write_atomically(file, text.encode())
    return list(files)


def to_csv(table: Results, selection: Selection | None = None) -> str:
    """One line a row and block: every number as a share or as it is, with interval, n and mark in columns of their own.

    Numbers have full precision unless the selection says how many decimals. Raises ConfigError for a selection that names what
    the table does not have.
    """
    selection = selection or Selection()
    table = selection.all_columns(table)
    ends = ("low", "high") if selection.intervals else ()
    columns = [name for c in table.columns for name in (c.name, *(f"{c.name} {part}" for part in (*ends, "n", "mark")))]
    head = ["block", "protocol", "row", "group", "status", "extractor", "backbone", "provenance", "told", "names", "trained_on"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [*head, "view", "segmenter", "run_id", "n", "excluded", "failed", *columns, "series", "x", "note", "needs", "command"]
    )
    for block in table.blocks:
        for row in block.ordered_rows:
            cells: list[object] = []
            for column in table.columns:
                value = row.values.get(column.name)
                if value is None:
                    cells += [""] * (3 + len(ends))
                    continue
                numbers = (value.value, value.low, value.high)[: 1 + len(ends)]
                cells += [*(_shortened(number, column, selection) for number in numbers), value.n, value.mark]
            fixed = (block.name, block.protocol, row.name, row.group, row.status, row.extractor, row.backbone, row.provenance)
            read = (row.told, row.names, row.trained_on, row.view, row.segmenter, row.run_id, row.n, row.excluded, row.failed)
            writer.writerow(
                [
                    "" if cell is None else _inert(cell)
                    for cell in (*fixed, *read, *cells, row.series, row.x, row.note, "; ".join(row.needs), row.command)
                ]
            )
    return buffer.getvalue()


def _shortened(number: float | None, column: Column, selection: Selection) -> float | None:
    """A share with the decimals that its percentage was asked for."""
    digits = selection.digits_of(column)
    return number if number is None or digits is None else round(number, digits + 2)


def _inert(cell: object) -> object:
    """Words that a spreadsheet would take for a formula are shown as words."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def to_latex(table: Results, selection: Selection | None = None) -> str:
    """A booktabs table for each block: groups of columns under their kind, best method bold, intervals small beside numbers.

    Shows mIoU and mAP unless the selection says otherwise. A table wider than the text is scaled down to it; marks and notes of
    rows are explained below. Raises ConfigError for a selection that names what the table does not have.
    """
    shown = (selection or Selection()).few_columns(table)
    return "\n".join(_block(block, shown, number) for number, block in enumerate(shown.blocks, 1))


def _block(block: Block, table: Results, number: int) -> str:
    columns = [c for c in table.columns if any(c.name in row.values for row in block.rows)]
    notes = {note: place for place, note in enumerate(dict.fromkeys(r.note for r in block.ordered_rows if r.note), 1)}
    lines = [
        "% needs \\usepackage{booktabs,graphicx}",
        "\\begin{table}",
        "\\centering\\small",
        "\\sbox0{%",
        f"\\begin{{tabular}}{{lr{'r' * len(columns)}}}",
        "\\toprule",
        *_kinds(columns),
        " & ".join(["", "$n$", *(_tex(c.heading) for c in columns)]) + r" \\",
        "\\midrule",
    ]
    before = ""
    for row in block.ordered_rows:
        if before == "methods" and row.group == "controls":
            lines.append("\\midrule")
        before = row.group
        name = rf"\textit{{{_tex(row.name)}}}" if row.group == "controls" else _tex(row.name)
        name += rf"\textsuperscript{{{notes[row.note]}}}" if row.note else ""
        n = f"{row.n:,}".replace(",", r"\,") if row.status == "ok" else rf"\textit{{{row.status}}}"
        lines.append(" & ".join([name, n, *(_cell(block, row, c) for c in columns)]) + r" \\")
    said = " ".join(filter(None, [f"{block.name}:", block.text, f"{block.dataset}; protocol {block.protocol}."]))
    if given := block.names_given:
        said += f" Names given to methods: {given}."
    if any(column.intervals and column.kind not in ("quoted", "cost") for column in columns) and table.interval:
        said += f" Brackets: {table.interval}."
    below = [
        *(_tex(text) for text in table.explained_marks(block)),
        *(rf"\textsuperscript{{{p}}} {_tex(t)}" for t, p in notes.items()),
    ]
    lines += [
        "\\bottomrule", "\\end{tabular}}",
        "\\ifdim\\wd0>\\textwidth\\sbox0{\\resizebox{\\textwidth}{!}{\\usebox0}}\\fi",
        "\\ifdim\\dimexpr\\ht0+\\dp0>0.8\\textheight\\sbox0{\\resizebox*{!}{0.8\\textheight}{\\usebox0}}\\fi",
        "\\usebox0",
        *(rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {text}}}" for text in below),
        f"\\caption{{{_tex(said)}}}", f"\\label{{tab:{table.table}-{number}}}", "\\end{table}", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _kinds(columns: list[Column]) -> list[str]:
    """A line of group headings, where a table has several kinds of number."""
    if len({c.kind for c in columns}) < 2:
        return []
    cells, rules, at = ["", ""], [], 3
    for kind, group in by_kind(columns):
        cells.append(rf"\multicolumn{{{len(group)}}}{{c}}{{{KIND_NAMES[kind]}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + len(group) - 1}}}")
        at += len(group)
    return [" & ".join(cells) + r" \\", " ".join(rules)]


def _cell(block: Block, row: TableRow, column: Column) -> str:
    cell = block.cell(row, column)
    if cell is None:
        return _tex(ABSENT)
    written = rf"\textbf{{{_tex(cell.number)}}}" if cell.best else _tex(cell.number)
    return written + (rf" {{\scriptsize {cell.interval}}}" if cell.interval else "")


def _tex(text: str) -> str:
    return re.sub(r'"([^"]*)"', r"``\1''", "".join(_TEX.get(letter, letter) for letter in text))
