"""LeGrad (Bousselham et al. 2025, arXiv:2404.03214): positive gradients of image-text scores at several depths."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.tower import tap_attended, tap_block, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.sheets import CLIP
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import ClassMethod, last_layers, needs_gradient, needs_text
from conceptseg.types import Batch


class LeGrad(ClassMethod):
    """Sum over the last blocks of (d score of that block / d its attention)+, averaged over heads and query tokens.

    A block's score is the cosine of the text and of the projected mean of that block's output tokens, the class token included.
    layers: how many of the last blocks; 2 in the released code.
    """

    version = 1
    family = CLIP
    backbone: CLIPBackbone

    def __init__(self, backbone: ImageEncoder | Loaded, layers: int = 2) -> None:
        super().__init__(needs_text(backbone), "given")
        self.layers = layers

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        chosen = last_layers(self.layers, len(tower.blocks), "layers")
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        stream: list[Tensor] = []
        with torch.enable_grad(), TapSet(self.backbone.model) as taps:
            for layer in chosen:
                tap_normed(taps, tower, layer, normed.append)
                tap_attended(taps, tower, layer, attended.append)
                tap_block(taps, tower, layer, stream.append)
            output = self.backbone.run(needs_gradient(self.backbone.images(batch.tasks)), taps)
            vectors = [normalize(self.backbone.project(x.mean(1)), dim=-1) for x in stream]
        return self.by_class(batch, output, partial(self._explain, chosen, normed, attended, vectors))

    def _explain(
        self, chosen: range, normed: list[Tensor], attended: list[Tensor], vectors: list[Tensor], explained: Explained
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        total = torch.zeros(len(normed[0]), len(tower.positions) - tower.prefix).to(normed[0])
        for layer, x, output, vector in zip(chosen, normed, attended, vectors, strict=True):
            (arriving,) = torch.autograd.grad((vector * explained.rows).sum(), output, retain_graph=True)
            _, _, values = tower.query_key_value(layer, x.detach())
            gradient = tower.attention_gradient(layer, values, arriving)
            total = total + gradient.clamp(min=0).mean((1, 2))[:, tower.prefix :]
        return tower.maps(total)
