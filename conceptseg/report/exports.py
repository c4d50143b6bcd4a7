"""A finished table for other programs: CSV with full precision, and LaTeX with bold and intervals."""

from __future__ import annotations

import csv
import io

from conceptseg.report.results import ABSENT, KIND_NAMES, Block, Column, Results, TableRow, by_kind

_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    "†": r"$\dagger$", "∞": r"$\infty$", "α": r"$\alpha$", "λ": r"$\lambda$", "−": "$-$", "×": r"$\times$",
}  # fmt: skip


def to_csv(table: Results) -> str:
    """Return one line per row and block: every number at full precision, with interval, n and mark in separate columns."""
    columns = [
        name for c in table.columns for name in (c.name, f"{c.name} low", f"{c.name} high", f"{c.name} n", f"{c.name} mark")
    ]
    head = ["block", "protocol", "row", "group", "status", "extractor", "backbone", "provenance", "told", "trained_on"]
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
                cells += ["", "", "", "", ""] if value is None else [value.value, value.low, value.high, value.n, value.mark]
            fixed = (block.name, block.protocol, row.name, row.group, row.status, row.extractor, row.backbone, row.provenance)
            read = (row.told, row.trained_on, row.view, row.segmenter, row.run_id, row.n, row.excluded, row.failed)
            writer.writerow(
                [
                    "" if cell is None else _inert(cell)
                    for cell in (*fixed, *read, *cells, row.series, row.x, row.note, "; ".join(row.needs), row.command)
                ]
            )
    return buffer.getvalue()


def _inert(cell: object) -> object:
    """Words that a spreadsheet would take for a formula are shown as words."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else cell


def to_latex(table: Results) -> str:
    """A booktabs table for each block: groups of columns under their kind, best method bold, intervals small beside numbers."""
    return "\n".join(_block(block, table) for block in table.blocks)


def _block(block: Block, table: Results) -> str:
    columns = [c for c in table.columns if any(c.name in row.values for row in block.rows)]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\small",
        f"\\begin{{tabular}}{{lr{'r' * len(columns)}}}",
        "\\toprule",
        *_kinds(columns),
        " & ".join(["", "$n$", *(_tex(c.heading) for c in columns)]) + r" \\",
        "\\midrule",
    ]
    groups = [row.group for row in block.ordered_rows]
    for row, before in zip(block.ordered_rows, [None, *groups], strict=False):
        if before == "controls" and row.group == "methods":
            lines.append("\\midrule")
        name = rf"\textit{{{_tex(row.name)}}}" if row.group == "controls" else _tex(row.name)
        n = f"{row.n:,}".replace(",", r"\,") if row.status == "ok" else rf"\textit{{{row.status}}}"
        lines.append(" & ".join([name, n, *(_cell(block, row, c) for c in columns)]) + r" \\")
    said = f"{block.name}: {block.text} {block.dataset}; protocol {block.protocol}. Brackets: {table.interval}."
    lines += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{_tex(said)}}}", f"\\label{{tab:{table.table}}}", "\\end{table}", ""]
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
    return "".join(_TEX.get(letter, letter) for letter in text)
