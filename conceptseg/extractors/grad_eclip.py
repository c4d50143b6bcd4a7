"""Grad-ECLIP (Zhao et al. 2024, arXiv:2502.18816): values weighted by the gradient of an image-text score and by loose attention.

Source: Cyang-Zhao/Grad-Eclip at 6ffae66, generate_emap.py, grad_eclip. Not checked against the original, which computes the last
block's attention with a single head; here the host's own heads give the score and its gradient.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, normalize

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.extractors.image_model import LastBlockGradient, needs_text


def loose_attention(query: Float[Tensor, "B d"], keys: Float[Tensor, "B L d"]) -> Float[Tensor, "B L"]:
    """Return the cosine of the class token's query with each patch's key, scaled to 0..1 over the patches; 0 where all agree."""
    cosine = (normalize(query, dim=-1)[:, None] * normalize(keys, dim=-1)).sum(-1)
    low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
    return (cosine - low) / torch.where(high == low, torch.ones_like(high), high - low)


class GradECLIP(LastBlockGradient):
    """(Σ over channels of gradient · value · loose attention)+ in the last block; the score is the image-text cosine.

    Queries and keys are compared behind the output projection, as the released code does.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder) -> None:
        super().__init__(needs_text(backbone), "given")

    def weighted(self, normed: Float[Tensor, "B T d"], arriving: Float[Tensor, "B T d"]) -> Float[Tensor, "B L"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        proj = tower.blocks[last].proj
        queries, keys, values = (rearrange(x, "B A T k -> B T (A k)") for x in tower.query_key_value(last, normed))
        query = linear(queries[:, 0], proj.weight, proj.bias)
        loose = loose_attention(query, linear(keys[:, tower.prefix :], proj.weight, proj.bias))
        gradient = arriving[:, 0] @ proj.weight
        return ((gradient[:, None] * values[:, tower.prefix :]).sum(-1) * loose).clamp(min=0)
