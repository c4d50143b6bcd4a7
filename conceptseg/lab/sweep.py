"""Layer x timestep x space of a lab diffusion model, on scenes whose (object, ground) pairs training never showed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.evaluation.assemble import assemble
from conceptseg.evaluation.carry_out import carry_out
from conceptseg.evaluation.readings import readings

SWEPT = {
    "flux": ["extractor=concept_attention", "backbone@extractor.backbone=lab_flux", "views=lab/sweep"],
    "sd3": ["extractor=concept_attention", "backbone@extractor.backbone=lab_sd3", "views=lab/sweep"],
    "sd": ["extractor=daam", "backbone@extractor.backbone=lab_sd", "views=lab/sweep_unet"],
    "sdxl": ["extractor=daam", "backbone@extractor.backbone=lab_sdxl", "views=lab/sweep_unet"],
}
SCENES = ["dataset=scenes", "dataset.split=unseen", "dataset.objects=[1,1]", "dataset.count=64", "protocol=scenes_single"]
METRICS = ("miou_dataset", "ap_image")
SEGMENTER = "mean@mask/bilinear"


@dataclass(frozen=True, slots=True)
class Cell:
    """One (space, layer, noise level) and its numbers in 0..1 by metric, with the interval's ends."""

    space: str
    layer: int
    timestep: float
    values: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Results of a sweep."""

    cells: tuple[Cell, ...]
    n: int

    def best(self, metric: str) -> Iterator[Cell]:
        """The best cell of every space."""
        for space in dict.fromkeys(c.space for c in self.cells):
            yield max((c for c in self.cells if c.space == space), key=lambda c: c.values[metric][0])

    def lines(self) -> list[str]:
        """The best cell of every space by every metric, in words."""
        return [
            f"{cell.space}, {metric}: best at layer {cell.layer}, t = {cell.timestep:g}: {100 * cell.values[metric][0]:.1f} "
            f"[{100 * cell.values[metric][1]:.1f}, {100 * cell.values[metric][2]:.1f}]"
            for metric in METRICS
            for cell in self.best(metric)
        ]

    def plain(self) -> dict[str, Any]:
        cells = [
            {"space": c.space, "layer": c.layer, "t": c.timestep, **{m: [round(v, 4) for v in c.values[m]] for m in METRICS}}
            for c in self.cells
        ]
        about = (
            f"{self.n} scenes with one object, unseen combinations, one noise draw, softmax over concepts; "
            "value [95 % interval over images]; the best of many cells is flattered by being chosen"
        )
        return {"about": about, "n": self.n, "best": self.lines(), "cells": cells}


def overrides_for(name: str) -> list[str]:
    """Return the overrides that sweep this lab model. Raises ConfigError for a model without layers and timesteps."""
    if name not in SWEPT:
        raise ConfigError(f'conceptseg-lab sweep: "{name}" has no noise levels to sweep. {did_you_mean(name, SWEPT)}')
    return [*SWEPT[name], *SCENES]


def sweep(config: Mapping[str, Any]) -> Sweep:
    """Evaluate a composed config whose views are single (space, layer, timestep) cells."""
    evaluation = assemble(config)
    carry_out(evaluation, "sweep")
    found, cells = readings(evaluation, METRICS, [SEGMENTER]), []
    for reading in found:
        view = evaluation.views[reading.name]
        values = {m: (i.value, i.low, i.high) for m, i in reading.values.items()}
        cells.append(Cell(view.space, view.layers[0], view.timesteps[0], values))
    return Sweep(tuple(cells), found[0].n)


def heat_map(found: Sweep, path: Path) -> None:
    """One panel a metric and space: layers down, noise levels across, the value in every cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    spaces = list(dict.fromkeys(c.space for c in found.cells))
    layers = sorted({c.layer for c in found.cells})
    times = sorted({c.timestep for c in found.cells})
    labels = {"miou_dataset": "mIoU, %", "ap_image": "average precision, %"}
    size = (2.4 * len(spaces) + 0.6, 0.9 + len(METRICS) * (0.5 + 0.34 * len(layers)))
    figure, axes = pyplot.subplots(len(METRICS), len(spaces), figsize=size, squeeze=False)
    for row, metric in enumerate(METRICS):
        numbers = {(c.space, c.layer, c.timestep): 100 * c.values[metric][0] for c in found.cells}
        low, high = min(numbers.values()), max(numbers.values())
        for column, space in enumerate(spaces):
            axis = axes[row][column]
            grid = np.array([[numbers.get((space, k, t), np.nan) for t in times] for k in layers])
            axis.imshow(grid, vmin=low, vmax=high, cmap="viridis", aspect="auto")
            for (y, x), value in np.ndenumerate(grid):
                axis.text(
                    x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color="w" if value < (low + high) / 2 else "k"
                )
            axis.set_xticks(range(len(times)), [f"{t:g}" for t in times], fontsize=7)
            axis.set_yticks(range(len(layers)), [str(k) for k in layers], fontsize=7)
            axis.set_title(f"{space}\n{labels[metric]}" if row == 0 else labels[metric], fontsize=8)
            if column == 0:
                axis.set_ylabel("layer", fontsize=8)
            if row == len(METRICS) - 1:
                axis.set_xlabel("noise level t", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
