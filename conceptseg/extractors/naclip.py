"""NACLIP (Hajimiri et al. 2025, arXiv:2404.08181): the last block attends by keys alone and to its neighbourhood."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.in_memory import Loaded
from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


def neighbourhood(grid: tuple[int, int], sigma: float) -> Float[Tensor, "L L"]:
    """Return exp(-distance² / 2σ²) between patches, distances in patches; 1 on the diagonal."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    at = torch.stack([rows.flatten(), columns.flatten()], dim=1).double()
    return torch.exp(-((at[:, None] - at[None]) ** 2).sum(-1) / (2 * sigma**2))


class NACLIP(PatchTextMethod):
    """softmax(k kᵀ / √d + neighbourhood) times the values, through the output projection; residual and MLP are dropped.

    sigma: of the neighbourhood, in patches.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder | Loaded, sigma: float = 5.0) -> None:
        super().__init__(backbone)
        self.sigma = sigma

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        tower = self.backbone.tower
        _, keys, values = self.last_query_key_value(batch)
        near = pad(neighbourhood(tower.grid, self.sigma), (tower.prefix, 0, tower.prefix, 0)).to(keys)
        attention = torch.softmax(keys @ keys.mT * keys.shape[-1] ** -0.5 + near, dim=-1)
        return self.read_out(attention @ values)
