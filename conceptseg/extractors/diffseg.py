"""DiffSeg on diffusion U-Nets (Tian et al. 2024, arXiv:2308.12469): segments of self-attention, named by DAAM.

The self-attention of all layers is brought to one grid; attention maps of a grid of anchors are merged where their divergence is
small, and each position joins the merged map that is greatest there. A word's score is the mean of its DAAM map in each segment.
One forward pass. Segments are found without any word.
Source: google/diffseg at be1d88c, diffseg/segmentor.py (aggregate_weights, mask_merge, get_semantics). Not checked against the
original, which then refines segments by k-means (not implemented), decides on them at 512 pixels, and takes nouns from a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate

from conceptseg.backbones.attention_rows import attention_rows
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttention
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.errors import real_number, whole_number
from conceptseg.extractors.along_self_attention import AlongSelfAttention, mean_in_segments
from conceptseg.extractors.unet_maps import LayerSum


@dataclass
class OneGrid:
    """The mean attention of a set of layers at the size of the maps, a layer's weight being the side of its grid."""

    size: tuple[int, int]
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    weight: float = 0.0

    def add(self, attended: Attended) -> None:
        """Add one layer: keys enlarged bilinearly, queries repeated."""
        (height, width), (rows, columns) = self.size, attended.grid
        cells = height * width
        if not self.weight:
            self.total = attended.queries.new_zeros((len(attended.queries), cells, cells), dtype=torch.float32)
        down, across = (torch.arange(wide) * few // wide for wide, few in ((height, rows), (width, columns)))
        source = (down[:, None] * columns + across).flatten().to(self.total.device)
        side = (rows * columns) ** 0.5
        for part, mean in attention_rows(attended.queries, attended.keys, attended.scale):
            wide = interpolate(mean.unflatten(-1, attended.grid), size=self.size, mode="bilinear").flatten(2)
            at = ((source >= part.start) & (source < part.stop)).nonzero()[:, 0]
            self.total[:, at] += side * (wide / wide.sum(-1, keepdim=True))[:, source[at] - part.start]
        self.weight += side

    def read(self) -> LayerSum:
        """Return the attention of each cell to the grid; it sums to 1."""
        return LayerSum((self.total / self.weight).unflatten(-1, self.size), 1, self.size)


def divergence(one: Float[Tensor, "k n"], other: Float[Tensor, "m n"]) -> Float[Tensor, "k m"]:
    """Return half the sum of both Kullback-Leibler divergences of each pair of distributions."""
    log_one, log_other = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (one, other))
    own = (one * log_one).sum(-1)[:, None] + (other * log_other).sum(-1)
    return (own - one @ log_other.mT - log_one @ other.mT) / 2


def segments(
    attention: Float[Tensor, "n n"], size: tuple[int, int], points: int, threshold: float, merges: int
) -> Int[Tensor, " n"]:
    """Return the segment of each of the n = X·Y cells. attention: each row sums to 1. points: anchors a side."""
    at = [_evenly(side, min(points, side)) for side in size]
    anchors = (at[0][:, None] * size[1] + at[1]).flatten().to(attention.device)
    near = (divergence(attention[anchors], attention) < threshold).to(attention)
    maps = (near @ attention) / near.sum(-1, keepdim=True)
    for _ in range(merges - 1):
        close, merged, waiting = divergence(maps, maps) < threshold, [], torch.ones(len(maps), dtype=torch.bool)
        close |= torch.eye(len(maps), dtype=torch.bool, device=maps.device)
        for number in range(len(maps)):
            if waiting[number]:
                merged.append(maps[close[number]].mean(0))
                waiting &= ~close[number].cpu()
        maps = torch.stack(merged)
    return maps.argmax(0)


def _evenly(side: int, count: int) -> Int[Tensor, " count"]:
    step = (side - 1) // max(1, count - 1)
    return (side - 1 - step * (count - 1)) // 2 + step * torch.arange(count)


class DiffSeg(AlongSelfAttention):
    """Each word's map is the same number all over a segment: the mean of its DAAM map there.

    points, threshold, merges: 16 anchors a side, 0.9, three rounds in the released notebook.
    reading: settings of RefinedMaps.
    """

    version = 1

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        points: int = 16,
        threshold: float = 0.9,
        merges: int = 3,
        **reading: Any,
    ) -> None:
        super().__init__(backbone, **reading)
        whole_number("extractor.points", points, 1, 1024)
        real_number("extractor.threshold", threshold, 0)
        whole_number("extractor.merges", merges, 1, 100)
        self.points, self.threshold, self.merges = points, threshold, merges

    def summing(self, layers: Sequence[CrossAttention], size: tuple[int, int]) -> OneGrid:
        return OneGrid(size)

    def along(self, maps: Float[Tensor, "R S X Y"], read: LayerSum) -> Float[Tensor, "R S x y"]:
        found = []
        for words, one in zip(maps.flatten(2), read.maps.flatten(2).double(), strict=True):
            joined = segments(one, read.grid, self.points, self.threshold, self.merges)
            found.append(mean_in_segments(words, joined))
        return torch.stack(found).unflatten(-1, read.grid)
