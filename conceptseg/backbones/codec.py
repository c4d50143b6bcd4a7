"""An exact image codec with the interface of diffusers' AutoencoderKL, so that a lab model needs no trained autoencoder."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PatchCodec(ModelMixin, ConfigMixin):
    """Folds patches of pixels into channels and back: images [B 3 H W] in -1..1 <-> latents [B 3·p² H/p W/p].

    The posterior has (numerically) no spread, so `sample()` and `mode()` agree to 1e-6.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, patch: int = 2, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1), requires_grad=False)  # gives the model a dtype and a device

    def encode(self, x: Float[Tensor, "B 3 H W"], return_dict: bool = True) -> AutoencoderKLOutput:
        """Return the posterior of images in -1..1; its mean has shape [B 3·p² H/p W/p] for patches of p pixels."""
        mean = pixel_unshuffle(x, self.config["patch"])
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)))

    def decode(self, z: Float[Tensor, "B c h w"], return_dict: bool = True) -> DecoderOutput:
        """Return images [B 3 h·p w·p] in -1..1 from latents with c = 3·p² channels."""
        return DecoderOutput(sample=pixel_shuffle(z, self.config["patch"]))
