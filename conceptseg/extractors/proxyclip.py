"""ProxyCLIP (Lan et al. 2024, arXiv:2408.04883): CLIP's last values, mixed by the affinity of DINO's patches."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, linear, normalize

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import tap_block
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


def affinity(vectors: Float[Tensor, "B L d"], beta: float, gamma: float) -> Float[Tensor, "B L L"]:
    """Return the softmax over patches of γ (cosine - β · the image's mean cosine), negative entries left out.

    A patch always keeps itself unless β times the mean exceeds 1, in which case nothing would be left.
    """
    unit = normalize(vectors, dim=-1)
    cosine = unit @ unit.mT
    score = gamma * (cosine - beta * cosine.mean((1, 2), keepdim=True))
    score = score.masked_fill(score < 0, float("-inf"))
    # Where all patches are alike (mean cosine 1, β > 1) every entry is negative: attention stays with the patch itself.
    empty = torch.isinf(score).all(-1, keepdim=True)
    alone = torch.eye(score.shape[-1]).to(score).log()
    return torch.softmax(torch.where(empty, alone.expand_as(score), score), dim=-1)


class ProxyCLIP(PatchTextMethod):
    """The last block's values, enlarged to DINO's grid, mixed by DINO's affinity, projected; residual and MLP are dropped.

    proxy: the companion that lends its patches (normed output of its last block). beta, gamma: 1.2 and 3 in the paper.
    """

    version = 1

    def __init__(
        self, backbone: ImageEncoder | Loaded, proxy: ViTBackbone | Loaded, beta: float = 1.2, gamma: float = 3.0
    ) -> None:
        super().__init__(backbone)
        self.proxy, self.beta, self.gamma = backbone_from(proxy), beta, gamma

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        _, _, values = self.last_query_key_value(batch)
        grid = self.proxy.tower.grid
        placed = rearrange(values[:, :, tower.prefix :], "B A (h w) k -> B (A k) h w", h=tower.grid[0])
        enlarged = interpolate(placed, size=grid, mode="bilinear")
        attention = affinity(self._proxy_patches(batch), self.beta, self.gamma).to(enlarged)
        mixed = attention @ rearrange(enlarged, "B d h w -> B (h w) d")
        proj = tower.blocks[last].proj
        vectors = self.backbone.project(linear(mixed, proj.weight, proj.bias))
        return rearrange(vectors, "B (h w) k -> B h w k", h=grid[0])

    def _proxy_patches(self, batch: Batch) -> Float[Tensor, "B L d"]:
        tower = self.proxy.tower
        stream: list[Tensor] = []
        with TapSet(self.proxy.model) as taps:
            tap_block(taps, tower, len(tower.blocks) - 1, stream.append)
            self.proxy.run(self.proxy.images(batch.tasks), taps)
        return tower.norm(stream[0])[:, tower.prefix :]
