"""A latent diffusion transformer as a checkpoint holds it: parts read on first use, images as latents, levels of its schedule."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.latent_checkpoint import LatentCheckpoint
from conceptseg.backbones.latents import spread_out
from conceptseg.backbones.transformers.quantized_weights import WEIGHTS, to_eight_bits
from conceptseg.errors import one_of


class LatentModel(LatentCheckpoint, ABC):
    """Parts of a latent diffusion transformer that do not depend on text.

    image_size: multiples of `pixels_per_token`. weights: "full", in dtype, or "int8": the blocks' matrices rounded to eight
    bits (torchao), a variant with rows of its own.
    """

    transformer_class: ClassVar[str]
    """The stock diffusers class."""
    classifier_free: ClassVar[bool] = False
    """Whether the family is guided by a second pass without a caption, rather than by an input for the strength."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int | Sequence[int] = 1024,
        resize: str = "nearest",
        vae_dtype: str = "float32",
        weights: str = "full",
        randomise: Mapping[str, Any] | None = None,
        compute_dtype: str | None = None,
    ) -> None:
        super().__init__(path, revision, dtype, device, image_size, resize, vae_dtype, randomise, compute_dtype)
        one_of("extractor.backbone.weights", weights, WEIGHTS)
        self.weights = weights

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's config.json; read without loading weights."""
        return self.config_of("transformer")

    # ------------------------------------------------------------ parts, loaded on first use

    @cached_property
    def transformer(self) -> nn.Module:
        import diffusers

        model = self.part("transformer", getattr(diffusers, self.transformer_class), torch_dtype=self.stored_dtype)
        return self.placed(model if self.weights == "full" else to_eight_bits(model, dtype=self.dtype))

    schedulers: ClassVar[tuple[str, ...]] = ("FlowMatchEulerDiscreteScheduler",)
    """Stock classes that make images."""

    @cached_property
    def scheduler(self) -> Any:
        """The checkpoint's own schedule of noise levels, for making images."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return self.part("scheduler", FlowMatchEulerDiscreteScheduler)

    # ------------------------------------------------------------ images

    def latents(
        self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B *c h w"]:
        """Encode images in 0..1 as scaled latents: the posterior's mean, or one sample per image with its generator.

        h and w are latent pixels, two per token. Raises ConfigError for a size that tokens do not tile.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        with torch.inference_mode():
            z = spread_out(self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist, generators)
        return (z - (self.vae.config["shift_factor"] or 0.0)) * self.vae.config["scaling_factor"]

    def images(self, latents: Float[Tensor, "B *c h w"]) -> Float[Tensor, "B *f 3 H W"]:
        """Decode scaled latents to images in 0..1; h and w are latent pixels, *f the frames of a video."""
        with torch.inference_mode():
            z = latents.to(self.vae_dtype) / self.vae.config["scaling_factor"] + (self.vae.config["shift_factor"] or 0.0)
            return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @property
    def pixels_per_token(self) -> int:
        """Side of an image token: the autoencoder's factor times the 2 x 2 patches of the transformer."""
        return 2 * self.pixels_per_latent

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of one image of this many pixels."""
        self.check_size(height, width)
        return (self.latent_channels, height // self.pixels_per_latent, width // self.pixels_per_latent)

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"])

    def grid(self, latents: Float[Tensor, "R *c H W"]) -> tuple[int, ...]:
        """Return the shape of the maps of these latents, in image tokens: (h, w), or (f, h, w) for video."""
        return latents.shape[-2] // 2, latents.shape[-1] // 2

    # ------------------------------------------------------------ making images

    def levels(self, steps: int, tokens: int) -> list[float]:
        """Noise levels of the checkpoint's own schedule, from its first to 0, steps + 1 of them."""
        scheduler = self.scheduler
        shift = {"mu": shift_of(tokens, scheduler.config)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **self.sigmas(steps), **shift)
        return [float(sigma) for sigma in scheduler.sigmas]

    def sigmas(self, steps: int) -> dict[str, Any]:
        """Return the family's scheduler arguments beside the number of steps: levels evenly spaced before any shift."""
        return {"sigmas": torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()}

    def guided(
        self, without: Float[Tensor, "R ..."], with_caption: Float[Tensor, "R ..."], guidance: float
    ) -> Float[Tensor, "R ..."]:
        """Combine the outputs without and with the caption by classifier-free guidance of this strength, all of one shape."""
        return without + guidance * (with_caption - without)

    def stepped(
        self,
        latents: Float[Tensor, "R *c H W"],
        answer: Float[Tensor, "R *c H W"],
        levels: Sequence[float],
        step: int,
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "R *c H W"]:
        """Take one denoising step: Euler's step along the velocity `answer` of flow matching, levels[step] -> levels[step + 1].

        generators: one per image, for solvers that draw noise in each step.
        """
        return latents + (levels[step + 1] - levels[step]) * answer

    def mix(self, noise: Float[Tensor, "*#n"], latents: Float[Tensor, "*#n"], level: float) -> Float[Tensor, "*#n"]:
        """Return noisy latents, [... c H W], at a level in 0..1, on the straight line from image to noise; shapes broadcast."""
        return level * noise + (1 - level) * latents


def shift_of(tokens: int, config: Mapping[str, Any]) -> float:
    """mu of a schedule that is shifted by the number of image tokens: linear through two points of its config.

    Source: black-forest-labs/flux, src/flux/sampling.py, get_schedule; the points
    of diffusers' schedulers where the config lacks them.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (tokens - few) * (high - low) / (many - few))
