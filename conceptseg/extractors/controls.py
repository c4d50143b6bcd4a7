"""Controls: what the harness must score right, and what any method must beat. The first rows of every table."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.base import Backbone, sample_seed
from conceptseg.errors import in_range
from conceptseg.extractors.base import OneView
from conceptseg.types import VOID, Batch, Task

GREATEST_GRID = 2048
"""Cells per side of a map: as many as a large image has pixels."""


def _truth_of(task: Task, spread: bool = False) -> Float[Tensor, "C H W"]:
    """1 where a concept's class is, in the first channel that votes for it or (spread) in all; void counts as background."""
    truth = np.where(task.truth == VOID, 0, task.truth)
    maps = np.stack([truth == label for label in task.concepts.labels]).astype(np.float32)
    if spread:
        return torch.from_numpy(maps)
    # Several words may vote for background; one of them is enough, and a tie would be decided by channel order.
    first = {label: channel for channel, label in reversed(list(enumerate(task.concepts.labels)))}
    for channel, label in enumerate(task.concepts.labels):
        if first[label] != channel:
            maps[channel] = 0
    return torch.from_numpy(maps)


class Oracle(OneView):
    """Shows the truth itself. Proper metrics are 1 where a protocol scores at the size the map is given in.

    Except: a cut at the mean of a constant map (an image that is all foreground) finds nothing, strictly above being the rule.

    grid: None, or the truth's share of each of grid x grid cells: the most that a model with so many image tokens can say.
    """

    version = 1
    told = "truth"
    trained_on = "nothing"
    needs_truth = True

    def __init__(self, grid: int | None = None) -> None:
        in_range("extractor.grid", grid, 1, GREATEST_GRID)
        self.grid = grid

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        maps = [_truth_of(task) for task in batch.tasks]
        if self.grid is not None:
            maps = [torch.nn.functional.adaptive_avg_pool2d(one, self.grid) for one in maps]
        return torch.stack(maps)


class InvertedOracle(OneView):
    """Favours every word but the true one: IoU 0 in every class, AP at its least."""

    version = 1
    told = "truth"
    trained_on = "nothing"
    needs_truth = True

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        return torch.stack([1 - _truth_of(task, spread=True) for task in batch.tasks])


class BlindControl(OneView):
    """A control that reads neither truth nor model.

    backbone: a classifier for deletion and insertion to ask (`protocol.measures`); it moves no map.
    """

    told = "nothing"
    trained_on = "nothing"

    def __init__(self, backbone: Backbone | None = None) -> None:
        self.backbone = backbone


class Constant(BlindControl):
    """Says background everywhere: accuracy is the background share q, mean IoU q/2, AP the foreground share."""

    version = 1

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        return torch.stack(
            [torch.tensor([float(label == 0) for label in c.labels])[:, None, None].expand(-1, 8, 8) for c in batch.concepts]
        )


class RandomMap(BlindControl):
    """Independent noise on a grid: AP is the foreground share in the long run."""

    version = 1

    def __init__(self, grid: int = 16, seed: int = 0, backbone: Backbone | None = None) -> None:
        super().__init__(backbone)
        in_range("extractor.grid", grid, 1, GREATEST_GRID)
        self.grid, self.seed = grid, seed

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        return torch.stack(
            [
                torch.rand(
                    len(task.concepts), self.grid, self.grid,
                    generator=torch.Generator().manual_seed(sample_seed(self.seed, task.key, "random map")),
                )
                for task in batch.tasks
            ]
        )  # fmt: skip


class CentrePrior(BlindControl):
    """A Gaussian bump at the image centre for every class word, its complement for background words.

    sigma: in units of the image's side.
    """

    version = 1

    def __init__(self, sigma: float = 0.25, grid: int = 64, backbone: Backbone | None = None) -> None:
        super().__init__(backbone)
        in_range("extractor.grid", grid, 1, GREATEST_GRID)
        in_range("extractor.sigma", sigma, 1e-3, 1e3)
        self.sigma, self.grid = sigma, grid

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        at = (torch.arange(self.grid) + 0.5) / self.grid - 0.5
        bump = torch.exp(-(at[:, None] ** 2 + at[None, :] ** 2) / (2 * self.sigma**2))
        return torch.stack([torch.stack([bump if label else 1 - bump for label in c.labels]) for c in batch.concepts])


class ColourContrast(BlindControl):
    """Distance of each pixel's colour from the image's mean colour: what a method without words can read off."""

    version = 1

    def __init__(self, grid: int = 32, backbone: Backbone | None = None) -> None:
        super().__init__(backbone)
        in_range("extractor.grid", grid, 1, GREATEST_GRID)
        self.grid = grid

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        maps = []
        for task in batch.tasks:
            image = torch.from_numpy(np.ascontiguousarray(task.image, dtype=np.float64)).permute(2, 0, 1)[None]
            small = torch.nn.functional.interpolate(image, size=(self.grid, self.grid), mode="bilinear", antialias=True)[0]
            contrast = (small - small.mean((1, 2), keepdim=True)).norm(dim=0)
            contrast = contrast / contrast.max().clamp_min(1e-6)
            maps.append(torch.stack([contrast if label else 1 - contrast for label in task.concepts.labels]))
        return torch.stack(maps)
