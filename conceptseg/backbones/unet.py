"""Stable Diffusion 1, 2 and XL: a stock UNet2DConditionModel with its text encoders and autoencoder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.base import RESIZES, Checkpoint, Provenance
from conceptseg.backbones.cross_attention import CrossAttention, CrossAttentionTap, cross_attentions, reference_side
from conceptseg.backbones.latents import spread_out
from conceptseg.backbones.settings import chosen, device_of, dtype_of
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextCache
from conceptseg.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)


class UNetBackbone:
    """Stable Diffusion 1.x, 2.x, XL, or the lab's. Weights are read on first use; text is encoded once per distinct string.

    image_size: pixels a side that the model is shown, or [height, width]; resize: how images get there. text_cache: a folder
    that keeps embedded texts, by encoder and string. licence, memory: what a sheet tells its reader, never read.
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
    ) -> None:
        self.checkpoint = Checkpoint(path, revision)
        self.dtype, self.vae_dtype = dtype_of(dtype, "dtype"), dtype_of(vae_dtype, "vae_dtype")
        self.device = device_of(device)
        chosen("resize", resize, RESIZES)
        self.size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        self.resize = resize
        self.texts = TextCache(text_cache, lambda: {"class": "unet", **self.checkpoint.identity(), "dtype": str(self.dtype)})
        self._warned: set[str] = set()
        self.forward_passes = 0

    # ------------------------------------------------------------ what it is

    @property
    def provenance(self) -> Provenance:
        return self.checkpoint.provenance

    def identity(self) -> dict[str, Any]:
        """What of this backbone changes the numbers, for the run id; the device does not belong to it."""
        return {
            "class": "unet", **self.checkpoint.identity(), "dtype": str(self.dtype), "vae_dtype": str(self.vae_dtype),
            "image_size": self.size[0] if self.size[0] == self.size[1] else list(self.size), "resize": self.resize,
        }  # fmt: skip

    def _config_of(self, part: str) -> dict[str, Any]:
        """config.json of one part; read without loading weights."""
        folder = self.checkpoint.folder()
        if folder is not None:
            file = folder / part / "config.json"
            if not file.exists():
                raise ConfigError(f'extractor.backbone.path "{self.checkpoint.path}": wanted {file}, which is not there.')
            return dict(json.loads(file.read_text(encoding="utf-8")))
        from diffusers import UNet2DConditionModel

        with self.checkpoint.loading(f"{part}/config.json"):
            return dict(UNet2DConditionModel.load_config(subfolder=part, **self.checkpoint.source()))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The U-Net's config.json."""
        return self._config_of("unet")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config.json."""
        return self._config_of("vae")

    @property
    def is_xl(self) -> bool:
        """SDXL: two text encoders, a pooled vector and size conditioning."""
        return bool(self.config.get("addition_embed_type") == "text_time")

    @cached_property
    def layers(self) -> tuple[CrossAttention, ...]:
        """Cross-attentions in the reference's order: up blocks, down blocks, and the mid block last."""
        return cross_attentions(self.config)

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent pixel."""
        config = self.vae_config
        return int(config["patch"] if "patch" in config else 2 ** (len(config["block_out_channels"]) - 1))

    @property
    def map_side(self) -> int:
        """Side of the reference's maps for this model: a property of its configuration, not of the image."""
        return reference_side(int(self.config["sample_size"]), self.pixels_per_latent)

    @property
    def text_length(self) -> int:
        """Text positions that the U-Net attends to, special tokens and padding included."""
        return int(self.tokenizer.model_max_length)

    # ------------------------------------------------------------ parts, loaded on first use

    def part(self, name: str, loader: Any, dtype: torch.dtype | None = None) -> Any:
        """A part of the checkpoint; a model (which has a dtype) on the device, without dropout and gradients."""
        with self.checkpoint.loading(name):
            if dtype is None:
                return loader.from_pretrained(subfolder=name, **self.checkpoint.source())
            model = loader.from_pretrained(subfolder=name, torch_dtype=dtype, **self.checkpoint.source())
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        found: nn.Module = self.part("unet", UNet2DConditionModel, self.dtype)
        return found

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        from conceptseg.backbones.codec import PatchCodec

        codecs, kind = {"AutoencoderKL": AutoencoderKL, "PatchCodec": PatchCodec}, self.vae_config["_class_name"]
        if kind not in codecs:
            raise ConfigError(f'extractor.backbone.path: its vae is a "{kind}". {did_you_mean(kind, codecs)}')
        return self.part("vae", codecs[kind], self.vae_dtype)

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

        return self.part("text_encoder", CLIPTextModel, self.dtype)

    @cached_property
    def text_encoder_2(self) -> Any:
        from transformers import CLIPTextModelWithProjection

        return self.part("text_encoder_2", CLIPTextModelWithProjection, self.dtype)

    @cached_property
    def signal_shares(self) -> Float[Tensor, " steps"]:
        """ᾱ of every training step: the share of an image's variance that is left."""
        from diffusers import DDIMScheduler

        # Any diffusion scheduler's config holds the betas.
        shares: Tensor = self.part("scheduler", DDIMScheduler).alphas_cumprod.float()
        return shares

    # ------------------------------------------------------------ text

    def encode_text(self, strings: Sequence[str]) -> None:
        """Put every string that is new into the cache. Raises DataError for a word the tokenizer does not know."""
        new = [s for s in dict.fromkeys(strings) if s not in self.texts]
        if not new:
            return
        self._check_words(new)
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

    def _check_words(self, strings: Sequence[str]) -> None:
        tokenizer, unknown = self.tokenizer, self.tokenizer.unk_token_id
        trained = set((self.checkpoint.card() or {}).get("trained_words", ()))
        for string in strings:
            said_ids = tokenizer(string, add_special_tokens=False, verbose=False).input_ids
            if unknown is not None and unknown != tokenizer.eos_token_id and unknown in said_ids:
                known = [w for w in tokenizer.get_vocab() if w.isalpha()]
                word = next((w for w in string.split() if unknown in tokenizer(w).input_ids), string)
                raise DataError(
                    f'the text "{string}": "{word}" is unknown to this backbone\'s tokenizer. {did_you_mean(word, known)}'
                )
        said = {word for string in strings for word in re.findall(r"[a-z0-9]+", string.lower())}
        if trained and (unseen := sorted(said - trained - self._warned)):
            self._warned |= set(unseen)
            log.warning("this lab model never saw the words %s: such maps say nothing about the method", ", ".join(unseen))

    def text(self, strings: Sequence[str]) -> Float[Tensor, "B T d"]:
        """Encoded strings, padded to `text_length`."""
        self.encode_text(strings)
        return torch.stack([self.texts[s]["tokens"] for s in strings]).to(self.device)

    def unpadded_text(self, string: str) -> Float[Tensor, "n d"]:
        """One encoded string with its start and end tokens and no padding; text encoders are causal, so a slice is enough."""
        self.encode_text([string])
        tokens = self.tokenizer(string, truncation=True, max_length=self.text_length).input_ids
        return self.texts[string]["tokens"][: len(tokens)].to(self.device)

    def conditions(self, strings: Sequence[str], pixels: tuple[int, int]) -> dict[str, Tensor] | None:
        """SDXL's further conditioning for images of this size without a crop; None for other models."""
        if not self.is_xl:
            return None
        self.encode_text(strings)
        ids = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=self.dtype, device=self.device)
        pooled = torch.stack([self.texts[s]["pooled"] for s in strings]).to(self.device)
        return {"text_embeds": pooled, "time_ids": ids.expand(len(strings), 6)}

    def unconditional(self, rows: int, pixels: tuple[int, int]) -> tuple[Float[Tensor, "R T d"], dict[str, Tensor] | None]:
        """What guidance compares with: the empty text, which SDXL replaces by zeros."""
        text, conditions = self.text([""] * rows), self.conditions([""] * rows, pixels)
        if conditions is None:
            return text, None
        return torch.zeros_like(text), {**conditions, "text_embeds": torch.zeros_like(conditions["text_embeds"])}

    # ------------------------------------------------------------ images

    def latents(
        self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Images in 0..1 -> scaled latents, float32: the posterior's mean, or a sample per image with its generator."""
        step = self.pixels_per_latent * 2 ** (len(self.config["block_out_channels"]) - 1)
        if images.shape[-2] % step or images.shape[-1] % step:
            near = max(step, round(images.shape[-1] / step) * step)
            raise ConfigError(
                f"extractor.backbone.image_size is {images.shape[-2]} x {images.shape[-1]}; this model's coarsest grid has cells "
                f"{step} pixels wide, so a multiple of {step} is wanted, for example {near}."
            )
        with torch.inference_mode():
            z = spread_out(self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist, generators)
        return (z * self.vae_config["scaling_factor"]).float()

    def step_of(self, level: float) -> int:
        """The training step at a noise level t in 0..1; t = 0.021 is step 21 of 1000."""
        return min(round(level * len(self.signal_shares)), len(self.signal_shares) - 1)

    def noised(
        self, latents: Float[Tensor, "*B c h w"], noise: Float[Tensor, "*B c h w"], step: int
    ) -> Float[Tensor, "*B c h w"]:
        """sqrt(ᾱ) · latents + sqrt(1 - ᾱ) · noise at a training step.

        What schedulers of sigma type (SDXL's Euler) give after scale_model_input, by another route.
        """
        share = self.signal_shares[step].to(latents.device)
        return share.sqrt() * latents + (1 - share).sqrt() * noise.to(latents)

    # ------------------------------------------------------------ one denoiser call

    def denoise(
        self,
        noisy: Float[Tensor, "R c h w"],
        step: int | Tensor,
        text: Float[Tensor, "R T d"],
        conditions: Mapping[str, Tensor] | None = None,
        *taps: CrossAttentionTap,
    ) -> Float[Tensor, "R c h w"] | None:
        """One forward pass at a training step. Returns the U-Net's output, or None if a tap stopped it early."""
        model, added = self.unet, None
        if conditions is not None:
            added = {name: value.to(self.device, self.dtype) for name, value in conditions.items()}
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
