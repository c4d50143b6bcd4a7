"""Plain denoising for the U-Net: it reads text through cross-attention by construction and needs no other loss.

It predicts the velocity (Salimans and Ho 2022, arXiv:2202.00512, appendix D) as Stable Diffusion 2 does: the loss then counts
the noisiest states, the ones where a caption helps, as much as the others.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
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

    def predicted_velocity(
        self, noisy: Float[Tensor, "B c H W"], levels: Int[Tensor, " B"], captions: list[str]
    ) -> Float[Tensor, "B c H W"]:
        """The U-Net's velocity at training steps `levels` (0..999), told the captions."""
        tokens = self.parts["tokenizer"](
            captions, padding="max_length", truncation=True, max_length=self.recipe["sizes"]["text_tokens"], return_tensors="pt"
        )
        text = self.parts["text_encoder"](input_ids=tokens.input_ids.to(self.device))[0]
        noisy, unet = noisy.contiguous(memory_format=torch.channels_last), self.parts["unet"]
        middle = unet.mid_block
        if not self.settings()["middle"]:
            unet.mid_block = None
        try:
            found: Tensor = unet(noisy, levels, encoder_hidden_states=text, return_dict=False)[0]
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
        noisy = self.parts["scheduler"].add_noise(latents, pure, levels)
        velocity = self.parts["scheduler"].get_velocity(latents, pure, levels)
        loss = mse_loss(self.predicted_velocity(noisy, levels, captions), velocity)
        return {"velocity": loss, "total": loss}
