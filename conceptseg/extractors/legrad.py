"""LeGrad (Bousselham et al. 2025, arXiv:2404.03214): positive gradients of image-text scores at several depths.

Source for a model with a pooling head: WalBouss/LeGrad at 8c2ca90, legrad/wrapper.py, compute_legrad_siglip, without its
correction, which empties cells that the text "a photo of a" lights. Not checked against the original.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.image_text import ImageTextEncoder
from conceptseg.backbones.encoders.siglip import SigLIPBackbone
from conceptseg.backbones.encoders.tower import tap_attended, tap_block, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.sheets import CLIP
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import ClassMethod, last_layers, needs_gradient, needs_text
from conceptseg.types import Batch


class LeGrad(ClassMethod):
    """Sum over the last blocks of (d score of that block / d its attention)+, averaged over heads and query tokens.

    A block's score is the cosine of the text and of the projected mean of that block's output tokens, the class token included.
    Of a model with a pooling head, each block's output goes into that head, and the attention is the head's to the patches.
    layers: how many of the last blocks; 2 in the released code.
    """

    version = 1
    family = CLIP
    reads_class_token = False
    explains_absent = True  # for `leakage_absent`; one backward pass a word
    backbone: ImageTextEncoder

    def __init__(self, backbone: ImageEncoder | Loaded, layers: int = 2) -> None:
        super().__init__(needs_text(backbone), "given")
        self.layers = layers

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        chosen = list(last_layers(self.layers, len(tower.blocks) - tower.blocks[-1].pools, "layers"))
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        stream: list[Tensor] = []
        with torch.enable_grad(), TapSet(self.backbone.model) as taps:
            for layer in chosen:
                tap_normed(taps, tower, layer, normed.append)
                tap_attended(taps, tower, layer, attended.append)
                tap_block(taps, tower, layer, stream.append)
            output = self.backbone.run(needs_gradient(self.backbone.images(batch.tasks)), taps)
            if isinstance(self.backbone, SigLIPBackbone):
                pooled = [self.backbone.pool(x) for x in stream]
                chosen, normed = [len(tower.blocks) - 1] * len(stream), stream
                attended, images = [gathered for gathered, _ in pooled], [image for _, image in pooled]
            else:
                images = [self.backbone.project(x.mean(1)) for x in stream]
            vectors = [normalize(image, dim=-1) for image in images]
        return self.by_class(batch, output, partial(self._explain, chosen, normed, attended, vectors))

    def _explain(
        self, chosen: list[int], normed: list[Tensor], attended: list[Tensor], vectors: list[Tensor], explained: Explained
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        total = torch.zeros(len(normed[0]), len(tower.positions) - tower.prefix).to(normed[0])
        for layer, x, output, vector in zip(chosen, normed, attended, vectors, strict=True):
            (arriving,) = torch.autograd.grad((vector * explained.rows).sum(), output, retain_graph=True)
            _, _, values = tower.query_key_value(layer, x.detach())
            gradient = tower.attention_gradient(layer, values, arriving)
            total = total + gradient.clamp(min=0).mean((1, 2))[:, tower.prefix :]
        return tower.maps(total)
