"""PAMR: scores that are smoothed along the colours of the image, without any model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


def pamr(
    scores: Float[np.ndarray, "C H W"], image: Float[np.ndarray, "H W 3"], steps: int, dilations: Sequence[int]
) -> Float[np.ndarray, "C H W"]:
    """Return scores after `steps` rounds in which each pixel takes the weighted mean of its neighbours' scores.

    scores: of C concepts, any scale. image: in 0..1, at the scores' size. dilations: distances in pixels; at each of them a pixel
    has eight neighbours, beyond the edge the nearest pixel's. Weights are the softmax over all neighbours of
    -|difference| / (0.1 deviation), averaged over colours, where the deviation is that of the pixels at all distances, the centre
    once for each.
    Source: Araslanov and Roth 2020, arXiv:2005.08104; visinf/1-stage-wseg at bebc9a6, models/mods/pamr.py.
    """
    height, width = scores.shape[-2:]
    reach = max(dilations)
    places = [(reach + row * d, reach + column * d) for d in dilations for row, column in NEIGHBOURS]

    def widened(values: Tensor) -> Tensor:
        return pad(values[None], [reach] * 4, mode="replicate")[0]

    def at(wide: Tensor, place: tuple[int, int]) -> Tensor:
        return wide[:, place[0] : place[0] + height, place[1] : place[1] + width]

    colours = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
    around = torch.stack([at(widened(colours), place) for place in places])
    deviation = torch.cat([around, colours.expand(len(dilations), -1, -1, -1)]).std(0)
    weights = torch.softmax((-(around - colours).abs() / (1e-8 + 0.1 * deviation)).mean(1), dim=0)
    found = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32))
    for _ in range(steps):
        wide, found = widened(found), torch.zeros_like(found)
        for weight, place in zip(weights, places, strict=True):
            found.addcmul_(weight, at(wide, place))
    return found.numpy()
