"""The normalisations that ConceptAttention applies to concept vectors and to score maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, normalize, pad


def linear_over_concepts(vectors: Float[Tensor, "*R C d"]) -> Float[Tensor, "*R C d"]:
    """Per feature: subtract the least value over concepts, divide by the sum that is left (by 1 where nothing is left).

    Every feature then sums to 1 over the concepts, or is 0 where all concepts agree. A single concept gives zeros.
    Source: released evaluation code of Helbling et al. 2025 (arXiv:2502.04320); the paper does not mention it.

    >>> linear_over_concepts(torch.tensor([[1.0, -2.0, 0.0], [3.0, -2.0, 0.0], [2.0, 1.0, 0.0]])).T
    tensor([[0.0000, 0.6667, 0.3333],
            [0.0000, 0.0000, 1.0000],
            [0.0000, 0.0000, 0.0000]])
    """
    raised = vectors - vectors.amin(dim=-2, keepdim=True)
    total = raised.sum(dim=-2, keepdim=True)
    return raised / torch.where(total == 0, torch.ones_like(total), total)


def unit_length(vectors: Float[Tensor, "*R C d"]) -> Float[Tensor, "*R C d"]:
    """Each concept vector divided by its Euclidean length, as the released SD3 wrapper does."""
    return normalize(vectors, dim=-1)


def softmax_over_concepts(scores: Float[Tensor, "*R C L"], temperature: float = 1.0) -> Float[Tensor, "*R C L"]:
    """Concepts compete for each image token. temperature multiplies the scores (1000 in the released FLUX.2 code)."""
    return torch.softmax(scores if temperature == 1 else scores * temperature, dim=-2)


def softmax_over_tokens(scores: Float[Tensor, "*R C L"], temperature: float = 1.0) -> Float[Tensor, "*R C L"]:
    """Image tokens compete for each concept: what the reference's diffusers port does, and not the paper's method."""
    return torch.softmax(scores * temperature, dim=-1)


def gaussian_blur(maps: Float[Tensor, "B C h w"], sigma: float) -> Float[Tensor, "B C h w"]:
    """3 x 3 Gaussian with reflected border; at sigma 1 the taps are 0.27407, 0.45186, 0.27407."""
    at = torch.arange(-1, 2, dtype=maps.dtype, device=maps.device)
    taps = torch.exp(-0.5 * (at / sigma) ** 2)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps[None, :])[None, None]
    flat = pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(flat, kernel).view_as(maps)
