"""MaskCLIP (Zhou et al. 2022, arXiv:2112.01071): the last block's values without its attention, compared with words."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from conceptseg.backbones.encoders.tower import tap_input
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


class MaskCLIP(PatchTextMethod):
    """Each patch's own value through the output projection, then residual and MLP: attention replaced by the identity."""

    version = 1

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        stream: list[Tensor] = []
        with TapSet(self.backbone.model) as taps:
            tap_input(taps, tower, last, stream.append)
            self.backbone.run(self.backbone.images(batch.tasks), taps)
        block, x = tower.blocks[last], stream[0]
        _, _, values = tower.query_key_value(last, block.first_norm(x))
        x = x + linear(rearrange(values, "B A T k -> B T (A k)"), block.proj.weight, block.proj.bias)
        hidden = block.activation(linear(block.second_norm(x), block.up.weight, block.up.bias))
        x = x + linear(hidden, block.down.weight, block.down.bias)
        return rearrange(self.backbone.project(x[:, tower.prefix :]), "B (h w) k -> B h w k", h=tower.grid[0])
