"""Attention rollout (Abnar & Zuidema 2020, arXiv:2005.00928), as Chefer et al. 2021 evaluate it.

Rows of (mean over heads + I) divided by their sums, later blocks on the left.
Source: hila-chefer/Transformer-Explainability at c3e578f, baselines/ViT/ViT_explanation_generator.py.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import ConfigError
from conceptseg.extractors.image_model import ImageModelMethod, on_every_channel
from conceptseg.types import Batch


def mixed_in(attention: Float[Tensor, "B T T"], running: Float[Tensor, "B T T"] | None) -> Float[Tensor, "B T T"]:
    """Multiply one more block from the left: attention averaged over heads, plus the residual, rows normalised to 1."""
    with_residual = attention + torch.eye(attention.shape[-1]).to(attention)
    rows = with_residual / with_residual.sum(-1, keepdim=True)
    return rows if running is None else rows @ running


class Rollout(ImageModelMethod):
    """How much of each patch reaches the class token when attention alone is followed through the blocks.

    start_layer: the first block that enters; Chefer's segmentation leaves block 0 out (1), his notebooks do not (0).
    """

    version = 1
    told = "nothing"
    comparable = False

    def __init__(self, backbone: ImageEncoder | Loaded, start_layer: int = 1) -> None:
        super().__init__(backbone)
        self.start_layer = start_layer

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        product: list[Tensor] = []
        with torch.no_grad(), TapSet(self.backbone.model) as taps:
            for layer in layers_from(self.start_layer, len(tower.blocks)):
                tap_normed(taps, tower, layer, partial(self._mix, tower, layer, product))
            self.backbone.run(self.backbone.images(batch.tasks), taps)
        return on_every_channel(batch, tower.maps(product[0][:, 0, tower.prefix :]))

    def _mix(self, tower: Tower, layer: int, product: list[Tensor], normed: Tensor) -> None:
        product[:] = [mixed_in(tower.attention(layer, normed).mean(1), product[0] if product else None)]
        if layer == len(tower.blocks) - 1:
            raise StopForward


def layers_from(start: int, depth: int) -> range:
    """Blocks start..last. Raises ConfigError where none is left."""
    if not 0 <= start < depth:
        raise ConfigError(f"extractor.start_layer is {start}, but this model has blocks 0 to {depth - 1}.")
    return range(start, depth)
