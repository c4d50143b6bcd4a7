"""A stock Stable Diffusion pipeline that generates with heat maps, from a real checkpoint or the lab's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.trace import PromptMaps, Trace


@dataclass(frozen=True)
class Generated:
    """One image with the heat maps of its prompt."""

    prompt: str
    seed: int
    image: Image.Image
    maps: PromptMaps


class Generator:
    """Generates one image per call and seed. size: [height, width] in pixels, the model's own if None."""

    def __init__(
        self, backbone: UNetBackbone, steps: int = 30, guidance: float = 7.5, size: tuple[int, int] | None = None
    ) -> None:
        self.backbone, self.steps, self.guidance = backbone, steps, guidance
        native = int(backbone.config["sample_size"]) * backbone.pixels_per_latent
        self.size = size or (native, native)

    @cached_property
    def pipe(self) -> Any:
        """The stock pipeline around the backbone's own parts, without a safety checker."""
        from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

        backbone = self.backbone
        scheduler = backbone.part("scheduler", DDIMScheduler)
        parts: dict[str, Any] = {
            "vae": None, "unet": backbone.unet, "tokenizer": backbone.tokenizer, "text_encoder": backbone.text_encoder,
            "scheduler": scheduler,
        }  # fmt: skip
        if backbone.is_xl:
            pipe = StableDiffusionXLPipeline(
                **parts, tokenizer_2=backbone.tokenizer_2, text_encoder_2=backbone.text_encoder_2, add_watermarker=False
            )
        else:
            pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        # Decoding is done here, so that the lab's codec (which is no AutoencoderKL) serves as well.
        pipe.vae_scale_factor = backbone.pixels_per_latent
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, prompt: str, seed: int, around: Any = None, **traced: Any) -> Generated:
        """An image and its maps; `around` is a context manager that is entered while the pipeline runs (see `replay`)."""
        from contextlib import nullcontext

        pipe = self.pipe
        with Trace(pipe, **traced) as tr, around or nullcontext():
            latents = pipe(
                prompt, height=self.size[0], width=self.size[1], num_inference_steps=self.steps, guidance_scale=self.guidance,
                generator=torch.Generator().manual_seed(seed), output_type="latent",
            ).images  # fmt: skip
        return Generated(prompt, seed, self.decode(latents), tr.prompt_maps())

    def decode(self, latents: torch.Tensor) -> Image.Image:
        """The image of one latent [1 c h w]."""
        vae, config = self.backbone.vae, self.backbone.vae_config
        with torch.inference_mode():
            pixels = vae.decode(latents.to(vae.dtype) / config["scaling_factor"], return_dict=False)[0]
        array = ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(np.ascontiguousarray(array.permute(1, 2, 0).cpu().numpy()))
