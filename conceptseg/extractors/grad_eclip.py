"""Grad-ECLIP (Zhao et al. 2024, arXiv:2502.18816): values weighted by the gradient of an image-text score and by loose attention.

Source: Cyang-Zhao/Grad-Eclip at 6ffae66, generate_emap.py, grad_eclip. Not checked against the original, which computes the last
block's attention with a single head; here the host's own heads give the score and its gradient.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, normalize

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.tower import tap_attended, tap_normed
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import ClassMethod, needs_gradient, needs_text
from conceptseg.types import Batch


def loose_attention(query: Float[Tensor, "B d"], keys: Float[Tensor, "B L d"]) -> Float[Tensor, "B L"]:
    """Return the cosine of the class token's query with each patch's key, scaled to 0..1 over the patches; 0 where all agree."""
    cosine = (normalize(query, dim=-1)[:, None] * normalize(keys, dim=-1)).sum(-1)
    low, high = cosine.amin(-1, keepdim=True), cosine.amax(-1, keepdim=True)
    return (cosine - low) / torch.where(high == low, torch.ones_like(high), high - low)


class GradECLIP(ClassMethod):
    """(Σ over channels of gradient · value · loose attention)+ in the last block. One forward and, per word, one backward pass.

    The gradient is that of the image-text cosine at the class token's heads, before the output projection. Queries and keys are
    compared behind the output projection, as the released code does.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder) -> None:
        super().__init__(needs_text(backbone), "given")

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        with torch.enable_grad(), TapSet(self.backbone.model) as taps:
            tap_normed(taps, tower, last, normed.append)
            tap_attended(taps, tower, last, attended.append)
            output = self.backbone.run(needs_gradient(self.backbone.images(batch.tasks)), taps)
        return self.by_class(batch, output, partial(self._explain, output, normed[0].detach(), attended[0]))

    def _explain(self, output: Tensor, normed: Tensor, attended: Tensor, explained: Explained) -> Float[Tensor, "B h w"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        (arriving,) = torch.autograd.grad(self.backbone.score(output, explained).sum(), attended, retain_graph=True)
        proj = tower.blocks[last].proj
        queries, keys, values = (rearrange(x, "B A T k -> B T (A k)") for x in tower.query_key_value(last, normed))
        query = linear(queries[:, 0], proj.weight, proj.bias)
        loose = loose_attention(query, linear(keys[:, tower.prefix :], proj.weight, proj.bias))
        gradient = arriving[:, 0] @ proj.weight
        return tower.maps(((gradient[:, None] * values[:, tower.prefix :]).sum(-1) * loose).clamp(min=0))
