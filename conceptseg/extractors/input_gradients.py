"""Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) and SmoothGrad (Smilkov et al. 2017, arXiv:1706.03825).

Both read the gradient of the explained score at the image itself. Not checked against the originals.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.base import sample_noise
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.errors import in_range, one_of, real_number, whole_number
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.types import Batch

SIGNS = {"absolute": "sum over colours of absolute values", "signed": "sum over colours; negative where a pixel speaks against"}


class InputGradients(ClassMethod):
    """One number a pixel: implement `attributions`.

    sign: "absolute" sums absolute values over colours, "signed" the values themselves.
    """

    reads_class_token = False

    def __init__(self, backbone: ImageEncoder, explained_class: str, sign: str) -> None:
        super().__init__(backbone, explained_class)
        one_of("extractor.sign", sign, SIGNS)
        self.sign = sign

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        images = self.backbone.images(batch.tasks)
        with torch.no_grad():
            output = self.backbone.run(images)
        return self.by_class(batch, output, partial(self._explain, images, batch.keys))

    def _explain(self, images: Tensor, keys: tuple[str, ...], explained: Explained) -> Float[Tensor, "B h w"]:
        found = self.attributions(images, keys, explained)
        return found.abs().sum(1) if self.sign == "absolute" else found.sum(1)

    @abstractmethod
    def attributions(
        self, images: Float[Tensor, "B 3 H W"], keys: tuple[str, ...], explained: Explained
    ) -> Float[Tensor, "B 3 H W"]:
        """Return one number per pixel and colour. images: normalised; keys: the samples' keys, which seed what is drawn."""

    def gradient(self, images: Float[Tensor, "B 3 H W"], explained: Explained) -> Float[Tensor, "B 3 H W"]:
        """Return the gradient of the explained score at images; one forward and one backward pass."""
        with torch.enable_grad():
            root = needs_gradient(images)
            score = self.backbone.score(self.backbone.run(root), explained).sum()
            return torch.autograd.grad(score, root)[0]


class IntegratedGradients(InputGradients):
    """(image - black) times the mean gradient on the straight way from black, at the middles of equal steps.

    Attributions sum to score(image) - score(black) up to the error of the midpoint rule. steps: forward and backward passes.
    """

    version = 1

    def __init__(
        self, backbone: ImageEncoder, steps: int = 20, sign: str = "absolute", explained_class: str = "predicted"
    ) -> None:
        super().__init__(backbone, explained_class, sign)
        in_range("extractor.steps", steps, 1, 10_000)
        self.steps = steps

    def attributions(
        self, images: Float[Tensor, "B 3 H W"], keys: tuple[str, ...], explained: Explained
    ) -> Float[Tensor, "B 3 H W"]:
        black = self.backbone.black(images)
        total = torch.zeros_like(images)
        for step in range(self.steps):
            total += self.gradient(black + (step + 0.5) / self.steps * (images - black), explained)
        return (images - black) * total / self.steps


class SmoothGrad(InputGradients):
    """The mean gradient at noisy copies of the image.

    samples: noisy copies, one forward and one backward pass each. noise: standard deviation as a share of the range of the
    normalised image; drawn from (seed, sample key).
    """

    version = 1

    def __init__(
        self,
        backbone: ImageEncoder,
        samples: int = 20,
        noise: float = 0.15,
        seed: int = 0,
        sign: str = "absolute",
        explained_class: str = "predicted",
    ) -> None:
        super().__init__(backbone, explained_class, sign)
        in_range("extractor.samples", samples, 1, 10_000)
        real_number("extractor.noise", noise, 0)
        whole_number("extractor.seed", seed, -(2**63))
        self.samples, self.noise, self.seed = samples, noise, seed

    def attributions(
        self, images: Float[Tensor, "B 3 H W"], keys: tuple[str, ...], explained: Explained
    ) -> Float[Tensor, "B 3 H W"]:
        spread = self.noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
        total = torch.zeros_like(images)
        for draw in range(self.samples):
            noise = sample_noise(images.shape[1:], self.seed, keys, draw).to(images)
            total += self.gradient(images + spread * noise, explained)
        return total / self.samples
