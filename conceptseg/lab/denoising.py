"""Plain denoising for the U-Nets: they read text through cross-attention by construction and needs no other loss.

It predicts the velocity (Salimans and Ho 2022, arXiv:2202.00512, appendix D) as Stable Diffusion 2 does: the loss then counts
the noisiest states, the ones where a caption helps, as much as the others.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.captions import describe, list_names
from conceptseg.lab.train import Trainer


class UNetTrainer(Trainer):
    """Stable Diffusion in miniature: predicts the velocity from the caption and the noised scene."""

    caveat: ClassVar[str] = (
        "Trained by plain denoising on drawn scenes with short captions: lab numbers rank code paths and settings, never the "
        "papers' claims."
    )

    def __init__(self, recipe: dict[str, Any], device: str = "cpu") -> None:
        super().__init__(recipe, device)
        self.codec = self.parts["vae"].to(device)
        self.schedule = DDPMScheduler.from_config(self.parts["scheduler"].config)  # how noise is added, whoever samples
        self.parts["unet"].to(memory_format=torch.channels_last)

    def build(self) -> dict[str, Any]:
        return models.build_sd(self.recipe["sizes"])

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.parts["unet"], "text": self.parts["text_encoder"]}

    def finish(self) -> None:
        """Without its middle block, if the last phase did without it."""
        if not self.settings()["middle"]:
            self.parts["unet"].mid_block = None
            self.parts["unet"].register_to_config(mid_block_type=None)

    def batch_size(self) -> int:
        return int(self.recipe["batch"])

    def embedded(self, captions: list[str]) -> tuple[Float[Tensor, "B T d"], dict[str, Tensor] | None]:
        """Return the conditioning of the U-Net: text states, and further inputs if it has any."""
        states: Tensor = self.parts["text_encoder"](input_ids=self.token_ids(captions))[0]
        return states, None

    def predicted_velocity(
        self, noisy: Float[Tensor, "B c H W"], levels: Int[Tensor, " B"], captions: list[str]
    ) -> Float[Tensor, "B c H W"]:
        """Return the U-Net's velocity at training steps `levels` (0..999), conditioned on the captions."""
        text, added = self.embedded(captions)
        noisy, unet = noisy.contiguous(memory_format=torch.channels_last), self.parts["unet"]
        middle = unet.mid_block
        if not self.settings()["middle"]:
            unet.mid_block = None
        try:
            found: Tensor = unet(
                noisy, levels, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
            )[0]  # fmt: skip
        finally:
            unet.mid_block = middle
        return found

    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        listed = self.settings()["list_share"]
        captions = [
            (list_names(scene, rng) if listed and rng.random() < listed else describe(scene, rng)).text for scene in scenes
        ]  # fmt: skip
        latents = self.codec.encode(self.images(scenes)).latent_dist.mode() * self.recipe["sizes"]["latent_scale"]
        pure = torch.randn(latents.shape, generator=noise).to(self.device)
        levels = torch.randint(0, 1000, (len(scenes),), generator=noise).to(self.device)
        noisy = self.schedule.add_noise(latents, pure, levels)
        velocity = self.schedule.get_velocity(latents, pure, levels)
        loss = mse_loss(self.predicted_velocity(noisy, levels, captions), velocity)
        return {"velocity": loss, "total": loss}


class SDXLTrainer(UNetTrainer):
    """Stable Diffusion XL in miniature: two text encoders, a pooled vector and size conditioning.

    An empty caption is zeros, as SDXL's pipeline has it. Sizes are drawn at random: every scene is shown in one size, and a model
    that had only seen that one could say nothing of another.
    """

    sizes_said: ClassVar[tuple[int, int]] = (24, 65)
    """The least size, in pixels, and the one after the greatest."""

    def build(self) -> dict[str, Any]:
        return models.build_sdxl(self.recipe["sizes"])

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.parts["unet"], "text": self.parts["text_encoder"], "text_2": self.parts["text_encoder_2"]}

    def embedded(self, captions: list[str]) -> tuple[Float[Tensor, "B T d"], dict[str, Tensor] | None]:
        """Source: SDXL (Podell et al. 2023, arXiv:2307.01952, §2.1 both encoders' states, §2.2 size conditioning)."""
        ids = self.token_ids(captions)
        first = self.parts["text_encoder"](input_ids=ids, output_hidden_states=True).hidden_states[-2]
        second = self.parts["text_encoder_2"](input_ids=ids, output_hidden_states=True)
        said = torch.tensor([bool(caption) for caption in captions], device=self.device)
        states = torch.cat([first, second.hidden_states[-2]], dim=-1) * said[:, None, None]
        if self.parts["unet"].training:
            side = torch.randint(*self.sizes_said, (len(captions), 1)).to(self.device)
        else:
            side = torch.full((len(captions), 1), self.recipe["image_size"], device=self.device)
        sizes = torch.cat([side, side, 0 * side, 0 * side, side, side], dim=1)
        return states, {"text_embeds": second.text_embeds * said[:, None], "time_ids": sizes}
