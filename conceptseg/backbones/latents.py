"""Latent images as tokens, the way Flux lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def spread_out(posterior: Any, generators: Sequence[torch.Generator] | None) -> Tensor:
    """An autoencoder's posterior [B ...] as latents: its mean, or a sample with a generator an image (on the CPU, in float32)."""
    z: Tensor = posterior.mean
    if generators is None:
        return z
    return z + posterior.std * torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)
