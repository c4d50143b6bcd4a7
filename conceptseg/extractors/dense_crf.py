"""A fully connected CRF by mean field (Krähenbühl & Koltun 2011, arXiv:1210.5644), with every pair of pixels counted.

The authors' lattice approximates the sums over pairs of like colour; here they are exact. A picture of N pixels costs N²
exponentials, once where they fit in memory and otherwise in every iteration: well for the lab's, and for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

PAIRS_AT_ONCE = 1 << 24
"""Pairs of pixels whose likeness is held in memory: 64 MB in float32, all pairs of 64 x 64 pixels."""

LEAST_EXPONENT = -87.0
"""The least whole number whose exponential is a normal number in float32: 1.6e-38. A pixel's likeness to itself is 1."""


@dataclass(frozen=True, slots=True)
class DenseCRF:
    """The constants of one CRF (the paper's Eq. 3): two Gaussian kernels, each with a weight; labels differ or not (Potts).

    appearance_weight, appearance_xy, appearance_rgb: w⁽¹⁾, θ_α and θ_β of the kernel on positions and colours; smoothness_weight,
    smoothness_xy: w⁽²⁾ and θ_γ of the one on positions alone. Deviations are in pixels and in levels of 0..255.
    """

    appearance_weight: float
    appearance_xy: float
    appearance_rgb: float
    smoothness_weight: float
    smoothness_xy: float
    iterations: int

    def __call__(self, probabilities: Float[Tensor, "n C h w"], image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n C h w"]:
        """Probabilities after the iterations, for n labellings of one image (0..1); each sums to 1 over its C labels.

        Each kernel is divided by the roots of both pixels' sums over it.
        """
        evidence = probabilities.clamp(min=1e-5).log()
        found = torch.softmax(evidence, dim=1)
        kernels = [
            (self.appearance_weight, alike_in_place_and_colour(image, self.appearance_xy, self.appearance_rgb)),
            (self.smoothness_weight, alike_in_place(image, self.smoothness_xy)),
        ]
        roots = [summed(torch.ones_like(image[None, :1])).sqrt() for _, summed in kernels]
        for _ in range(self.iterations):
            agreeing = [w * summed(found / root) / root for (w, summed), root in zip(kernels, roots, strict=True)]
            found = torch.softmax(evidence + agreeing[0] + agreeing[1], dim=1)
        return found


Summed = Callable[[Float[Tensor, "n C h w"]], Float[Tensor, "n C h w"]]
"""Σ over all pixels j, itself included, of exp(-|f_i - f_j|² / 2) · value_j at every pixel i."""


def alike_in_place(image: Float[Tensor, "3 h w"], deviation: float) -> Summed:
    """Return a kernel by which near pixels are alike: a product of a kernel on rows and one on columns. deviation: in pixels."""
    rows, columns = (_gaussian(torch.arange(side).to(image)[:, None] / deviation) for side in image.shape[1:])
    return lambda values: rows @ values @ columns


def alike_in_place_and_colour(image: Float[Tensor, "3 h w"], deviation: float, rgb_deviation: float) -> Summed:
    """Return a kernel by which near pixels of similar colour are alike. deviation: in pixels; rgb_deviation: in colour units."""
    height, width = image.shape[1:]
    at = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(image)
    features = rearrange(torch.cat([at / deviation, 255 * image / rgb_deviation]), "f h w -> (h w) f")
    parts = features.split(max(1, PAIRS_AT_ONCE // len(features)))
    kept = [_gaussian(features)] if len(parts) == 1 else None

    def summed(values: Tensor) -> Tensor:
        flat = rearrange(values, "n C h w -> (h w) (n C)")
        found = [kernel @ flat for kernel in kept or (_gaussian(part, features) for part in parts)]
        return rearrange(torch.cat(found), "(h w) (n C) -> n C h w", h=height, n=len(values))

    return summed


def _gaussian(some: Float[Tensor, "P f"], others: Float[Tensor, "N f"] | None = None) -> Float[Tensor, "P N"]:
    # By differences: |a|² + |b|² - 2ab rounds away what sets two like colours apart.
    apart = torch.cdist(some, some if others is None else others, compute_mode="donot_use_mm_for_euclid_dist")
    # Below LEAST_EXPONENT results are subnormal, which processors compute ten times slower, and too small to change any sum.
    return apart.square_().mul_(-0.5).clamp_(min=LEAST_EXPONENT).exp_()
