"""Activations of a tower's blocks in one forward pass of the host, kept for methods that propagate back through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.tower import Tower, tap_input, tap_output
from conceptseg.backbones.taps import TapSet


@dataclass(frozen=True, slots=True, eq=False)
class BlockActivations:
    """One block: outputs of its norms, linear maps and activation, as the host computed them."""

    normed: Float[Tensor, "B T d"]
    mapped: Float[Tensor, "B T n"]
    """Queries, keys and values side by side."""
    attended: Float[Tensor, "B Q d"]
    second_normed: Float[Tensor, "B Q d"]
    raised: Float[Tensor, "B Q m"]
    activated: Float[Tensor, "B Q m"]
    lowered: Float[Tensor, "B Q d"]

    def of_class_token(self) -> BlockActivations:
        """Without the other tokens' rows behind the attention, which nothing reads in a last block."""
        behind = (self.attended, self.second_normed, self.raised, self.activated, self.lowered)
        return BlockActivations(self.normed, self.mapped, *(x[:, :1] for x in behind))


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Blocks `first` to the last, and the residual stream before the first of them."""

    first: int
    entering: Float[Tensor, "B T d"]
    blocks: tuple[BlockActivations, ...]


def tap_activations(taps: TapSet, tower: Tower, first: int) -> Callable[[], Activations]:
    """Keep what blocks `first` to the last compute. What it returns is called after the forward pass, and gives it."""
    entering: list[Tensor] = []
    held: list[dict[str, Tensor]] = []
    tap_input(taps, tower, first, entering.append)
    for block in tower.blocks[first:]:
        held.append({})
        names = ("normed", "attended", "second_normed", "raised", "activated", "lowered", "mapped")
        for name, path in zip(names, (block.norm1, block.attention, *block.mlp, block.qkv_module), strict=True):
            if path is not None:
                tap_output(taps, path, partial(held[-1].__setitem__, name))

    def gathered() -> Activations:
        for layer, kept in enumerate(held, start=first):
            if "mapped" not in kept:  # the attention maps them unseen
                kept["mapped"] = tower.mapped(layer, kept["normed"].detach())
        return Activations(first, entering[0], tuple(BlockActivations(**kept) for kept in held))

    return gathered
