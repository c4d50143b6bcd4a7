"""DiffCut on diffusion U-Nets (Couairon et al. 2024, arXiv:2406.02842): segments of self-attention's output, named by DAAM.

The output of the last self-attention on the way down is cut into segments, recursively, by normalised cuts of its cosines; each
position joins the segment whose mean output is most like its own. A word's score is the mean of its DAAM map in each segment. One
forward pass. Segments are found without any word.
Source: PaulCouairon/DiffCut at 4f99ed5, diffcut/recursive_normalized_cut.py and tools/ldm.py. Not checked against the original,
which reads SSD-1B with an empty prompt where the words stand in this one's, refines segments by PAMR, and takes their names from
a CLIP ConvNeXt. The two positions whose cosine is least, of which it loses sight after the first cut, stay in the graph here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import CrossAttention, OutputTap, UNetTap
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.errors import ConfigError, ViewError, real_number
from conceptseg.extractors.along_self_attention import RefinedMaps, mean_in_segments
from conceptseg.extractors.normalized_cut import recursive_cut
from conceptseg.extractors.unet_maps import SELF, LayerSum, LayerSums
from conceptseg.saliency.views import View


def affinity(unit: Float[Tensor, "d n"], alpha: float) -> Float[Tensor, "n n"]:
    """Return the cosines of n vectors of length 1, brought to 0..1, to the power alpha; all 1 where every pair is alike."""
    cosines = unit.mT @ unit
    low, high = cosines.amin(), cosines.amax()
    scaled = (cosines - low) / (high - low) if bool(high > low) else torch.ones_like(cosines)
    return scaled**alpha


class DiffCut(RefinedMaps):
    """Each word's map is the same number all over a segment: the mean of its DAAM map there.

    tau: a segment is cut while its cheapest normalised cut costs less; 0.5 in the released code. alpha: power of the cosines, 10.
    layer: the layer whose self-attention is cut; null: the last one down, as in the released code.
    reading: settings of RefinedMaps.
    """

    version = 1

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        tau: float = 0.5,
        alpha: float = 10.0,
        layer: int | None = None,
        **reading: Any,
    ) -> None:
        super().__init__(backbone, **reading)
        real_number("extractor.tau", tau, 0)
        real_number("extractor.alpha", alpha, 0)
        self.tau, self.alpha, self.layer = tau, alpha, layer

    @property
    def cut_layer(self) -> CrossAttention:
        """The layer whose self-attention's output is cut."""
        layers = self.backbone.layers
        down = [one for one in layers if one.path.startswith("down")]
        found = down[-1:] if self.layer is None else [one for one in layers if one.index == self.layer]
        if not found:
            raise ConfigError(
                f"extractor.layer is {'null' if self.layer is None else self.layer}, but this U-Net has layers 0 to "
                f"{len(layers) - 1}, {len(down)} of them on its way down. Set extractor.layer to one of its layers."
            )
        return found[0]

    def further_taps(
        self, layers: Sequence[CrossAttention], views: Sequence[View], level: float, size: tuple[int, int], sums: LayerSums
    ) -> list[UNetTap]:
        asked, cut = {view.layers for view in views if view.space == "refined"}, self.cut_layer
        if not asked:
            return []
        if cut.runs > max(one.runs for one in layers):
            last = max(self.layers, key=lambda one: one.runs)
            raise ViewError(
                f"extractor.layer is {cut.index} ({cut.path}), which runs after every layer that the views read: the pass ends "
                f"before it. Read a later layer too, such as {last.index}, or set extractor.layer to an earlier one."
            )

        def on_output(features: Float[Tensor, "R d h w"]) -> None:
            for indices in asked:
                sums[indices, SELF, level] = LayerSum(features, 1, (features.shape[-2], features.shape[-1]))

        return [OutputTap(cut.self_attention, on_output)]

    def along(self, maps: Float[Tensor, "R S X Y"], read: LayerSum) -> Float[Tensor, "R S X Y"]:
        found = []
        for words, features in zip(maps.flatten(2), read.maps.double(), strict=True):
            unit = normalize(features, dim=0)
            members = one_hot(recursive_cut(affinity(unit.flatten(1), self.alpha), self.tau)).to(unit)
            means = unit.flatten(1) @ members / members.sum(0)
            wide = interpolate(unit[None], size=maps.shape[-2:], mode="bilinear")[0].flatten(1)
            found.append(mean_in_segments(words, (means.mT @ wide).argmax(0)))
        return torch.stack(found).view_as(maps)
