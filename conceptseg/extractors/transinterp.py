"""Transformer interpretability beyond attention visualisation (Chefer et al. 2021, arXiv:2012.09838): "TransInterp".

Baselines note, section 4.6: per block I + mean over heads of (gradient · relevance)+, not row-normalised, later blocks left.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.relevance import check_tower, full_precision, relevance_graph
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.tower import tap_attended, tap_normed
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.extractors.rollout import layers_from
from conceptseg.types import Batch


def class_row(row: Float[Tensor, "B T"] | None, step: Float[Tensor, "B T T"]) -> Float[Tensor, "B T"]:
    """The class token's row of (... I + step): blocks come from the last to the first, and no other row is ever read."""
    return step[:, 0] + torch.eye(step.shape[-1])[0].to(step) if row is None else row + (row[:, None] @ step)[:, 0]


class TransInterp(ClassMethod):
    """Gradient-weighted relevance of attention, followed from the class token's row down to block `start_layer`.

    start_layer: the segmentation evaluation leaves block 0 out (1); the authors' notebooks do not (0).
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, start_layer: int = 1, explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class)
        self.start_layer = start_layer

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        layers = layers_from(self.start_layer, len(tower.blocks))
        check_tower(tower)
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        images = self.backbone.images(batch.tasks)
        with torch.enable_grad(), full_precision(), TapSet(self.backbone.model) as taps:
            for layer in layers:
                tap_normed(taps, tower, layer, normed.append)
                tap_attended(taps, tower, layer, attended.append)
            output = self.backbone.run(needs_gradient(images), taps)
        return self.by_class(batch, output, partial(self._explain, images, output, normed, attended))

    def _explain(
        self, images: Tensor, output: Tensor, normed: list[Tensor], attended: list[Tensor], explained: Explained
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        with full_precision():
            arriving = torch.autograd.grad(self.backbone.score(output, explained).sum(), attended, retain_graph=True)
        graph = relevance_graph(tower, images, explained.rows, "new")
        layers = layers_from(self.start_layer, len(tower.blocks))
        with torch.no_grad(), full_precision():
            relevances = graph.relevance_of(*graph.attention[self.start_layer :])
            row = None
            for layer, x, gradient, relevance in reversed(list(zip(layers, normed, arriving, relevances, strict=True))):
                weighted = tower.attention_gradient(layer, x, gradient) * relevance
                row = class_row(row, weighted.clamp(min=0).mean(1))
        assert row is not None, "there is at least one block"
        return tower.maps(row[:, tower.prefix :])
