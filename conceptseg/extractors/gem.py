"""GEM, "grounding everything" (Bousselham et al. 2024, arXiv:2312.00878): self-self attention beside CLIP's last blocks."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, normalize

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_input, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import PatchTextMethod, last_layers
from conceptseg.types import Batch


def self_self_attention(tower: Tower, layer: int, normed: Float[Tensor, "B T d"], iterations: int) -> Float[Tensor, "B T d"]:
    """Let queries, keys and values attend to their own kind; return the projected mean of the values that each gathers.

    Vectors have unit length; scores are multiplied by the mean length of the block's normed tokens over √(head width). Every
    iteration replaces the vectors by what they attend to.
    """
    queries, keys, values = tower.query_key_value(layer, normed)
    sharpness = normed.norm(dim=-1).mean(-1)[:, None, None, None] * queries.shape[-1] ** -0.5
    gathered = []
    for vectors in (values, keys, queries):
        for _ in range(iterations):
            vectors = normalize(vectors, dim=-1)
            vectors = torch.softmax(vectors @ vectors.mT * sharpness, dim=-1) @ vectors
        vectors = normalize(vectors, dim=-1)
        gathered.append(torch.softmax(vectors @ vectors.mT * sharpness, dim=-1) @ values)
    mixed = rearrange(torch.stack(gathered).mean(0), "B A T k -> B T (A k)")
    proj = tower.blocks[layer].proj
    return linear(mixed, proj.weight, proj.bias)


class GEM(PatchTextMethod):
    """A second residual stream that leaves CLIP's own at block -`layers` and takes self-self attention only, no MLP.

    layers: how many of the last blocks; 6 in the released code for ViT-B (its "depth 7"). iterations: of the attention.
    """

    version = 1
    reads_class_token = True  # its stream ends in the projection of that token; through a pooling head it has no definition

    def __init__(self, backbone: ImageEncoder | Loaded, layers: int = 6, iterations: int = 1) -> None:
        super().__init__(backbone)
        self.layers, self.iterations = layers, iterations

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        tower = self.backbone.tower
        chosen = last_layers(self.layers, len(tower.blocks), "layers")
        stream: list[Tensor] = []
        with TapSet(self.backbone.model) as taps:
            tap_input(taps, tower, chosen[0], stream.append)
            for layer in chosen:
                tap_normed(taps, tower, layer, partial(self._add, tower, layer, stream))
            self.backbone.run(self.backbone.images(batch.tasks), taps)
        return rearrange(self.backbone.project(stream[0][:, tower.prefix :]), "B (h w) k -> B h w k", h=tower.grid[0])

    def _add(self, tower: Tower, layer: int, stream: list[Tensor], normed: Tensor) -> None:
        stream[0] = stream[0] + self_self_attention(tower, layer, normed, self.iterations)
