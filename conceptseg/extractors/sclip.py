"""SCLIP (Wang et al. 2024, arXiv:2312.01597): the last block attends by queries alone and by keys alone, added up.

Source: the paper, section 3, and wangf3014/SCLIP at b56bd30. Not checked against the original.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


def correlative(queries: Float[Tensor, "B A T k"], keys: Float[Tensor, "B A T k"]) -> Float[Tensor, "B A T T"]:
    """Return softmax(q qᵀ / √k) + softmax(k kᵀ / √k); every row sums to 2."""
    scale = queries.shape[-1] ** -0.5
    return torch.softmax(queries @ queries.mT * scale, dim=-1) + torch.softmax(keys @ keys.mT * scale, dim=-1)


class SCLIP(PatchTextMethod):
    """Correlative self-attention times the values, through the output projection, then residual and MLP. One forward pass."""

    version = 1

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        entering, normed = self.before_last_block(batch)
        queries, keys, values = self.backbone.tower.query_key_value(-1, normed)
        return self.read_out(correlative(queries, keys) @ values, entering)
