"""Stable Diffusion 1, 2 and XL: a stock UNet2DConditionModel with its text encoders and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conceptseg.backbones.latent_checkpoint import LatentCheckpoint
from conceptseg.backbones.latents import spread_out
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextCache
from conceptseg.backbones.unets.attention_maps import CrossAttention, UNetTap, cross_attentions, reference_side
from conceptseg.errors import ConfigError


class UNetBackbone(LatentCheckpoint):
    """Stable Diffusion 1.x, 2.x, XL, or the lab's. Weights are read on first use; text is encoded once per distinct string.

    text_cache: a folder that keeps embedded texts, by encoder and string. licence, memory, hub: what a sheet says of the
    repository, never read here. The other settings: see `LatentCheckpoint`.
    """

    family = "unet"

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int | Sequence[int] = 512,
        resize: str = "bicubic",
        vae_dtype: str = "float32",
        text_cache: str | None = None,
        licence: str | None = None,
        memory: str | None = None,
        hub: Mapping[str, Any] | None = None,
        randomise: Mapping[str, Any] | None = None,
        compute_dtype: str | None = None,
    ) -> None:
        super().__init__(path, revision, dtype, device, image_size, resize, vae_dtype, randomise, compute_dtype)
        self.texts = TextCache(text_cache, lambda: {"class": "unet", **self.checkpoint.identity(), **self.dtypes_identity()})
        self.forward_passes = 0

    # ------------------------------------------------------------ what it is

    def identity(self) -> dict[str, Any]:
        """Return the settings of this backbone that change numbers, for the run id. The device is not one of them."""
        return {"class": "unet", **self.settings_identity()}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The U-Net's config.json."""
        return self.config_of("unet")

    @property
    def is_xl(self) -> bool:
        """SDXL: two text encoders, a pooled vector and size conditioning."""
        return bool(self.config.get("addition_embed_type") == "text_time")

    @cached_property
    def layers(self) -> tuple[CrossAttention, ...]:
        """Cross-attentions in the reference's order: up blocks, down blocks, and the mid block last."""
        return cross_attentions(self.config)

    @property
    def map_side(self) -> int:
        """Side of the reference's maps for this model: a property of its configuration, not of the image."""
        return reference_side(int(self.config["sample_size"]), self.pixels_per_latent)

    @property
    def text_length(self) -> int:
        """Text positions that the U-Net attends to, special tokens and padding included."""
        return int(self.tokenizer.model_max_length)

    # ------------------------------------------------------------ parts, loaded on first use

    @cached_property
    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        found: nn.Module = self.placed(self.part("unet", UNet2DConditionModel, torch_dtype=self.stored_dtype))
        return found

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self.part("tokenizer", AutoTokenizer)

    @cached_property
    def tokenizer_2(self) -> Any:
        from transformers import AutoTokenizer

        return self.part("tokenizer_2", AutoTokenizer)

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import CLIPTextModel

        return self.placed(self.part("text_encoder", CLIPTextModel, torch_dtype=self.stored_dtype))

    @cached_property
    def text_encoder_2(self) -> Any:
        from transformers import CLIPTextModelWithProjection

        return self.placed(self.part("text_encoder_2", CLIPTextModelWithProjection, torch_dtype=self.stored_dtype))

    @cached_property
    def signal_shares(self) -> Float[Tensor, " steps"]:
        """Return ᾱ of every training step, in 0..1: the share of an image's variance that is left."""
        from diffusers import DDIMScheduler

        # Any diffusion scheduler's config holds the betas.
        shares: Tensor = self.part("scheduler", DDIMScheduler).alphas_cumprod.float()
        return shares

    # ------------------------------------------------------------ text

    def encode_text(self, strings: Sequence[str]) -> None:
        """Put every string that is new into the cache. Raises DataError for an unknown word, or a text that is cut."""
        self.check_lengths(strings)
        new = [s for s in dict.fromkeys(strings) if s not in self.texts]
        if not new:
            return
        self.check_words(new)
        with torch.inference_mode():
            if self.is_xl:  # the layer before the last of both encoders, side by side; the second one's pooled vector
                first = self.text_encoder(self._ids(self.tokenizer, new), output_hidden_states=True)
                second = self.text_encoder_2(self._ids(self.tokenizer_2, new), output_hidden_states=True)
                hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
                pooled: Sequence[Tensor | None] = list(second.text_embeds)
            else:
                hidden = self.text_encoder(self._ids(self.tokenizer, new)).last_hidden_state
                pooled = [None] * len(new)
        for string, states, vector in zip(new, hidden, pooled, strict=True):
            self.texts[string] = {"tokens": states} if vector is None else {"tokens": states, "pooled": vector}

    def _ids(self, tokenizer: Any, strings: Sequence[str]) -> Tensor:
        padded = tokenizer(
            list(strings), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        return padded.input_ids.to(self.device)

    def text(self, strings: Sequence[str]) -> Float[Tensor, "B T d"]:
        """Return encoded strings, padded to T = `text_length` tokens."""
        self.encode_text(strings)
        return torch.stack([self.texts[s]["tokens"] for s in strings]).to(self.device)

    def unpadded_text(self, string: str) -> Float[Tensor, "n d"]:
        """Encode one string with its start and end tokens, without padding. Text encoders are causal: a slice is enough."""
        self.encode_text([string])
        tokens = self.tokenizer(string, truncation=True, max_length=self.text_length).input_ids
        return self.texts[string]["tokens"][: len(tokens)].to(self.device)

    def conditions(self, strings: Sequence[str], pixels: tuple[int, int]) -> dict[str, Tensor] | None:
        """Return SDXL's further conditioning for images of (height, width) pixels without a crop; None for other models.

        "text_embeds" [B p] is the pooled text, "time_ids" [B 6] the size, the crop's corner and the size again.
        """
        if not self.is_xl:
            return None
        self.encode_text(strings)
        ids = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=self.dtype, device=self.device)
        pooled = torch.stack([self.texts[s]["pooled"] for s in strings]).to(self.device)
        return {"text_embeds": pooled, "time_ids": ids.expand(len(strings), 6)}

    def unconditional(self, rows: int, pixels: tuple[int, int]) -> tuple[Float[Tensor, "R T d"], dict[str, Tensor] | None]:
        """Return text and conditions (see `conditions`) of the unconditional pass: the empty text, which SDXL replaces by zeros.

        "text_embeds" has shape [R p], "time_ids" [R 6].
        """
        text, conditions = self.text([""] * rows), self.conditions([""] * rows, pixels)
        if conditions is None:
            return text, None
        return torch.zeros_like(text), {**conditions, "text_embeds": torch.zeros_like(conditions["text_embeds"])}

    # ------------------------------------------------------------ images

    @property
    def pixels_per_token(self) -> int:
        """Side of a cell of the coarsest grid."""
        return self.pixels_per_latent * 2 ** (len(self.config["block_out_channels"]) - 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError for a size that the coarsest grid does not tile."""
        step = self.pixels_per_token
        if height % step or width % step:
            near = max(step, round(width / step) * step)
            raise ConfigError(
                f"extractor.backbone.image_size is {height} x {width}; this model's coarsest grid has cells "
                f"{step} pixels wide, so a multiple of {step} is wanted, for example {near}."
            )

    def latents(
        self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Encode images in 0..1 as scaled latents, float32: the posterior's mean, or one sample per image with its generator.

        Raises ConfigError for a size that the coarsest grid does not tile.
        """
        self.check_size(images.shape[-2], images.shape[-1])
        with torch.inference_mode():
            z = spread_out(self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist, generators)
        return (z * self.vae_config["scaling_factor"]).float()

    def step_of(self, level: float) -> int:
        """The training step at a noise level t in 0..1; t = 0.021 is step 21 of 1000."""
        return min(round(level * len(self.signal_shares)), len(self.signal_shares) - 1)

    def noised(
        self, latents: Float[Tensor, "*B c h w"], noise: Float[Tensor, "*B c h w"], step: int
    ) -> Float[Tensor, "*B c h w"]:
        """Return sqrt(ᾱ) · latents + sqrt(1 - ᾱ) · noise at a training step, 0..999.

        Schedulers of sigma type (SDXL's Euler) give the same after scale_model_input.
        """
        share = self.signal_shares[step].to(latents.device)
        return share.sqrt() * latents + (1 - share).sqrt() * noise.to(latents)

    # ------------------------------------------------------------ one denoiser call

    def denoise(
        self,
        noisy: Float[Tensor, "R c h w"],
        step: int | Int[Tensor, "*n"],
        text: Float[Tensor, "R T d"],
        conditions: Mapping[str, Tensor] | None = None,
        *taps: UNetTap,
    ) -> Float[Tensor, "R c h w"] | None:
        """Run one forward pass at a training step, 0..999. Returns the U-Net's output, or None if a tap stopped it early.

        conditions: "text_embeds" [R p] and "time_ids" [R 6] of SDXL.
        """
        model, added = self.unet, None
        if conditions is not None:
            added = {name: value.to(self.device, self.dtype) for name, value in conditions.items()}
        self.check_shown()
        self.forward_passes += 1

        def forward() -> Any:
            return model(
                noisy.to(self.device, self.dtype), torch.as_tensor(step, device=self.device),
                encoder_hidden_states=text.to(self.device, self.dtype),
                added_cond_kwargs=added, return_dict=False,
            )[0]  # fmt: skip

        with torch.inference_mode(), TapSet(model) as hooks:
            for tap in taps:
                tap.attach(hooks)
            return hooks.run(forward)
