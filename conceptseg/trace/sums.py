"""State of a trace while the pipeline runs: a sum of maps per (layer, head), or one running map over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.unets.attention_maps import grid_factor, upsample
from conceptseg.errors import ViewError

SpaceReduce = Literal["pairs", "grids"]


class RunningSums:
    """Raw maps of every (layer, head), summed over the U-Net's calls: float32 [I A K h w] a layer, I images, K tokens."""

    def __init__(self) -> None:
        self.layers: dict[int, Float[Tensor, "I A K h w"]] = {}

    def add(self, layer: int, maps: Float[Tensor, "I A K h w"], heads: slice, count: int) -> None:
        """Add the maps of some of a layer's `count` heads: I images, A heads, K tokens, a grid of h x w cells."""
        if layer not in self.layers:
            images, _, tokens, height, width = maps.shape
            self.layers[layer] = maps.new_zeros((images, count, tokens, height, width))
        self.layers[layer][:, heads] += maps

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(maps.nbytes for maps in self.layers.values())

    def mean(
        self,
        size: tuple[int, int],
        image: int,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        factors: Sequence[int] | None = None,
        upsampling: str = "bicubic_clamped",
        space_reduce: SpaceReduce = "pairs",
    ) -> Float[Tensor, "K X Y"]:
        """Average the maps of the chosen (layer, head) pairs of one image at one size, or of each grid's pairs and then of grids.

        One pair is enlarged at a time. Raises ViewError if none is chosen. Source: castorini/daam at 09564e0, daam/trace.py.
        """
        grids: dict[int, list[tuple[int, int]]] = {}
        for layer, head, positions in self._chosen(size, layers, heads, factors):
            grids.setdefault(positions if space_reduce == "grids" else 0, []).append((layer, head))
        if not grids:
            raise ViewError(
                f"no heat maps for layers {layers}, heads {heads}, factors {factors}: this trace holds layers "
                f"{sorted(self.layers) or 'none (has the pipeline run?)'}."
            )
        total: Tensor | None = None
        for pairs in grids.values():
            part: Tensor | None = None
            for layer, head in pairs:
                one = upsample(self.layers[layer][image, head], size, upsampling)
                part = one if part is None else part.add_(one)
            assert part is not None
            share = part / (len(pairs) * len(grids))
            total = share if total is None else total.add_(share)
        assert total is not None
        return total

    def _chosen(
        self, size: tuple[int, int], layers: Sequence[int] | None, heads: Sequence[int] | None, factors: Sequence[int] | None
    ) -> Iterator[tuple[int, int, int]]:
        """(layer, head, grid positions) of every pair that passes the filters."""
        for layer, maps in self.layers.items():
            positions = maps.shape[-2] * maps.shape[-1]
            if (layers is not None and layer not in layers) or (
                factors is not None and grid_factor(size, positions) not in factors
            ):
                continue
            for head in range(maps.shape[1]):
                if heads is None or head in heads:
                    yield layer, head, positions


class RunningMap:
    """One map of all pairs, cut at 0 in every step and summed over steps, [I K X Y]; on request also every step's."""

    def __init__(self, holds_sum: bool, holds_steps: bool) -> None:
        self.holds_sum, self.holds_steps = holds_sum, holds_steps
        self.total: Float[Tensor, "I K X Y"] | None = None
        self.steps: list[Float[Tensor, "I K X Y"]] = []
        self._now: Tensor | None = None
        self._pairs = 0

    def add(self, maps: Float[Tensor, "I a K h w"], size: tuple[int, int], upsampling: str) -> None:
        """Add the maps of some (layer, head) pairs in the current step: I images, a heads, K tokens."""
        if not (self.holds_sum or self.holds_steps):
            return
        one = upsample(maps, size, upsampling).sum(1)
        self._now = one if self._now is None else self._now.add_(one)
        self._pairs += maps.shape[1]

    def end_step(self) -> None:
        """The U-Net has run: what was added since belongs to one step."""
        if self._now is None:
            return
        mean = self._now / self._pairs
        if self.holds_steps:
            self.steps.append(mean)
        if self.holds_sum:
            self.total = mean.clone() if self.total is None else self.total.add_(mean)
        self._now, self._pairs = None, 0

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(maps.nbytes for maps in self.steps) + (0 if self.total is None else self.total.nbytes)
