"""TextSpan's segmentation: what each patch adds directly to CLIP's image vector (Gandelsman et al. 2024, arXiv:2310.05916).

The class token's image vector is a sum over (layer, head, source token) of attention times value through the output projection,
plus the MLPs and the embedding; patches are compared with text by their parts of that sum. The search for text directions that
the paper is named after is not used for segmentation.
Source: yossigandelsman/clip_text_span at 49f70f3, compute_segmentations.py.
"""

from __future__ import annotations

from copy import copy
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.image_text import ImageTextEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_block, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.sheets import CLIP
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.extractors.image_model import ClassMethod, needs_text, on_every_channel, word_vectors
from conceptseg.types import Batch

REFERENCES = ("labels", "concepts", "none")


class TextSpan(ClassMethod):
    """Direct contribution of each patch to the image vector, dotted with a class's text vector.

    explained_class: "predicted" takes the most probable of the backbone's labels, as the paper does; "given" each word asked
        for, whose maps then share a scale and may be compared.
    reference: what is subtracted: the mean over "labels" (the paper's: over all classes), over the task's "concepts", or
        "none" (ConceptAttention's).
    clip_at_zero: enlarge to the size of the image and cut below 0, as the paper does before it looks for the mean.
    """

    version = 1
    family = CLIP
    backbone: ImageTextEncoder

    def __init__(
        self,
        backbone: ImageEncoder | Loaded,
        explained_class: str = "predicted",
        reference: str = "labels",
        clip_at_zero: bool = True,
    ) -> None:
        super().__init__(needs_text(backbone), explained_class)
        if reference not in REFERENCES:
            raise ConfigError(f'extractor.reference: unknown "{reference}". {did_you_mean(reference, REFERENCES)}')
        self.comparable = explained_class == "given"
        self.reference, self.clip_at_zero = reference, clip_at_zero

    def asked_for_words(self) -> TextSpan:
        """As of every method that explains a class; maps of given words share a scale."""
        given = copy(super().asked_for_words())
        assert isinstance(given, TextSpan)
        given.comparable = True
        return given

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        backbone = self.backbone
        with torch.no_grad():
            patches, image_vectors = patch_contributions(backbone, backbone.images(batch.tasks))
            words = word_vectors(backbone, batch)
            if self.explained_class == "predicted":
                words = backbone.predicted(image_vectors).rows[:, None]
            maps = torch.einsum("blk,bck->bcl", patches, words)
            if self.reference != "none":
                maps = maps - torch.einsum("blk,bk->bl", patches, self._mean_text(batch))[:, None]
            maps = rearrange(maps, "B C (h w) -> B C h w", h=backbone.tower.grid[0])
            if self.clip_at_zero:
                maps = interpolate(maps, size=backbone.image_size, mode="bilinear").clamp(min=0)
        return on_every_channel(batch, maps[:, 0]) if self.explained_class == "predicted" else maps

    def _mean_text(self, batch: Batch) -> Float[Tensor, "B k"]:
        if self.reference == "concepts":
            return word_vectors(self.backbone, batch).mean(1)
        return self.backbone.text_vectors(self.backbone.labels).mean(0).expand(len(batch), -1)


def patch_contributions(
    backbone: ImageTextEncoder, images: Float[Tensor, "B 3 H W"]
) -> tuple[Float[Tensor, "B L k"], Float[Tensor, "B k"]]:
    """Return each patch's direct contribution to the unit-length image vector, and the image vector, not of unit length.

    The last norm is made linear with the class token's own mean and deviation. Only the class token's attention row is formed;
    the output projection's bias, and the norm's mean and bias, are shared out equally over their summands, a constant that the
    cut at 0 notices.
    """
    tower = backbone.tower
    depth, tokens = len(tower.blocks), len(tower.positions)
    sums: list[Tensor] = []
    final: list[Tensor] = []
    with TapSet(backbone.model) as taps:
        for layer in range(depth):
            tap_normed(taps, tower, layer, partial(_add_attended, tower, layer, sums))
        tap_block(taps, tower, depth - 1, lambda stream: final.append(stream[:, 0]))
        image_vectors = backbone.run(images, taps)
    norm, (projection,) = tower.norm, tower.projection
    mean = final[0].mean(-1, keepdim=True)
    deviation = (final[0].var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    summands = (2 * depth + 1) * tokens
    biases = sum(block.proj.bias for block in tower.blocks if block.proj.bias is not None)
    constant = (biases / tokens - depth * mean / summands) * norm.weight / deviation + depth * norm.bias / summands
    direct = sums[0][:, tower.prefix :] * (norm.weight / deviation)[:, None] + constant[:, None]
    return direct @ projection.weight.T / image_vectors.norm(dim=-1)[:, None, None], image_vectors


def _add_attended(tower: Tower, layer: int, sums: list[Tensor], normed: Tensor) -> None:
    """Add this layer's summands, by source token: attention of the class token times value, through the output projection."""
    _, _, values = tower.query_key_value(layer, normed)
    weighted = tower.class_attention(layer, normed)[..., None] * values
    added = rearrange(weighted, "B A T k -> B T (A k)") @ tower.blocks[layer].proj.weight.T
    sums[:] = [sums[0] + added if sums else added]
