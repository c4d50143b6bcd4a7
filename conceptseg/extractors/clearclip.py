"""ClearCLIP (Lan et al. 2024, arXiv:2407.12442): the last block attends by queries alone, without residual and MLP.

Source: the paper, section 3, and mc-lan/ClearCLIP at ad68a40. Not checked against the original.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


class ClearCLIP(PatchTextMethod):
    """softmax(q qᵀ / √d) times the values, through the output projection; residual and MLP are dropped. One forward pass."""

    version = 1

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        queries, _, values = self.last_query_key_value(batch)
        attention = torch.softmax(queries @ queries.mT * queries.shape[-1] ** -0.5, dim=-1)
        return self.read_out(attention @ values)
