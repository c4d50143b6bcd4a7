"""LPOSS (Stojnić et al. 2025, arXiv:2503.19777): MaskCLIP's scores, propagated over a graph of patches that a DINO draws.

Source: vladan-stojnic/LPOSS at 2a6eced, segmentation/evaluation/lposs_eval.py (get_lposs_laplacian, perform_lp), and at
47f2a6a, configs/lposs.yaml. Not checked against the original, which takes up to 50 steps of conjugate gradients where
the linear system is solved here, and whose windows and second propagation between pixels (LPOSS+) are not implemented.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_normed
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import in_range, real_number
from conceptseg.extractors.image_model import word_vectors
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.types import Batch


def propagation(
    features: Float[Tensor, "L d"],
    places: Float[Tensor, "L 2"],
    neighbours: int,
    power: float,
    sigma: float,
) -> Float[Tensor, "L L"]:
    """Return D^-1/2 (W + Wᵀ) D^-1/2 without self-loops, where W holds (cosine+)^power · exp(-sigma · distance) of neighbours.

    features: of patches; places: their centres, in pixels. W has entries for the `neighbours` patches of greatest cosine, of each
    patch. D is the sum of each row; 1 where that is 0.
    """
    unit = normalize(features, dim=-1)
    cosine = unit @ unit.T
    nearest, at = cosine.topk(min(neighbours, len(features)), dim=-1)
    near = torch.exp(-sigma * (places[:, None] - places[None]).norm(dim=-1))
    edges = torch.zeros_like(cosine).scatter(1, at, nearest.clamp(min=0) ** power * near.gather(1, at))
    edges = (edges + edges.T).fill_diagonal_(0)
    degree = edges.sum(1)
    scaled = torch.where(degree == 0, torch.ones_like(degree), degree).rsqrt()
    return scaled[:, None] * edges * scaled


class LPOSS(MaskCLIP):
    """(I - alpha · propagation)⁻¹ times the cosines of MaskCLIP's patches with the words. One forward pass of each model.

    proxy: the companion that lends the values of its last block; CLIP's patch vectors are enlarged to its grid. neighbours,
    power, sigma (per pixel) and alpha: 400, 3, 0.01 and 0.95 in the released configuration.
    """

    version = 1
    windowed = False  # its graph spans the whole image

    def __init__(
        self,
        backbone: ImageEncoder,
        proxy: ViTBackbone,
        neighbours: int = 400,
        power: float = 3.0,
        sigma: float = 0.01,
        alpha: float = 0.95,
    ) -> None:
        super().__init__(backbone)
        in_range("extractor.neighbours", neighbours, 1, 1_000_000)
        real_number("extractor.power", power, 0)
        real_number("extractor.sigma", sigma, 0)
        real_number("extractor.alpha", alpha, 0, 0.999999)
        self.proxy, self.neighbours, self.power, self.sigma, self.alpha = proxy, neighbours, power, sigma, alpha

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.proxy.tower
        (height, width), (rows, columns) = self.proxy.image_size, tower.grid
        places = torch.cartesian_prod((torch.arange(rows) + 0.5) * height / rows, (torch.arange(columns) + 0.5) * width / columns)
        with torch.no_grad():
            vectors = rearrange(self.patch_vectors(batch), "B h w k -> B k h w")
            enlarged = rearrange(interpolate(vectors, size=tower.grid, mode="bilinear"), "B k h w -> B (h w) k")
            cosines = normalize(enlarged, dim=-1) @ word_vectors(self.backbone, batch).mT
            maps = [self._propagated(*image, places) for image in zip(self._proxy_values(batch), cosines, strict=True)]
        return rearrange(torch.stack(maps), "B (h w) C -> B C h w", h=rows)

    def _propagated(self, values: Tensor, scores: Tensor, places: Tensor) -> Float[Tensor, "L C"]:
        values = values.double()
        graph = propagation(values, places.to(values), self.neighbours, self.power, self.sigma)
        return torch.linalg.solve(torch.eye(len(values)).to(values) - self.alpha * graph, scores.to(values))

    def _proxy_values(self, batch: Batch) -> Float[Tensor, "B L d"]:
        tower, last = self.proxy.tower, len(self.proxy.tower.blocks) - 1
        found: list[Tensor] = []
        with TapSet(self.proxy.model) as taps:
            tap_normed(taps, tower, last, partial(_keep_values, tower, last, found))
            self.proxy.run(self.proxy.images(batch.tasks), taps)
        return found[0]


def _keep_values(tower: Tower, layer: int, found: list[Tensor], normed: Tensor) -> None:
    _, _, values = tower.query_key_value(layer, normed)
    found.append(rearrange(values[:, :, tower.prefix :], "B A L k -> B L (A k)"))
    raise StopForward
