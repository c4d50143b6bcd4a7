"""The store of cells that taps fill and views read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.saliency.normalize import gaussian_blur, softmax_over_concepts, softmax_over_tokens
from conceptseg.saliency.views import CellKind, Fold, Softmax, View


class CellStore:
    """Score maps by (kind, layer, timestep, draw), float32 [B C L] each: all that survives of a forward pass."""

    def __init__(self) -> None:
        self._cells: dict[tuple[CellKind, int, float, int], Float[Tensor, "B C L"]] = {}

    def put(self, kind: CellKind, layer: int, timestep: float, draw: int, scores: Float[Tensor, "B C L"]) -> None:
        self._cells[kind, layer, timestep, draw] = scores

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, view: View, grid: tuple[int, ...]) -> Float[Tensor, "B C *grid"]:
        """Fold the view's cells: per-cell steps were done in the hook; then mean or sum, softmax of the mean, blur.

        grid: (h, w), or (f, h, w) for video, whose frames are blurred each for itself.
        """
        cells = torch.stack(
            [
                self._cells[view.cell, layer, timestep, draw]
                for layer in view.layers
                for timestep in view.timesteps
                for draw in range(view.draws)
            ]
        )
        folded = cells.sum(0) if view.fold is Fold.SUM else cells.mean(0)
        if view.softmax is Softmax.OF_MEAN:
            folded = softmax_over_concepts(folded, view.temperature)
        maps = folded.unflatten(-1, grid)
        return gaussian_blur(maps.flatten(1, -3), view.blur).view_as(maps) if view.blur else maps


def cell_scores(
    concept_vectors: Float[Tensor, "R *A C d"], image_vectors: Float[Tensor, "R *A L d"], kind: CellKind
) -> Float[Tensor, "R C L"]:
    """Dot products of concept and image vectors, in float32, with the kind's softmax, heads folded.

    Vectors arrive normalised (see `CellKind.normalize`); scores are unscaled. With a head axis A, the softmax is taken in
    every head before heads are folded, because the two do not commute.
    Source: Helbling et al. 2025, arXiv:2502.04320, and its released evaluation code.
    """
    # matmul, not einsum: it copies image vectors of several heads once rather than twice.
    scores = torch.matmul(concept_vectors.float(), image_vectors.float().transpose(-1, -2))
    if kind.softmax is Softmax.PER_CELL:
        scores = softmax_over_concepts(scores, kind.temperature)
    elif kind.softmax is Softmax.TOKENS:
        scores = softmax_over_tokens(scores, kind.temperature)
    if scores.ndim == 4:
        scores = scores.sum(1) if kind.heads is Fold.SUM else scores.mean(1)
    return scores


def kinds_by_layer(views: Sequence[View]) -> dict[int, frozenset[CellKind]]:
    """Which kinds of cells each layer must yield for these views."""
    wanted: dict[int, set[CellKind]] = defaultdict(set)
    for view in views:
        for layer in view.layers:
            wanted[layer].add(view.cell)
    return {layer: frozenset(kinds) for layer, kinds in sorted(wanted.items())}
