"""GradCAM on the last block's attention, as Chefer et al. 2021 (arXiv:2012.09838) evaluate it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.image_model import LastBlockGradient


def weighted_heads(gradient: Float[Tensor, "B A L"], attention: Float[Tensor, "B A L"]) -> Float[Tensor, "B L"]:
    """Return max(mean over heads of (mean over patches of the gradient) · attention, 0). All 0 means all background."""
    return (gradient.mean(-1, keepdim=True) * attention).mean(1).clamp(min=0)


class AttentionGradCAM(LastBlockGradient):
    """The class token's attention to the patches, each head weighted by the mean gradient of the class score over them."""

    version = 1

    def weighted(self, normed: Float[Tensor, "B T d"], arriving: Float[Tensor, "B T d"]) -> Float[Tensor, "B L"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        _, _, values = tower.query_key_value(last, normed)
        gradient = tower.attention_gradient(last, values, arriving[:, :1])[:, :, 0, tower.prefix :]
        return weighted_heads(gradient, tower.class_attention(last, normed)[..., tower.prefix :])
