"""Attention matrices of one forward pass, mean over heads and layers, computed some rows at a time and never held by head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

HELD_SCORES = 2**22
"""Scores of some rows of all heads that are held at once: 16 MiB in float32, and as much again for their softmax."""


def attention_by_head(
    queries: Float[Tensor, "R A N d"], keys: Float[Tensor, "R A S d"], scale: float
) -> Iterator[tuple[slice, Float[Tensor, "R A m S"]]]:
    """Yield some of the N rows at a time: which, and their attention to S keys in every head, 0..1, softmax in float32."""
    rows, heads, positions, _ = queries.shape
    keys = keys.float().mT
    some = max(1, HELD_SCORES // (rows * heads * keys.shape[-1]))
    for start in range(0, positions, some):
        part = slice(start, min(start + some, positions))
        # One expression: a name would keep the last part's scores while the next are computed.
        yield part, ((queries[:, :, part].float() * scale) @ keys).softmax(-1)


def attention_rows(
    queries: Float[Tensor, "R A N d"], keys: Float[Tensor, "R A S d"], scale: float
) -> Iterator[tuple[slice, Float[Tensor, "R m S"]]]:
    """Yield some of the N rows at a time: which, and their attention to S keys, 0..1, mean over heads of softmax in float32."""
    for part, attention in attention_by_head(queries, keys, scale):
        mean = attention.mean(1)
        del attention
        yield part, mean


class MeanAttention:
    """Attention [R N S], mean over heads and over the layers that are added: one matrix for each of R rows, and no more."""

    def __init__(self) -> None:
        self._total = torch.zeros(())
        self._layers = 0

    def add(self, queries: Float[Tensor, "R A N d"], keys: Float[Tensor, "R A S d"], scale: float) -> None:
        """Add the attention of one layer's N queries to its S keys, of any number of heads A."""
        if not self._layers:
            self._total = queries.new_zeros((len(queries), queries.shape[2], keys.shape[2]), dtype=torch.float32)
        for row in range(len(queries)):
            for part, mean in attention_rows(queries[row : row + 1], keys[row : row + 1], scale):
                self._total[row, part] += mean[0]
        self._layers += 1

    def read(self) -> Float[Tensor, "R N S"]:
        """Return the mean, each row of which sums to 1. Nothing may be added afterwards: the sum itself is divided."""
        self._total /= self._layers
        self._layers = 1
        return self._total


def mean_attention_bytes(rows: int, heads: int, queries: int, keys: int, width: int) -> int:
    """Bytes that `MeanAttention` holds at the peak beside the queries and keys that it is given.

    These are R matrices, and of one row at a time some scores of all heads and the keys in float32. width: features d of a head.
    """
    some = min(queries, max(1, HELD_SCORES // (heads * keys)))
    return 4 * (rows * queries * keys + heads * (2 * some * keys + some * width + keys * width) + some * keys)
