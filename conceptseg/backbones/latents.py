"""Latent images as tokens, the way Flux lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def pack(latents: Float[Tensor, "B c H W"]) -> Float[Tensor, "B L d"]:
    """Lay out latents as tokens: H = 2h, W = 2w, L = h·w row-major, d = 4c with channels before the 2 x 2 latent pixels.

    >>> pack(torch.arange(16.0).reshape(1, 1, 4, 4))[0]
    tensor([[ 0.,  1.,  4.,  5.],
            [ 2.,  3.,  6.,  7.],
            [ 8.,  9., 12., 13.],
            [10., 11., 14., 15.]])
    """
    return rearrange(latents, "B c (h a) (w b) -> B (h w) (c a b)", a=2, b=2)


def unpack(tokens: Float[Tensor, "B L d"], grid: tuple[int, int]) -> Float[Tensor, "B c H W"]:
    """Invert `pack`; grid is (h, w) in tokens."""
    return rearrange(tokens, "B (h w) (c a b) -> B c (h a) (w b)", h=grid[0], w=grid[1], a=2, b=2)


def image_ids(h: int, w: int, device: torch.device | str = "cpu") -> Float[Tensor, "L 3"]:
    """Return rotary position ids of the L = h·w image tokens, row-major: (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(h * w, 3).float().to(device)


def spread_out(posterior: Any, generators: Sequence[torch.Generator] | None) -> Float[Tensor, "B *c h w"]:
    """Return an autoencoder's posterior as unscaled latents: its mean, or a sample with one generator per image.

    Samples are drawn on the CPU in float32. Video latents have a frame axis before h.
    """
    z: Tensor = posterior.mean
    if generators is None:
        return z
    return z + posterior.std * torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators]).to(z)
