"""Deletion and insertion: probability of a class while the pixels that a map ranks first are taken away or put back.

Source: Petsiuk et al. 2018, RISE (arXiv:1806.07421), section 4.1, and eclique/RISE at fac5d54, evaluation.py. Its blur is
padded with zeros and a step is as many pixels as its user says; here the border is reflected and there are 16 steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Probability = Callable[[Float[Tensor, "N 3 H W"]], Float[Tensor, " N"]]
"""Probability of one class, in 0..1, for each of N normalised images."""
STEPS = 16
"""Shares of the pixels at which the classifier is asked: 0, 1/16, ..., 1."""
BLUR, SIGMA = 11, 5.0
"""Side of the blur's kernel and its deviation, in pixels."""


def deletion(image: Float[Tensor, "3 H W"], scores: Float[np.ndarray, "H W"], probability: Probability, key: str) -> float:
    """Return the area, 0..1, under the class's probability while pixels go to the mean colour, those of greatest score first.

    image: normalised, so that 0 is the mean colour. probability: of the explained class, for N images [N 3 H W]. key: of the
    sample; equal scores are ordered by a draw that depends on it alone.
    """
    return _area(image, torch.zeros_like(image), scores, probability, key)


def insertion(image: Float[Tensor, "3 H W"], scores: Float[np.ndarray, "H W"], probability: Probability, key: str) -> float:
    """Return the area, 0..1, under the class's probability while pixels return to a blurred image, those of greatest score first.

    Arguments as of `deletion`.
    """
    from torchvision.transforms.functional import gaussian_blur  # type: ignore[import-untyped]

    return _area(gaussian_blur(image, [BLUR, BLUR], [SIGMA, SIGMA]), image, scores, probability, key)


def _area(
    start: Float[Tensor, "3 H W"],
    end: Float[Tensor, "3 H W"],
    scores: Float[np.ndarray, "H W"],
    probability: Probability,
    key: str,
) -> float:
    """The trapezoid area under the probability of images between `start` and `end`, of which the first pixels are the end's."""
    rank = torch.from_numpy(ranks(scores, key)).to(start.device)
    shown = [torch.where(rank < round(step / STEPS * rank.numel()), end, start) for step in range(STEPS + 1)]
    found = probability(torch.stack(shown)).double().cpu()
    return float(torch.trapezoid(found, dx=1 / STEPS))


def ranks(scores: Float[np.ndarray, "H W"], key: str) -> np.ndarray:
    """Return each pixel's place [H W] in the order from greatest to least score; equal scores in an order drawn from `key`."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    ties = np.random.default_rng(seed).permutation(scores.size)
    order = np.lexsort((ties, -scores.ravel().astype(np.float64)))
    found = np.empty(scores.size, np.int64)
    found[order] = np.arange(scores.size)
    return found.reshape(scores.shape)


AGAIN: dict[str, Callable[[Float[Tensor, "3 H W"], Float[np.ndarray, "H W"], Probability, str], float]] = {
    "deletion": deletion, "insertion": insertion,
}  # fmt: skip
"""Name -> (normalised image, map of a word at its size, probability of the word's class, key of the sample) -> number."""
