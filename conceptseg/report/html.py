"""A finished table as one HTML file that works offline: sortable, with curves, bars, pictures and what stands behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import ABSENT, KIND_NAMES, Column, by_kind
from conceptseg.report.figure import figure_svg
from conceptseg.report.results import Results
from conceptseg.report.selection import headline_columns
from conceptseg.report.sweeps import COLOURS, Sweep

if TYPE_CHECKING:
    from jinja2 import Environment


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
class Heat:
    """One panel of a heat map, as the page draws it."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_label: str
    column_label: str
    cells: tuple[tuple[tuple[str, str, str], ...], ...]
    """[rows columns]: text, ground and ink; empty texts where no view was read."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures of a block, as the page's script reads them.

    A sheet holds `across` samples side by side in up to `down` lines, two square tiles each: photo and truth, or a method's map
    and prediction. Sample i is in sheet i // (across * down).
    """

    methods: tuple[str, ...] = ()
    """Every method with scores of single images; those with pictures first."""
    words: tuple[str, ...] = ()
    samples: tuple[Mapping[str, Any], ...] = ()
    """key, words, scores (one per method, or None) and size [width height]."""
    photos: tuple[str, ...] = ()
    """Addresses of the sheets of photos and truths."""
    maps: tuple[tuple[str, ...], ...] = ()
    """Addresses of the sheets of each method, the first methods' alone where not all have pictures."""
    across: int = 8
    down: int = 8
    side: int = 16
    """Pixels of a tile's side."""


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
    heats: tuple[tuple[str, tuple[Heat, ...]], ...] = ()
    """A sweep's heat maps: heading of the metric, its panels."""
    scales: tuple[tuple[str, str], ...] = ()
    """For each of `heats` the numbers at the ends of its colour scale."""


@dataclass(frozen=True, slots=True)
class RunBehind:
    """One run folder."""

    run_id: str
    rows: tuple[str, ...]
    manifest: Mapping[str, Any] | None
    """None where the folder is not on this machine."""
    config: str
    """The resolved configuration as YAML."""


def render(
    table: Results, sections: Sequence[Section], runs: Sequence[RunBehind], colours: Sequence[str] = (), content: str = ""
) -> str:
    """The page. Every word from data is escaped; the script and the style are part of the page.

    colours: of the scale that maps are drawn in, dark to bright. content: a digest that tells the page from others.
    """
    few = {column.name for column in headline_columns(table)}
    swept = any(section.heats for section in sections)  # its heat map is the picture to open with
    figures = ["" if swept else figure_svg(table, width) for width in (860, 360)]
    return templates().get_template("report.html.j2").render(
        table=table, sections=sections, runs=runs, kinds=KIND_NAMES, absent=ABSENT, few=few, figures=figures, colours=colours,
        content=content,
    )  # fmt: skip


INDEX_TITLE = "conceptseg: pages"


@dataclass(frozen=True, slots=True)
class Page:
    """A page, as the index lists it."""

    files: Sequence[str]
    """Addresses from the index: the page, then what lies beside it."""
    title: str
    command: str
    blocks: str
    """Names of its blocks and how many rows each has."""
    written: str


def render_index(pages: Sequence[Page]) -> str:
    """A page that links all pages."""
    return templates().get_template("index.html.j2").render(pages=pages, title=INDEX_TITLE)


