"""MaskCLIP (Zhou et al. 2022, arXiv:2112.01071): the last block's values without its attention, compared with words."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


class MaskCLIP(PatchTextMethod):
    """Each patch's own value through the output projection, then residual and MLP: attention replaced by the identity."""

    version = 1

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        entering, normed = self.before_last_block(batch)
        _, _, values = self.backbone.tower.query_key_value(-1, normed)
        return self.read_out(values, entering)
