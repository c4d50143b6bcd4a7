"""Attention of the class token in the last block: Chefer's "raw attention" on a classifier, and the DINO family's maps.

Sources: Chefer et al. 2021 (arXiv:2012.09838), baseline "raw attention"; Caron et al. 2021 (arXiv:2104.14294), Fig. 1;
hila-chefer/Transformer-Explainability at c3e578f; facebookresearch/dino at 7c446df, visualize_attention.py.
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
from conceptseg.extractors.image_model import ImageModelMethod, on_every_channel
from conceptseg.types import Batch


class SelfAttention(ImageModelMethod):
    """Mean over heads of the class token's attention to each patch; registers are passed over, rows are not renormalised.

    It knows no class: with several objects in view it can't tell them apart.
    """

    version = 1
    told = "nothing"
    comparable = False

    def __init__(self, backbone: ImageEncoder | Loaded) -> None:
        super().__init__(backbone)

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        found: list[Tensor] = []
        with torch.no_grad(), TapSet(self.backbone.model) as taps:
            tap_normed(taps, tower, last, partial(self._read, tower, last, found))
            self.backbone.run(self.backbone.images(batch.tasks), taps)
        return on_every_channel(batch, tower.maps(found[0]))

    def _read(self, tower: Tower, layer: int, found: list[Tensor], normed: Tensor) -> None:
        found.append(tower.class_attention(layer, normed).mean(1)[:, tower.prefix :])
        raise StopForward
