"""Pictures of a sweep, whose views are single layers and noise levels: heat maps and curves with intervals."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conceptseg.files import write_atomically

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
"""Okabe and Ito's colours, which colour-blind readers can tell apart."""
MOST_LINES = len(COLOURS)
LAYER, LEVEL = "layer", "noise level t"

Numbers = tuple[float, float, float]
"""Value and the ends of its interval; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class SweptView:
    """One view of a sweep."""

    kind: str
    """Everything that it reads apart from layers and noise levels, such as its space."""
    layers: str
    """Layers as `parse_span` reads them, such as "3" or "0-5"; empty where the method has none."""
    timesteps: str
    """Noise levels, such as "0.5"; empty where the method has none."""
    values: Mapping[str, Numbers]
    """Metric -> its numbers."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One panel of a heat map."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_label: str
    column_label: str
    numbers: tuple[tuple[float, ...], ...]
    """[rows columns]; NaN where no view was read."""


@dataclass(frozen=True, slots=True)
class Curves:
    """One panel of lines over an axis."""

    title: str
    x_label: str
    lines: Mapping[str, tuple[tuple[float, Numbers], ...]]
    """Name -> (place on the axis, numbers), in rising order."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Views of one run under one segmenter, of which some differ only in layers or noise levels."""

    title: str
    views: tuple[SweptView, ...]
    metrics: Mapping[str, str]
    """Name -> heading, for the metrics that are drawn."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(view.kind for view in self.views))

    @property
    def layers(self) -> tuple[str, ...]:
        """Single layers in order, then spans."""
        return tuple(sorted({view.layers for view in self.views}, key=_by_number))

    @property
    def timesteps(self) -> tuple[str, ...]:
        return tuple(sorted({view.timesteps for view in self.views}, key=_by_number))

    def grids(self, metric: str) -> tuple[Grid, ...]:
        """A panel for each kind, layers down and noise levels across; one panel of kinds down where only one axis is swept."""
        found = {(v.kind, v.layers, v.timesteps): v.values[metric][0] for v in self.views if metric in v.values}
        layers, levels = self.layers, self.timesteps
        if len(layers) > 1 and len(levels) > 1:
            return tuple(
                Grid(
                    kind, layers, levels, LAYER, LEVEL,
                    tuple(tuple(found.get((kind, k, t), np.nan) for t in levels) for k in layers),
                )
                for kind in self.kinds
            )  # fmt: skip
        across, label = (layers, LAYER) if len(layers) > 1 else (levels, LEVEL)
        places = [(k, levels[0]) if label == LAYER else (layers[0], k) for k in across]
        numbers = tuple(tuple(found.get((kind, *place), np.nan) for place in places) for kind in self.kinds)
        return (Grid("", self.kinds, across, "", label, numbers),)

    def curves(self, metric: str) -> tuple[Curves, ...]:
        """A line for each noise level over layers, a panel for each kind; lines of kinds over the one axis that is swept.

        Spans of several layers and means over noise levels are left out; so are lines beyond the number of colours.
        """
        layers = [one for one in self.layers if _number(one) is not None]
        levels = [one for one in self.timesteps if _number(one) is not None]
        if len(layers) > 1 and len(self.timesteps) > 1:
            panels = []
            for kind in self.kinds:
                found = {f"t = {t}": self._line(metric, kind, t=t) for t in self.timesteps[:MOST_LINES]}
                panels.append(Curves(kind, LAYER, {name: line for name, line in found.items() if line}))
            return tuple(panel for panel in panels if panel.lines)
        over_layers = len(layers) > 1
        if not over_layers and len(levels) < 2:
            return ()
        lines = {}
        for kind in self.kinds[:MOST_LINES]:
            if over_layers:
                lines[kind] = self._line(metric, kind, t=self.timesteps[0])
            else:
                for span in self.layers:
                    name = kind if len(self.layers) == 1 else f"{kind}, layers {span}"
                    lines[name] = self._line(metric, kind, layers=span)
        kept = {name: line for name, line in list(lines.items())[:MOST_LINES] if line}
        return (Curves("", LAYER if over_layers else LEVEL, kept),)

    def _line(self, metric: str, kind: str, t: str | None = None, layers: str | None = None) -> tuple[tuple[float, Numbers], ...]:
        """Points at one noise level over layers, or at one span of layers over noise levels."""
        points = []
        for view in self.views:
            x = _number(view.layers if layers is None else view.timesteps)
            mine = view.timesteps == t if layers is None else view.layers == layers
            if view.kind == kind and mine and x is not None and metric in view.values:
                points.append((x, view.values[metric]))
        return tuple(sorted(points))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _by_number(text: str) -> tuple[bool, float, str]:
    number = _number(text)
    return number is None, number or 0.0, text


def shown_kinds(kinds: Sequence[str]) -> dict[str, str]:
    """Kind -> its name without the parts that all kinds share.

    >>> shown_kinds(["output/n1/softmax/mean", "cross/n1/softmax/mean"])
    {'output/n1/softmax/mean': 'output', 'cross/n1/softmax/mean': 'cross'}
    """
    parts = {kind: kind.split("/") for kind in dict.fromkeys(kinds)}
    shared = set.intersection(*map(set, parts.values())) if len(parts) > 1 else set(next(iter(parts.values()))[1:])
    return {kind: "/".join(part for part in of if part not in shared) or of[0] for kind, of in parts.items()}


def draw_heat_map(sweep: Sweep, path: Path) -> None:
    """Write a PNG: a row of panels for each metric, with one colour scale and its bar."""
    from matplotlib.figure import Figure

    grids = {metric: sweep.grids(metric) for metric in sweep.metrics}
    across = max(map(len, grids.values()))
    cells = max(len(grid.columns) for panels in grids.values() for grid in panels)
    down = max(len(grid.rows) for panels in grids.values() for grid in panels)
    size = (1.4 + across * (0.7 + 0.4 * max(cells, 4)), 0.5 + len(grids) * (1.0 + 0.28 * down))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(sweep.title, fontsize=9)
    axes = figure.subplots(len(grids), across, squeeze=False)
    for line, (metric, panels) in zip(axes, grids.items(), strict=True):
        every = [v for grid in panels for row in grid.numbers for v in row if not np.isnan(v)]
        low, high = 100 * min(every), 100 * max(every)
        for axis, grid in zip(line, panels, strict=True):
            numbers = 100 * np.array(grid.numbers)
            image = axis.imshow(numbers, vmin=low, vmax=high, cmap="viridis", aspect="auto")
            for (y, x), value in np.ndenumerate(numbers):
                if not np.isnan(value):
                    ink = "w" if value < (low + high) / 2 else "k"
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
            axis.set_xticks(range(len(grid.columns)), grid.columns, fontsize=7)
            axis.set_yticks(range(len(grid.rows)), grid.rows, fontsize=7)
            axis.set_title(", ".join(filter(None, [grid.title, sweep.metrics[metric]])), fontsize=8)
            axis.set_xlabel(grid.column_label, fontsize=8)
            axis.set_ylabel(grid.row_label, fontsize=8)
        figure.colorbar(image, ax=list(line), label=sweep.metrics[metric]).ax.tick_params(labelsize=7)
    _save(figure, path)


def draw_curves(sweep: Sweep, path: Path) -> bool:
    """Write a PNG: a row of panels for each metric, lines with intervals as bands; False where there is no axis to draw over."""
    from matplotlib.figure import Figure

    panels = {metric: sweep.curves(metric) for metric in sweep.metrics}
    across = max(map(len, panels.values()))
    if not across:
        return False
    figure = Figure(figsize=(1.2 + 2.6 * across, 0.6 + 2.2 * len(panels)), dpi=110, layout="constrained")
    figure.suptitle(sweep.title, fontsize=9)
    axes = figure.subplots(len(panels), across, squeeze=False, sharey="row")
    for row, (metric, curves) in zip(axes, panels.items(), strict=True):
        for axis, one in zip(row, curves, strict=True):
            for place, (name, line) in enumerate(one.lines.items()):
                at = [x for x, _ in line]
                value, low, high = (100 * np.array([numbers[k] for _, numbers in line]) for k in range(3))
                axis.fill_between(at, low, high, color=COLOURS[place], alpha=0.15, linewidth=0)
                axis.plot(at, value, color=COLOURS[place], marker="os^Dv<>"[place], markersize=3, linewidth=1.2, label=name)
            axis.set_title(one.title, fontsize=8)
            axis.set_xlabel(one.x_label, fontsize=8)
            axis.tick_params(labelsize=7)
        row[0].set_ylabel(sweep.metrics[metric], fontsize=8)
    names = {name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(names.values(), names, loc="outside lower center", ncols=min(len(names), 2 + across), fontsize=7, frameon=False)
    _save(figure, path)
    return True


def _save(figure: object, path: Path) -> None:
    from matplotlib.figure import Figure

    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
