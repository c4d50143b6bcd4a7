"""iSeg's refinement on diffusion U-Nets (arXiv:2409.03209): DAAM's maps, iterated along entropy-reduced self-attention.

The self-attention of the finest grid, mean over heads and layers, is sharpened (small entries vanish) and maps are averaged along
it ten times, the least value taken off each time. One forward pass.
Source: linsun449/iseg.code at 87debb0, wsss/iSeg.py, and linsun449/iseg.code at 4b0784c, base/stable_difusion.py.
Not checked against the original, which starts from cross-attention of two grids (weights 0.7 and 0.3) where this starts from
DAAM's mean, raises the text vectors of class words by 1.6, and reads chosen heads of Stable Diffusion 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import e
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from conceptseg.backbones.attention_rows import MeanAttention
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttention
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.errors import real_number, whole_number
from conceptseg.extractors.along_self_attention import AlongSelfAttention
from conceptseg.extractors.unet_maps import LayerSum


@dataclass
class FinestGrid:
    """The mean attention of those layers of a set whose grid has been halved least often."""

    level: int
    attention: MeanAttention = field(default_factory=MeanAttention)
    grid: tuple[int, int] = (0, 0)

    def add(self, attended: Attended) -> None:
        """Add one layer, or pass over one of a coarser grid."""
        if attended.layer.level == self.level:
            self.attention.add(attended.queries, attended.keys, attended.scale)
            self.grid = attended.grid

    def read(self) -> LayerSum:
        """Return the attention of each position to the grid."""
        return LayerSum(self.attention.read().unflatten(-1, self.grid), 1, self.grid)


def entropy_reduced(attention: Float[Tensor, "R n n"], entropy: float) -> Float[Tensor, "R n n"]:
    """Return attention over each column's greatest value, plus entropy · log10(e · it), cut at 0; rows then sum to 1."""
    sharp = attention / attention.amax(-2, keepdim=True)
    sharp = (sharp + entropy * torch.log10(e * sharp)).clamp_min(0)  # log10(0) is -inf, which is cut
    return sharp / sharp.sum(-1, keepdim=True).clamp_min(torch.finfo(sharp.dtype).tiny)


def shares(maps: Float[Tensor, "R n S"]) -> Float[Tensor, "R n S"]:
    """Take the least value off each map over n positions, and divide by the sum that is left."""
    raised = maps - maps.amin(1, keepdim=True)
    return raised / raised.sum(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


class ISeg(AlongSelfAttention):
    """Maps of the words of one prompt, at the finest grid of the view's layers, 0..1 each.

    entropy, iterations: 0.1 and 10 in the released code for COCO (0.015 for PascalVOC).
    reading: settings of RefinedMaps.
    """

    version = 1

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        entropy: float = 0.1,
        iterations: int = 10,
        **reading: Any,
    ) -> None:
        super().__init__(backbone, **reading)
        real_number("extractor.entropy", entropy, 0)
        whole_number("extractor.iterations", iterations, 0, 10_000)
        self.entropy, self.iterations = entropy, iterations

    def summing(self, layers: Sequence[CrossAttention], size: tuple[int, int]) -> FinestGrid:
        return FinestGrid(min(layer.level for layer in layers))

    def along(self, maps: Float[Tensor, "R S X Y"], read: LayerSum) -> Float[Tensor, "R S x y"]:
        # In float64: where attention is nearly even, each step leaves little of a map beside its least value, and rounding.
        moves = entropy_reduced(read.maps.flatten(2).double(), self.entropy)
        found = shares(interpolate(maps.double(), size=read.grid, mode="bilinear").flatten(2).mT)
        for _ in range(self.iterations):
            found = shares(moves @ found)
        found = found / found.amax(1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)
        return found.mT.unflatten(-1, read.grid).float()
