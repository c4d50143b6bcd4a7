"""Unsupervised objects in the patches of a DINO: LOST (Siméoni et al. 2021, arXiv:2109.14279) and TokenCut (arXiv:2202.11539).

Both read the keys of the last block and know no word. Sources: valeoai/LOST at 72f762f, object_discovery.py (lost), and
YangtaoWANG95/TokenCut at 0d86de5, object_discovery.py (ncut). Not checked against the originals, which end in a box round one
object: here the map ends before the connected component is chosen.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_normed
from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import in_range, real_number
from conceptseg.extractors.image_model import ImageModelMethod, on_every_channel
from conceptseg.extractors.normalized_cut import second_eigenvector
from conceptseg.types import Batch


class ObjectDiscovery(ImageModelMethod):
    """One object per image, from the patches' keys: implement `objectness`. One forward pass."""

    told = "nothing"
    comparable = False

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        found: list[Tensor] = []
        with torch.no_grad(), TapSet(self.backbone.model) as taps:
            tap_normed(taps, tower, last, partial(self._read, tower, last, found))
            self.backbone.run(self.backbone.images(batch.tasks), taps)
            maps = torch.stack([self.objectness(keys) for keys in found[0]])
        return on_every_channel(batch, tower.maps(maps))

    def _read(self, tower: Tower, layer: int, found: list[Tensor], normed: Tensor) -> None:
        _, keys, _ = tower.query_key_value(layer, normed)
        found.append(rearrange(keys[:, :, tower.prefix :], "B A L k -> B L (A k)").double())
        raise StopForward

    @abstractmethod
    def objectness(self, keys: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        """Return one number per patch, larger on the object. keys: of one image, heads concatenated, in float64."""


class LOST(ObjectDiscovery):
    """The patch that few others resemble is the seed; patches add up their similarity to it and to its like.

    patches: how many of the least-connected patches may join the seed; those that resemble it (dot product above 0) do. 100 in
    the released code, of some thousand patches. Where all patches resemble one another, as a DINOv2's may, the seed is the
    first patch, as in the released code: the map then shows what resembles the top left corner.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, patches: int = 100) -> None:
        super().__init__(backbone)
        in_range("extractor.patches", patches, 1, 1_000_000)
        self.patches = patches

    def objectness(self, keys: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        similarity = keys @ keys.T
        degree = (similarity - torch.diag(similarity.diagonal()) > 0).sum(1)
        order = torch.argsort(degree, stable=True)
        candidates = order[: self.patches]
        joined = candidates[similarity[order[0], candidates] > 0]
        return similarity[joined].sum(0)


class TokenCut(ObjectDiscovery):
    """The second eigenvector of the normalised cut of the graph of patches, with the object on its positive side.

    Patches are joined by 1 where the cosine of their keys exceeds threshold and by `faint` elsewhere. The side that holds the
    entry of greatest magnitude is the object. Where every pair is joined alike there is no cut: the map is 0.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, threshold: float = 0.2, faint: float = 1e-5) -> None:
        super().__init__(backbone)
        real_number("extractor.threshold", threshold)
        real_number("extractor.faint", faint, 0)
        self.threshold, self.faint = threshold, faint

    def objectness(self, keys: Float[Tensor, "L d"]) -> Float[Tensor, " L"]:
        unit = normalize(keys, dim=-1)
        edges = torch.where(unit @ unit.T > self.threshold, 1.0, self.faint).to(keys)
        if bool((edges == edges[0, 0]).all()):
            return torch.zeros_like(edges[0])
        cut = second_eigenvector(edges)
        return cut if bool(cut[cut.abs().argmax()] > cut.mean()) else -cut
