"""FLUX.1 with random weights at three sizes, for timings: whole, cut down for a processor, and tiny for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.lab.models import word_tokenizer
from conceptseg.types import Concepts, Task

CONCEPTS = ("bird", "background", "floor", "tree", "person", "grass", "face")
CAPTION = "a bird"


@dataclass(frozen=True)
class Geometry:
    """Sizes of the parts. `side` is the image's in pixels: 16 pixels make a token."""

    double_blocks: int
    single_blocks: int
    heads: int
    axes: tuple[int, int, int]
    """Rotary axes; their sum is the width of a head."""
    text_layers: int
    text_width: int
    text_heads: int
    text_hidden: int
    text_tokens: int
    side: int
    autoencoder: tuple[int, ...]
    """Channels of the autoencoder's levels."""
    layers_read: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return (self.side // 16) ** 2


GEOMETRIES = {
    # FLUX.1-schnell with T5-XXL and its autoencoder, read where the paper's run reads (layers 14 to 17).
    "full": Geometry(19, 38, 24, (16, 56, 56), 24, 4096, 64, 10240, 256, 1024, (128, 256, 512, 512), (14, 15, 16, 17)),
    # A tenth of the blocks of both transformers at their own widths, and a tenth of the autoencoder's work; 144 image and 9 text
    # tokens, in the proportion of 4096 and 256. Both blocks are read, the last as far as its attention.
    "cut": Geometry(2, 4, 24, (16, 56, 56), 2, 4096, 64, 10240, 9, 192, (40, 80, 160, 160), (0, 1)),
    "tiny": Geometry(3, 2, 2, (4, 6, 6), 2, 32, 2, 64, 8, 64, (8, 8, 16, 16), (0, 1)),
}


def random_backbone(geometry: Geometry, device: str = "cpu", dtype: str = "float32", whole: bool = True) -> FluxBackbone:
    """A backbone whose stock parts have this geometry and random weights; on "meta" it has shapes only, without `whole` no
    transformer."""
    backbone = FluxBackbone("lab:flux", device=device, dtype=dtype, image_size=geometry.side, text_tokens=geometry.text_tokens)
    head = sum(geometry.axes)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=geometry.double_blocks, num_single_layers=geometry.single_blocks, attention_head_dim=head,
            num_attention_heads=geometry.heads, joint_attention_dim=geometry.text_width, pooled_projection_dim=768,
            axes_dims_rope=geometry.axes,
        )  # fmt: skip
        text = T5EncoderModel(
            T5Config(
                vocab_size=512, d_model=geometry.text_width, d_ff=geometry.text_hidden,
                d_kv=geometry.text_width // geometry.text_heads,
                num_heads=geometry.text_heads, num_layers=geometry.text_layers, feed_forward_proj="gated-gelu",
                is_encoder_decoder=False, use_cache=False,
            )
        )  # fmt: skip
        autoencoder = AutoencoderKL(
            block_out_channels=geometry.autoencoder, layers_per_block=2, latent_channels=16,
            norm_num_groups=geometry.autoencoder[0] // 4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, use_quant_conv=False,
            use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
        )  # fmt: skip
    backbone.tokenizer = word_tokenizer(geometry.text_tokens)
    backbone.config, backbone.vae_config = dict(transformer.config), dict(autoencoder.config)
    if whole:
        backbone.transformer = _filled(transformer, device, backbone.dtype)
    backbone.text_encoder, backbone.vae = _filled(text, device, backbone.dtype), _filled(autoencoder, device, torch.float32)
    return backbone


def _filled(model: nn.Module, device: str, dtype: torch.dtype) -> Any:
    """Random matrices at the scale of their inputs, norms of one, biases of nought. The same four million draws come round again:
    drawing billions takes minutes."""
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    pool = torch.empty((1 << 22) + 15, dtype=dtype, device=device)
    if device != "meta":
        pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(0)))
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        flat = weight.view(-1)
        for start in range(0, flat.numel(), pool.numel()):
            part = flat[start : start + pool.numel()]
            torch.mul(pool[: part.numel()], weight[0].numel() ** -0.5, out=part)
    return model


def random_task(geometry: Geometry, number: int, concepts: tuple[str, ...] = CONCEPTS) -> Task:
    """An image of noise with seven words to find."""
    image = np.random.default_rng(number).random((geometry.side, geometry.side, 3), np.float32)
    truth = np.zeros((geometry.side, geometry.side), np.uint8)
    asked = Concepts(concepts, (1, *[0] * (len(concepts) - 1)), 0)
    return Task(f"noise/{number:03d}", image, truth, asked, CAPTION, (0, 1))
