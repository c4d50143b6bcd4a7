"""GradCAM on the last block's attention, as Chefer et al. 2021 (arXiv:2012.09838) evaluate it."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.image_encoder import Explained
from conceptseg.backbones.encoders.tower import tap_attended, tap_normed
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.types import Batch


def weighted_heads(gradient: Float[Tensor, "B A L"], attention: Float[Tensor, "B A L"]) -> Float[Tensor, "B L"]:
    """Return max(mean over heads of (mean over patches of the gradient) · attention, 0). All 0 means all background."""
    return (gradient.mean(-1, keepdim=True) * attention).mean(1).clamp(min=0)


class AttentionGradCAM(ClassMethod):
    """The class token's attention to the patches, each head weighted by the mean gradient of the class score over them."""

    version = 1

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
        _, _, values = tower.query_key_value(last, normed)
        gradient = tower.attention_gradient(last, values, arriving[:, :1])[:, :, 0, tower.prefix :]
        return tower.maps(weighted_heads(gradient, tower.class_attention(last, normed)[..., tower.prefix :]))
