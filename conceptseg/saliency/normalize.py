"""The normalisations that ConceptAttention and its successors apply to concept vectors and to score maps."""

from __future__ import annotations

from math import ceil, log

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d, normalize, pad


def linear_over_concepts(vectors: Float[Tensor, "*R C d"]) -> Float[Tensor, "*R C d"]:
    """Subtract the least value over the C concepts from each feature, and divide by the sum that is left (by 1 if it is 0).

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
    """Divide each concept vector by its Euclidean length, as the released SD3 wrapper does."""
    return normalize(vectors, dim=-1)


def softmax_over_concepts(scores: Float[Tensor, "*R C L"], temperature: float = 1.0) -> Float[Tensor, "*R C L"]:
    """Take the softmax over the C concepts at each image token; shares in 0..1.

    temperature: factor of the scores (1000 in the released FLUX.2 code).
    """
    return torch.softmax(scores if temperature == 1 else scores * temperature, dim=-2)


def standardize_over_concepts(scores: Float[Tensor, "*R C L"]) -> Float[Tensor, "*R C L"]:
    """Subtract the mean over the C concepts at each image token, and divide by their standard deviation plus 1e-6.

    The deviation is the sample's, over C - 1. A single concept gives zeros.
    Source: IMAP, arXiv:2603.02919, youngjun-jun/IMAP at a7b078d, imap/cogvideox/modified_attention_layer.py.

    >>> standardize_over_concepts(torch.tensor([[1.0], [2.0], [3.0]])).flatten()
    tensor([-1.0000,  0.0000,  1.0000])
    """
    if scores.shape[-2] == 1:
        return torch.zeros_like(scores)
    return (scores - scores.mean(-2, keepdim=True)) / (scores.std(-2, keepdim=True) + 1e-6)


def softmax_over_tokens(scores: Float[Tensor, "*R C L"], temperature: float = 1.0) -> Float[Tensor, "*R C L"]:
    """Take the softmax over the L image tokens for each concept, like the reference's diffusers port, unlike the paper."""
    return torch.softmax(scores * temperature, dim=-1)


QUADRATURE_STEP = 0.45
"""Spacing of the nodes in log s. The trapezoid rule's error falls as exp(-pi^2 / step): about 1e-8 here."""


def shapley_over_concepts(
    scores: Float[Tensor, "R C L"], always: Bool[Tensor, "R C"] | None = None, temperature: float = 1.0
) -> Float[Tensor, "R C L"]:
    """Each name's Shapley mean of its softmax over all coalitions of names; shares in 0..1, in float32.

    scores: rows, concepts, image tokens. always: True for concepts that are in every coalition (background words); None for
    none. Such a concept keeps its softmax over all concepts. temperature multiplies the scores.

    Over the coalitions T of N names that hold name t, the mean of softmax_t(T and background) with Shapley's weights
    (|T| - 1)! (N - |T|)! / N! equals the double integral over p in 0..1 and s > 0 of
    b_t exp(-s (b_t + c)) prod_{j != t} (1 - p + p exp(-s b_j)), where b = exp(score) and c is the background's sum of b.
    The integrand is a polynomial in p, which ceil(N / 2) Gauss-Legendre nodes integrate exactly; in s the trapezoid rule runs
    over log s. The cost is linear in N^2 per token where enumeration takes 2^N.
    Source: METAGAME, arXiv:2605.06295, and its code CredibleAI/metagame at 046ee81, main.py, which enumerates; the quadrature is
    our own.

    >>> scores = torch.tensor([[[1.0], [0.0], [0.0]]])
    >>> shapley_over_concepts(scores, torch.tensor([[False, True, True]])).flatten()  # one name: its softmax
    tensor([0.5761, 0.2119, 0.2119])
    """
    scores = scores.float() * temperature
    always = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device) if always is None else always.to(scores.device)
    fixed = always[:, :, None]
    scores = scores - scores.amax(1, keepdim=True)
    whole = scores.logsumexp(1, keepdim=True)
    background = scores.masked_fill(~fixed, -torch.inf).logsumexp(1, keepdim=True)
    least = torch.logaddexp(background, scores.masked_fill(fixed, torch.inf).amin(1, keepdim=True))
    least = torch.where(least.isfinite(), least, whole)  # a row of background words alone
    first, last = log(1e-8) - whole, log(45) - least
    steps = max(ceil(float((last - first).max()) / QUADRATURE_STEP), 1)
    names = int((~always).sum(1).max())
    nodes, weights = np.polynomial.legendre.leggauss(max(ceil(names / 2), 1))
    shares, width = torch.zeros_like(scores), (last - first) / steps
    for step in range(steps + 1):
        at = first + step * width
        powers = torch.exp(at + scores)  # s b
        decay = torch.exp(-powers)
        # s b_t exp(-s (b_t + c)), as one exponential: s b may overflow where the whole is zero.
        integrand = torch.exp(at + scores - powers - torch.exp(at + background))
        product = torch.zeros_like(scores)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            p = (node + 1) / 2
            factors = torch.where(fixed, 1.0, 1 - p + p * decay)
            product += weight / 2 * factors.prod(1, keepdim=True) / factors
        shares += integrand * product * width * (0.5 if step in (0, steps) else 1.0)
    return torch.where(fixed, torch.softmax(scores, dim=1), shares)


def gaussian_blur(maps: Float[Tensor, "B C h w"], sigma: float) -> Float[Tensor, "B C h w"]:
    """Blur each map with a 3 x 3 Gaussian, border reflected. sigma: in map cells; the taps at 1 are 0.27407, 0.45186, 0.27407."""
    at = torch.arange(-1, 2, dtype=maps.dtype, device=maps.device)
    taps = torch.exp(-0.5 * (at / sigma) ** 2)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps[None, :])[None, None]
    flat = pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(flat, kernel).view_as(maps)