@cache  # of this process: each job of a multirun writes its own page and the index
def templates() -> Environment:
    """The templates of pages; each is translated to Python once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("conceptseg.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    environment.globals["by_kind"] = by_kind
    written = {"sort_keys": False, "ensure_ascii": False, "separators": (",", ":"), "default": _plain}
    environment.policies["json.dumps_kwargs"] = written
    return environment


def _plain(value: Any) -> Any:
    if isinstance(value, Gallery):
        return {name: getattr(value, name) for name in ("methods", "samples", "photos", "maps", "across", "down", "side")}
    raise TypeError(f"{type(value).__name__} is not data of a page")


def heats_of(sweep: Sweep, colours: Sequence[tuple[int, int, int]]) -> dict[str, tuple[tuple[str, str], tuple[Heat, ...]]]:
    """Heading of each metric -> the ends of its colour scale, and its panels. colours: 256 of RGB."""
    found = {}
    for metric, heading in sweep.metrics.items():
        grids = sweep.grids(metric)
        every = [value for grid in grids for row in grid.numbers for value in row if value == value]
        low, high = min(every), max(every)

        def cell(value: float, low: float = low, high: float = high) -> tuple[str, str, str]:
            if value != value:
                return "", "", ""
            red, green, blue = colours[round(255 * (value - low) / (high - low or 1.0))]
            ink = "#000" if 0.3 * red + 0.6 * green + 0.1 * blue > 120 else "#fff"
            return f"{100 * value:.0f}", f"rgb({red},{green},{blue})", ink

        panels = tuple(
            Heat(g.title, g.rows, g.columns, g.row_label, g.column_label, tuple(tuple(map(cell, row)) for row in g.numbers))
            for g in grids
        )
        found[heading] = ((f"{100 * low:.0f}", f"{100 * high:.0f}"), panels)
    return found


def charts_of_sweep(sweep: Sweep) -> tuple[Chart, ...]:
    """A chart for each metric and kind of view, with a line and its interval for each noise level, or over the one swept axis."""
    charts = []
    for metric, heading in sweep.metrics.items():
        for curves in sweep.curves(metric):
            lines = {name: [_swept(name, curves.x_label, *point) for point in line] for name, line in curves.lines.items()}
            if lines:
                charts.append(_drawn(", ".join(filter(None, [heading, curves.title])) + f", over {curves.x_label}", lines, True))
    return tuple(charts)


def charts_of(block: Block, columns: Sequence[Column]) -> tuple[Chart, ...]:
    """A chart for every metric computed here, a line for every series; empty where the block is no curve."""
    if not block.axis:
        return ()
    points = [row for row in block.rows if row.x is not None]
    drawn = [c for c in columns if c.kind in ("standard", "released") and any(c.name in row.values for row in points)]
    return tuple(_chart(points, column) for column in drawn)


def _chart(rows: Sequence[TableRow], column: Column) -> Chart:
    lines: dict[str, list[_Point]] = {}
    for row in sorted((row for row in rows if column.name in row.values), key=lambda row: row.x or 0.0):
        value = row.values[column.name]
        said = " ".join((row.name, *column.written(value)))
        lines.setdefault(row.series, []).append(_Point(row.x or 0.0, value.value, value.low, value.high, said))
    order = dict.fromkeys(row.series for row in rows if column.name in row.values)
    lines = {name: lines[name] for name in order}
    return _drawn(f"{column.heading} ({KIND_NAMES[column.kind]})", lines, column.percent)


@dataclass(frozen=True, slots=True)
class _Point:
    x: float
    value: float
    low: float | None
    high: float | None
    said: str


def _swept(name: str, axis: str, x: float, numbers: tuple[float, float, float]) -> _Point:
    value, *ends = numbers
    low, high = (None if end != end else end for end in ends)
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return _Point(x, value, low, high, f"{name}, {axis} {x:g}: {100 * value:.1f}{interval}")


def _drawn(title: str, lines: Mapping[str, Sequence[_Point]], percent: bool) -> Chart:
    points = [point for line in lines.values() for point in line]
    xs = sorted({point.x for point in points})
    numbers = [v for point in points for v in (point.value, point.low, point.high) if v is not None]
    low, high = min(numbers), max(numbers)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin
    frame = Chart("", (), (), ())
    top, span = 26, max(xs) - min(xs) or 1.0

    def across(x: float) -> float:
        return round(frame.left + 8 + (frame.right - frame.left - 16) * (x - min(xs)) / span, 1)

    def up(y: float) -> float:
        return round(frame.bottom - (frame.bottom - top) * (y - low) / (high - low), 1)

    drawn = []
    for place, (name, mine) in enumerate(lines.items()):
        upper = [f"{across(p.x)},{up(p.high)}" for p in mine if p.high is not None]
        lower = [f"{across(p.x)},{up(p.low)}" for p in mine if p.low is not None]
        drawn.append(
            Line(
                name, COLOURS[place % len(COLOURS)], " ".join(f"{across(p.x)},{up(p.value)}" for p in mine),
                " ".join([*upper, *reversed(lower)]), tuple((across(p.x), up(p.value), p.said) for p in mine),
            )
        )  # fmt: skip
    ticks = xs if len(xs) <= 12 else xs[:: -(-len(xs) // 10)]
    scale = 100 if percent else 1
    heights = [low + (high - low) * step / 4 for step in range(5)]
    return Chart(
        title, tuple(drawn), tuple((across(x), f"{x:g}") for x in ticks),
        tuple((up(y), f"{scale * y:.{1 if percent else 3}f}") for y in heights),
    )  # fmt: skip
