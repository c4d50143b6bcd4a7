"""A fully connected CRF by mean field (Krähenbühl & Koltun 2011, arXiv:1210.5644), with every pair of pixels counted.

The authors' lattice approximates the sums over pairs; here they are exact and taken in parts of the rows, so that a picture of
N pixels costs N² exponentials an iteration: well for the lab's, a matter of seconds for 224 pixels a side on a GPU.
Settings are CLIPasRNN's (baselines note, section 6.4, step 5).
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

SMOOTHNESS, APPEARANCE = 3.0, 4.0
"""Weights of the kernel on positions alone and of the one on positions and colours."""
SMOOTH_XY, APPEARANCE_XY, APPEARANCE_RGB = 1.0, 67.0, 3.0
"""Standard deviations, in pixels and in levels of 0..255."""
ROWS_AT_ONCE = 4096


def dense_crf(probabilities: Float[Tensor, "C h w"], image: Float[Tensor, "3 h w"], iterations: int) -> Float[Tensor, "C h w"]:
    """Probabilities after `iterations` rounds; they sum to 1 over the labels. image: 0..1.

    Labels differ or not (Potts), and each kernel is divided by the roots of both pixels' sums over it.
    """
    height, width = image.shape[1:]
    at = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1).T.to(image)
    colours = rearrange(255 * image, "c h w -> (h w) c")
    kernels = [
        (SMOOTHNESS, at / SMOOTH_XY),
        (APPEARANCE, torch.cat([at / APPEARANCE_XY, colours / APPEARANCE_RGB], dim=1)),
    ]
    roots = [gathered(features, torch.ones_like(at[:, :1])).sqrt() for _, features in kernels]
    evidence = rearrange(probabilities, "C h w -> (h w) C").clamp(min=1e-5).log()
    found = torch.softmax(evidence, dim=1)
    for _ in range(iterations):
        agreeing = [w * gathered(f, found / root) / root for (w, f), root in zip(kernels, roots, strict=True)]
        found = torch.softmax(evidence + agreeing[0] + agreeing[1], dim=1)
    return rearrange(found, "(h w) C -> C h w", h=height)


def gathered(features: Float[Tensor, "N f"], values: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
    """Σ over all pixels j, itself included, of exp(-|f_i - f_j|² / 2) · value_j."""
    parts = features.split(ROWS_AT_ONCE)
    return torch.cat([torch.exp(-0.5 * torch.cdist(part, features) ** 2) @ values for part in parts])
