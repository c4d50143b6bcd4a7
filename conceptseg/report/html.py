"""A finished table as one HTML file that works offline: sortable, with curves, bars, pictures and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conceptseg.report.results import ABSENT, KIND_NAMES, Block, Column, Results, TableRow, by_kind

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a chart, in pixels."""

    name: str
    colour: str
    points: str
    band: str
    """The interval as a closed polygon; empty where there is none."""
    dots: tuple[tuple[float, float, str], ...]
    """x, y and the tooltip of each point."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One metric over the axis of a block."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = 440
    height: int = 260
    left: int = 48
    right: int = 430
    bottom: int = 232


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures of a block, as the page's script reads them."""

    methods: tuple[str, ...] = ()
    """Every method with scores of single images."""
    pictured: tuple[int, ...] = ()
    """Places in `methods` of those with a map and a prediction in each strip."""
    words: tuple[str, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    """key, words, scores (one per method, or None), size [width height] and the address of the strip of tiles."""

    @property
    def tiles(self) -> int:
        """Pictures side by side in a strip: photo, truth, then map and prediction of each pictured method."""
        return 2 + 2 * len(self.pictured)


@dataclass(frozen=True, slots=True)
class Section:
    """A block and what is drawn of it."""

    block: Block
    charts: tuple[Chart, ...] = ()
    parts: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Row -> its words or classes: name, n, value, low, high."""
    parts_by: str = "word"
    parts_metric: str = ""
    gallery: Gallery = Gallery()


@dataclass(frozen=True, slots=True)
class RunBehind:
    """One run folder."""

    run_id: str
    rows: tuple[str, ...]
    manifest: Mapping[str, Any] | None
    """None where the folder is not on this machine."""
    config: str
    """The resolved configuration as YAML."""


def render(table: Results, sections: Sequence[Section], runs: Sequence[RunBehind]) -> str:
    """The page. Every word from data is escaped; the script and the style are part of the page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("conceptseg.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.globals["by_kind"] = by_kind
    written = {"sort_keys": False, "ensure_ascii": False, "separators": (",", ":"), "default": _plain}
    environment.policies["json.dumps_kwargs"] = written
    page = environment.get_template("report.html.j2")
    return page.render(table=table, sections=sections, runs=runs, kinds=KIND_NAMES, absent=ABSENT)


def _plain(value: Any) -> Any:
    if isinstance(value, Gallery):
        return {"methods": value.methods, "pictured": value.pictured, "tiles": value.tiles, "samples": value.samples}
    raise TypeError(f"{type(value).__name__} is not data of a page")


def charts_of(block: Block, columns: Sequence[Column]) -> tuple[Chart, ...]:
    """A chart for every metric computed here, a line for every series; empty where the block is no curve."""
    if not block.axis:
        return ()
    points = [row for row in block.rows if row.x is not None]
    drawn = [c for c in columns if c.kind in ("standard", "released") and any(c.name in row.values for row in points)]
    return tuple(_chart(points, column) for column in drawn)


def _chart(rows: Sequence[TableRow], column: Column) -> Chart:
    held = [row for row in rows if column.name in row.values]
    xs = sorted({row.x for row in held if row.x is not None})
    ends = [v for row in held for v in (row.values[column.name].low, row.values[column.name].high, row.values[column.name].value)]
    numbers = [v for v in ends if v is not None]
    low, high = min(numbers), max(numbers)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    frame = Chart("", (), (), ())
    top, span = 26, max(xs) - min(xs) or 1.0

    def across(x: float) -> float:
        return round(frame.left + 8 + (frame.right - frame.left - 16) * (x - min(xs)) / span, 1)

    def up(y: float) -> float:
        return round(frame.bottom - (frame.bottom - top) * (y - low) / (high - low), 1)

    lines = []
    for place, name in enumerate(dict.fromkeys(row.series for row in held)):
        mine = sorted((row for row in held if row.series == name), key=lambda row: row.x or 0.0)
        values = [row.values[column.name] for row in mine]
        at = [across(row.x or 0.0) for row in mine]
        upper = [f"{x},{up(v.high)}" for x, v in zip(at, values, strict=True) if v.high is not None]
        lower = [f"{x},{up(v.low)}" for x, v in zip(at, values, strict=True) if v.low is not None]
        tooltips = [" ".join((row.name, *column.written(v))) for v, row in zip(values, mine, strict=True)]
        lines.append(
            Line(
                name, COLOURS[place % len(COLOURS)], " ".join(f"{x},{up(v.value)}" for x, v in zip(at, values, strict=True)),
                " ".join([*upper, *reversed(lower)]),
                tuple((x, up(v.value), text) for x, v, text in zip(at, values, tooltips, strict=True)),
            )
        )  # fmt: skip
    ticks = xs if len(xs) <= 12 else xs[:: -(-len(xs) // 10)]
    scale = 100 if column.percent else 1
    heights = [low + (high - low) * step / 4 for step in range(5)]
    return Chart(
        f"{column.heading} ({KIND_NAMES[column.kind]})", tuple(lines), tuple((across(x), f"{x:g}") for x in ticks),
        tuple((up(y), f"{scale * y:.{1 if column.percent else 3}f}") for y in heights),
    )  # fmt: skip
