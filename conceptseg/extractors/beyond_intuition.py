"""Beyond Intuition (Chen et al. 2023, TMLR): rollout of attention weighted by heads or by tokens, times an integrated gradient.

Source: jiaminchen-1031/transformerinterp at 7545da5, ViT/baselines/ViT/ViT_explanation_generator.py: generate_ours (heads) and
generate_ours_c (tokens). Not checked against the original.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.tower import tap_attended, tap_input, tap_normed
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import in_range, one_of
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.extractors.rollout import layers_from
from conceptseg.extractors.transinterp import class_row
from conceptseg.types import Batch

WEIGHTS = ("heads", "tokens")


def by_head(attention: Float[Tensor, "B A T T"], gradient: Float[Tensor, "B A T T"]) -> Float[Tensor, "B T T"]:
    """Return the sum over heads of attention, head h weighted by the mean of |A_hᵀ ∇A_h|; weights sum to 1 over the heads."""
    weight = (attention.mT @ gradient).abs().mean((-1, -2))
    return torch.einsum("ba,baij->bij", weight / weight.sum(-1, keepdim=True), attention)


def by_token(
    attention: Float[Tensor, "B A T T"], carried: Float[Tensor, "B T d"], entering: Float[Tensor, "B T d"]
) -> Float[Tensor, "B T T"]:
    """Return the mean over heads of attention, the column of each token times ‖its projected value‖ / ‖its residual stream‖."""
    return attention.mean(1) * (carried.norm(dim=-1) / entering.norm(dim=-1))[:, None]


class BeyondIntuition(ClassMethod):
    """The class token's row of Π (I + weighted attention), times (mean gradient of the last attention over scaled images)+.

    weights: "heads" (`by_head`) or "tokens" (`by_token`). start_layer: the first block that enters, counted from 0: 3 with heads
    and 5 with tokens in the released code, whose counts start at 1. steps: images scaled by 0 to 1 in equal steps, each one
    forward and one backward pass, besides one forward pass (with heads, and one backward pass) for the rollout.
    """

    version = 1

    def __init__(
        self,
        backbone: ImageEncoder,
        weights: str = "tokens",
        start_layer: int = 5,
        steps: int = 20,
        explained_class: str = "predicted",
    ) -> None:
        super().__init__(backbone, explained_class)
        one_of("extractor.weights", weights, WEIGHTS)
        in_range("extractor.steps", steps, 2, 10_000)
        self.weights, self.start_layer, self.steps = weights, start_layer, steps

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        layers = layers_from(self.start_layer, len(tower.blocks))
        images = self.backbone.images(batch.tasks)
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        entering: list[Tensor] = []
        with torch.enable_grad(), TapSet(self.backbone.model) as taps:
            for layer in layers:
                tap_input(taps, tower, layer, entering.append)
                tap_normed(taps, tower, layer, normed.append)
                tap_attended(taps, tower, layer, attended.append)
            output = self.backbone.run(needs_gradient(images), taps)
        seen = list(zip(layers, normed, attended, entering, strict=True))
        return self.by_class(batch, output, partial(self._explain, images, output, seen))

    def _explain(
        self, images: Tensor, output: Tensor, seen: list[tuple[int, Tensor, Tensor, Tensor]], explained: Explained
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        arriving: tuple[Tensor | None, ...] = (None,) * len(seen)
        if self.weights == "heads":
            score = self.backbone.score(output, explained).sum()
            arriving = torch.autograd.grad(score, [attended for _, _, attended, _ in seen], retain_graph=True)
        row = None
        for (layer, normed, _, entering), gradient in zip(reversed(seen), reversed(arriving), strict=True):
            _, _, values = tower.query_key_value(layer, normed.detach())
            attention = tower.attention(layer, normed.detach())
            if gradient is None:
                carried = rearrange(values, "B A T k -> B T (A k)") @ tower.blocks[layer].proj.weight.T
                step = by_token(attention, carried, entering.detach())
            else:
                step = by_head(attention, tower.attention_gradient(layer, values, gradient))
            row = class_row(row, step)
        assert row is not None, "there is at least one block"
        return tower.maps((row * self._integrated(images, explained))[:, tower.prefix :])

    def _integrated(self, images: Tensor, explained: Explained) -> Float[Tensor, "B T"]:
        """The class token's row of the last attention's gradient: mean over scaled images, cut at 0, mean over heads."""
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        total: Tensor | None = None
        for share in torch.linspace(0, 1, self.steps).tolist():
            normed: list[Tensor] = []
            attended: list[Tensor] = []
            with torch.enable_grad(), TapSet(self.backbone.model) as taps:
                tap_normed(taps, tower, last, normed.append)
                tap_attended(taps, tower, last, attended.append)
                output = self.backbone.run(needs_gradient(images * share), taps)
                (arriving,) = torch.autograd.grad(self.backbone.score(output, explained).sum(), attended)
            _, _, values = tower.query_key_value(last, normed[0].detach())
            gradient = tower.attention_gradient(last, values, arriving[:, :1])[:, :, 0]
            total = gradient if total is None else total + gradient
        assert total is not None, "there is at least one step"
        return (total / self.steps).clamp(min=0).mean(1)
