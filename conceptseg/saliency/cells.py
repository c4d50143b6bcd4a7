"""The store of cells that taps fill and views read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from conceptseg.saliency.normalize import (
    gaussian_blur,
    shapley_over_concepts,
    softmax_over_concepts,
    softmax_over_tokens,
    standardize_over_concepts,
)
from conceptseg.saliency.views import CellKind, Fold, Softmax, View
from conceptseg.types import BACKGROUND, Batch

Layers = int | tuple[int, ...]
"""One layer, or several that yield one cell together."""


class CellStore:
    """Score maps by (kind, layer, timestep, draw), float32 [B C L] each: all that survives of a forward pass."""

    def __init__(self) -> None:
        self._cells: dict[tuple[CellKind, Layers, float, int], Float[Tensor, "B C L"]] = {}

    def put(self, kind: CellKind, layer: Layers, timestep: float, draw: int, scores: Float[Tensor, "B C L"]) -> None:
        """Store the scores of C concepts at L image tokens. A second call with the same key replaces the first.

        layer: one, or all layers of a view, where its layers yield one cell together.
        """
        self._cells[kind, layer, timestep, draw] = scores

    def __len__(self) -> int:
        return len(self._cells)

    def read(
        self, view: View, grid: tuple[int, ...], background: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C *grid"]:
        """Fold the view's cells into maps: mean or sum, then softmax of the fold, then blur.

        Steps within a cell were done in the hook.

        grid: (h, w), or (f, h, w) for video, whose frames are blurred each for itself. background: True for background words,
        which belong to every coalition of softmax "shapley"; None for none.
        """
        together = (view.cell, view.layers, view.timesteps[0], 0) in self._cells
        layers: tuple[Layers, ...] = (view.layers,) if together else view.layers
        cells = torch.stack(
            [
                self._cells[view.cell, layer, timestep, draw]
                for layer in layers
                for timestep in view.timesteps
                for draw in range(view.draws)
            ]
        )
        folded = cells.sum(0) if view.fold is Fold.SUM else cells.mean(0)
        maps = softmax_of_fold(folded, view, background).unflatten(-1, grid)
        return gaussian_blur(maps.flatten(1, -3), view.blur).view_as(maps) if view.blur else maps


def background_words(batch: Batch) -> Bool[Tensor, "B C"]:
    """True for background words; a distractor is none, though it may vote for the background."""
    return torch.tensor(
        [
            [label == BACKGROUND and channel not in concepts.distractors for channel, label in enumerate(concepts.labels)]
            for concepts in batch.concepts
        ]
    )


def softmax_of_cell(
    scores: Float[Tensor, "R *A C L"], kind: CellKind, background: Bool[Tensor, "R C"] | None = None
) -> Float[Tensor, "R *A C L"]:
    """Apply the softmax that a kind of cell takes, if it takes one."""
    if kind.softmax is Softmax.PER_CELL:
        return softmax_over_concepts(scores, kind.temperature)
    if kind.softmax is Softmax.TOKENS:
        return softmax_over_tokens(scores, kind.temperature)
    if kind.softmax is Softmax.SHAPLEY_PER_CELL:
        flat = scores.flatten(0, -3)
        always = None if background is None else background.repeat_interleave(len(flat) // len(background), 0)
        return shapley_over_concepts(flat, always, kind.temperature).view_as(scores)
    return scores


def softmax_of_fold(
    folded: Float[Tensor, "B C L"], view: View, background: Bool[Tensor, "B C"] | None = None
) -> Float[Tensor, "B C L"]:
    """Apply the softmax that a view takes after its fold, if it takes one there."""
    if view.softmax is Softmax.OF_MEAN:
        return softmax_over_concepts(folded, view.temperature)
    return shapley_over_concepts(folded, background, view.temperature) if view.softmax is Softmax.SHAPLEY else folded


def cell_scores(
    concept_vectors: Float[Tensor, "R *A C d"],
    image_vectors: Float[Tensor, "R *A L d"],
    kind: CellKind,
    background: Bool[Tensor, "R C"] | None = None,
    standardized: bool = False,
) -> Float[Tensor, "R C L"]:
    """Return dot products of C concept and L image vectors, in float32, with the kind's softmax, heads folded.

    Vectors arrive normalised (see `CellKind.normalize`); scores are unscaled. With a head axis A, the softmax is taken in
    every head before heads are folded, because the two do not commute. background: True for background words, as in
    `CellStore.read`. standardized: scores are first standardised over concepts, in every head.
    Source: Helbling et al. 2025, arXiv:2502.04320, and its released evaluation code.
    """
    # matmul, not einsum: it copies image vectors of several heads once rather than twice.
    scores = torch.matmul(concept_vectors.float(), image_vectors.float().transpose(-1, -2))
    scores = standardize_over_concepts(scores) if standardized else scores
    scores = softmax_of_cell(scores, kind, background)
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
