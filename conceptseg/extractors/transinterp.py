"""Transformer interpretability beyond attention visualisation (Chefer et al. 2021, arXiv:2012.09838): "TransInterp".

Per block I + mean over heads of (gradient · relevance)+, not row-normalised, later blocks left.
Source: hila-chefer/Transformer-Explainability at c3e578f, baselines/ViT/ViT_explanation_generator.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.activations import Activations
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.relevance import relevance_graph
from conceptseg.backbones.in_memory import Loaded
from conceptseg.extractors.relevance_method import RelevanceMethod
from conceptseg.extractors.rollout import layers_from
from conceptseg.types import Batch


def class_row(row: Float[Tensor, "B T"] | None, step: Float[Tensor, "B _ T"]) -> Float[Tensor, "B T"]:
    """Return the class token's row of row @ (I + step), from the last block to the first; no other row is read."""
    return step[:, 0] + torch.eye(step.shape[-1])[0].to(step) if row is None else row + (row[:, None] @ step)[:, 0]


class TransInterp(RelevanceMethod):
    """Gradient-weighted relevance of attention, followed from the class token's row down to block `start_layer`.

    start_layer: the segmentation evaluation leaves block 0 out (1); the authors' notebooks do not (0).
    """

    version = 1
    needs_gradients = True

    def __init__(self, backbone: ImageEncoder | Loaded, start_layer: int = 1, explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class, start_layer)

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        layers_from(self.first_layer, len(self.backbone.tower.blocks))
        return super().saliency(batch)

    def relevance_map(
        self,
        images: Float[Tensor, "B 3 H W"],
        output: Float[Tensor, "B k"],
        activations: Activations,
        explained: Explained,
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        graph = relevance_graph(tower, activations, explained.rows, "new")
        attended = [block.attended for block in activations.blocks]
        row = None
        arriving = torch.autograd.grad(self.backbone.score(output, explained).sum(), attended, retain_graph=True)
        relevances = graph.relevance_of(*graph.attention)
        for layer in reversed(range(len(attended))):
            _, _, values = tower.split_heads(activations.blocks[layer].mapped.detach())
            queries = arriving[layer][:, : relevances[layer].shape[2]]  # of the last block the class token alone
            gradient = tower.attention_gradient(activations.first + layer, values, queries)
            row = class_row(row, gradient.mul_(relevances[layer]).clamp_(min=0).mean(1))
        assert row is not None, "there is at least one block"
        return tower.maps(row[:, tower.prefix :])
