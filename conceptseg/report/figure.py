"""A table's figure: methods by mIoU and mAP with intervals, controls as lines. SVG, drawn from nothing but the table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil

from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column
from conceptseg.report.results import Results
from conceptseg.report.selection import Selection, headline_columns

DOT = "#0072b2"
CONTROLS = (("#d55e00", "7 3"), ("#009e73", "2 3"), ("#7f7f7f", ""), ("#cc79a7", "9 3 2 3"))
"""Colour, of Okabe and Ito's, and dashes: lines are told apart without colour too."""
NARROW = 500
"""Below this width names stand above their points."""
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1b1b20}.quiet{fill:#5d5d69;font-size:11px}.strong{font-weight:600}"
    ".grid{stroke:#dedee5}.over{paint-order:stroke;stroke:#fff;stroke-width:4px;stroke-linejoin:round}"
)
_GAP, _LINE, _LEGEND = 26, 21, 16


def figure_svg(table: Results, width: int = 760, alone: bool = False) -> str:
    """The figure of a table's best and headline methods; empty where fewer than two methods have a number.

    width: in pixels. alone: whether it is a file of its own, with a style and a white ground.
    """
    columns = _columns(table)
    brief = Selection().brief(table)
    blocks = [(block, _drawn(block, columns)) for block in brief.blocks if not block.axis]
    blocks = [(block, rows) for block, rows in blocks if rows]
    if not columns or sum(len(rows) for _, rows in blocks) < 2:
        return ""
    tops = {column.name: _top(column, [block for block, _ in blocks]) for column in columns}
    longest = max(len(row.name) for _, rows in blocks for row in rows)
    labels = 8 if width < NARROW else max(150, min(int(0.44 * width), 16 + 7 * longest))
    parts: list[str] = []
    y = 0
    for block, rows in blocks:
        y = _block(parts, block, rows, columns, tops, width, labels, y) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" role="img"'
    label = f"{table.title}: methods by {' and '.join(column.label for column in columns)}"
    ground = f'<style>{_STYLE}</style><rect width="{width}" height="{y}" fill="#fff"/>' if alone else ""
    return "\n".join([f'{head} aria-label="{escape(label)}">{ground}', *parts, "</svg>\n"])


def _columns(table: Results) -> tuple[Column, ...]:
    """Two percentages of one kind, the correct definition's where it was computed."""
    offered = [column for column in headline_columns(table) if column.percent]
    for kind in ("standard", "released", "quoted"):
        if found := [column for column in offered if column.kind == kind]:
            return tuple(found[:2])
    return ()


def _drawn(block: Block, columns: Sequence[Column]) -> list[TableRow]:
    return [row for row in block.rows if row.group == "methods" and any(column.name in row.values for column in columns)]


def _top(column: Column, blocks: Sequence[Block]) -> float:
    """Right end of a column's axis, a multiple of ten percent."""
    values = [row.values[column.name] for block in blocks for row in block.rows if column.name in row.values]
    return max(0.1, ceil(10 * max((max(value.numbers) for value in values), default=1.0) - 1e-9) / 10)


def _block(
    parts: list[str],
    block: Block,
    rows: Sequence[TableRow],
    columns: Sequence[Column],
    tops: dict[str, float],
    width: int,
    labels: int,
    y: int,
) -> int:
    """Append a block's panels, drawn from height y on; returns the height below them.

    labels: pixels left of the panels, the same for every block, so that equal numbers stand above each other.
    """
    narrow = width < NARROW
    panel = (width - labels - 12 - _GAP * (len(columns) - 1)) / len(columns)
    line = 32 if narrow else _LINE
    top, bottom = y + 42, y + 42 + line * len(rows)
    n = max((row.n for row in rows), default=0)
    said = f"{block.name}" + (f" (n={n})" if n else "")
    parts.append(f'<text class="strong" x="8" y="{y + 16}">{escape(said)}</text>')
    controls = [row for row in block.rows if row.group == "controls"][: len(CONTROLS)]
    for place, column in enumerate(columns):
        left = labels + place * (panel + _GAP)

        def across(share: float, left: float = left, end: float = tops[column.name]) -> float:
            return round(left + panel * min(max(share, 0.0), end) / end, 1)

        best = block.best(column)
        caveat = f", {column.caveat}" if column.caveat else ""
        parts.append(f'<text class="quiet" x="{left:.1f}" y="{y + 34}">{escape(column.heading + caveat)}</text>')
        step = 0.2 if tops[column.name] > 0.5 else 0.1
        for tick in range(int(tops[column.name] / step + 1e-9) + 1):
            x = across(tick * step)
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top - 2}" y2="{bottom}"/>')
            parts.append(f'<text class="quiet" x="{x}" y="{bottom + 13}" text-anchor="middle">{100 * tick * step:.0f}</text>')
        for control, (colour, dashes) in zip(controls, CONTROLS, strict=False):
            if (value := control.values.get(column.name)) is not None:
                x = across(value.value)
                parts.append(
                    f'<line x1="{x}" x2="{x}" y1="{top - 4}" y2="{bottom}" stroke="{colour}" stroke-width="1.5" '
                    f'stroke-dasharray="{dashes}"><title>{escape(control.name)} {column.written(value)[0]}</title></line>'
                )
        for at, row in enumerate(rows):
            if (value := row.values.get(column.name)) is None:
                continue
            middle = top + line * at + (23 if narrow else line / 2)
            number, interval = column.written(value)
            weight = ' stroke="#000"' if number == best else ""
            parts.append(f"<g><title>{escape(' '.join([row.name, number, interval]).strip())}</title>")
            if value.low is not None and value.high is not None:
                ends = f'x1="{across(value.low)}" x2="{across(value.high)}"'
                parts.append(f'<line {ends} y1="{middle}" y2="{middle}" stroke="{DOT}" stroke-width="2.5" opacity="0.55"/>')
            parts.append(f'<circle cx="{across(value.value)}" cy="{middle}" r="4" fill="{DOT}"{weight}/></g>')
    for at, row in enumerate(rows):
        height = top + line * at + (13 if narrow else line / 2 + 4)
        anchor = f'x="{labels}"' if narrow else f'x="{labels - 10}" text-anchor="end"'
        parts.append(
            f'<text class="over" {anchor} y="{height}">{escape(_cut(row.name, 48 if narrow else (labels - 14) // 7))}</text>'
        )
    return _legend(parts, controls, width, bottom + 30)


def _legend(parts: list[str], controls: Sequence[TableRow], width: int, y: int) -> int:
    """Append the controls' line samples and names, in as many lines as they need; returns the height below them."""
    x = 8.0
    if not controls:
        return y - 8
    for control, (colour, dashes) in zip(controls, CONTROLS, strict=False):
        span = 38 + 6.3 * len(control.name)
        if x > 8 and x + span > width:
            x, y = 8.0, y + _LEGEND
        parts.append(
            f'<line x1="{x:.0f}" x2="{x + 26:.0f}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="1.5" '
            f'stroke-dasharray="{dashes}"/><text class="quiet" x="{x + 31:.0f}" y="{y}">{escape(control.name)}</text>'
        )
        x += span + 14
    return y + 8


def _cut(name: str, letters: int) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"
