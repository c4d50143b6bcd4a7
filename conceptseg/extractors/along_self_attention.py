"""Bases of methods that refine DAAM's maps by the self-attention of the same U-Net pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from conceptseg.backbones.attention_rows import mean_attention_bytes
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttention, CrossAttentionTap, UNetTap
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.extractors.daam import DAAM
from conceptseg.extractors.unet_maps import SELF, Kind, LayerSum, LayerSums
from conceptseg.saliency.views import View

OF_SD = (8, 40)
"""Heads, and features of a head, of Stable Diffusion 1 at its finest grid."""


@runtime_checkable
class SelfAttentionSum(Protocol):
    """Adds up the self-attention of a set of layers."""

    def add(self, attended: Attended) -> None:
        """Add one layer."""

    def read(self) -> LayerSum:
        """Return the attention of n positions to the cells of a grid, [R n X Y], once every layer was added."""


class RefinedMaps(DAAM):
    """Space "refined" is the method; "words" is DAAM's map from the same pass. Implement `along`.

    prompt, concept, join, encode, exclude_factor, include_mid, map_side, noise, posterior, seed: see DAAM.
    """

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        prompt: str = "{concepts}",
        concept: str = "a {concept}",
        join: str = ", ",
        encode: str = "joint",
        exclude_factor: int | None = 8,
        include_mid: bool = False,
        map_side: int | None = None,
        noise: str = "per_sample",
        posterior: str = "mode",
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, prompt=prompt, concept=concept, join=join, encode=encode, exclude_factor=exclude_factor,
            include_mid=include_mid, map_side=map_side, noise=noise, posterior=posterior, seed=seed,
        )  # fmt: skip

    @abstractmethod
    def along(self, maps: Float[Tensor, "R S X Y"], read: LayerSum) -> Float[Tensor, "R S x y"]:
        """Refine maps of S words by what was read of the image's self-attention."""

    def spaces(self, most_heads: int) -> tuple[str, ...]:
        return ("refined", "words")

    def kind(self, space: str) -> Kind:
        return Kind()

    def refine(self, maps: Float[Tensor, "R S X Y"], view: View, level: float, sums: LayerSums) -> Float[Tensor, "R S x y"]:
        return self.along(maps, sums[view.layers, SELF, level]) if view.space == "refined" else maps


class AlongSelfAttention(RefinedMaps):
    """Refines by the attention between the image's positions, [R n X Y]. Implement `summing` and `along`."""

    @abstractmethod
    def summing(self, layers: Sequence[CrossAttention], size: tuple[int, int]) -> SelfAttentionSum:
        """An empty sum for a set of layers; size: of the maps."""

    def held_bytes(self, images: int, views: Sequence[Mapping[str, Any]]) -> int:
        backbone = self.backbone
        cells = (backbone.size[0] // 8) * (backbone.size[1] // 8)
        rows = images * max((int(view.get("draws") or 1) for view in views), default=1)
        return mean_attention_bytes(rows, OF_SD[0], cells, cells, OF_SD[1])

    def further_taps(
        self, layers: Sequence[CrossAttention], views: Sequence[View], level: float, size: tuple[int, int], sums: LayerSums
    ) -> list[UNetTap]:
        waiting: dict[tuple[int, ...], tuple[SelfAttentionSum, CrossAttention]] = {}
        for view in views:
            asked = [layer for layer in layers if layer.index in view.layers]
            if view.space == "refined" and view.layers not in waiting:
                waiting[view.layers] = self.summing(asked, size), max(asked, key=lambda one: one.runs)

        def on_layer(attended: Attended) -> None:
            for indices in [one for one in waiting if attended.layer.index in one]:
                total, last = waiting[indices]
                total.add(attended)
                if attended.layer.index == last.index:
                    sums[indices, SELF, level] = waiting.pop(indices)[0].read()

        needed = [one.self_attention for one in layers if any(one.index in indices for indices in waiting)]
        return [CrossAttentionTap(needed, on_layer)] if needed else []


def mean_in_segments(maps: Float[Tensor, "S n"], segment: Int[Tensor, " n"]) -> Float[Tensor, "S n"]:
    """Return maps of S words that are the same number all over each segment: the word's mean there."""
    members = one_hot(segment).to(maps)
    return ((maps @ members) / members.sum(0).clamp_min(1))[:, segment]
