"""Latent images as tokens, the way Flux lays them out."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """Latents [B c 2h 2w] -> tokens [B h·w c·4], row-major, channels before the two pixels of a side."""
    return rearrange(latents, "B c (h a) (w b) -> B (h w) (c a b)", a=2, b=2)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `pack`; grid is (h, w) in tokens."""
    return rearrange(tokens, "B (h w) (c a b) -> B c (h a) (w b)", h=grid[0], w=grid[1], a=2, b=2)


def image_ids(h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """Rotary position ids of image tokens, float [h·w 3]: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(h * w, 3).float().to(device)
