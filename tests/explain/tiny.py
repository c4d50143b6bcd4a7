"""Tiny random checkpoints in the layout of real ones, every block of which does something."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from conceptseg.lab.models import build_flux, build_sd3, save, word_tokenizer

FLUX = {
    "double_blocks": 3, "single_blocks": 1, "heads": 2, "head_width": 12, "rope": [4, 4, 4], "text_tokens": 8,
    "text_width": 16, "text_layers": 1, "pooled_width": 8, "codec_patch": 2, "latent_scale": 1.5,
}  # fmt: skip
SD3 = {
    "blocks": 3, "dual_attention_blocks": [0], "heads": 2, "head_width": 12, "text_tokens": 12, "text_width": 16,
    "text_layers": 1, "clip_width": 8, "clip_layers": 2, "image_size": 32, "codec_patch": 2, "latent_scale": 1.5,
}  # fmt: skip


def written(parts, folder, kl=False):
    """Parts saved with random weights; kl: with a random AutoencoderKL in place of the exact codec."""
    for weight in parts["transformer"].parameters():  # built as the identity
        if weight.ndim == 2:
            nn.init.normal_(weight, 0, weight.shape[-1] ** -0.5)
    if kl:
        parts["vae"] = AutoencoderKL(
            latent_channels=12, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, scaling_factor=1.5,
            shift_factor=0.1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return str(folder)


def tiny_flux(folder, shifted=False, clip=False, guidance=False, **options):
    torch.manual_seed(0)
    parts = build_flux(FLUX)
    if guidance:
        parts["transformer"] = type(parts["transformer"])(**{**parts["transformer"].config, "guidance_embeds": True})
    if shifted:
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15)
    if clip:
        tokenizer = word_tokenizer(8)
        config = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, eos_token_id=1, bos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        parts |= {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}
    return written(parts, folder, **options)


def tiny_sd3(folder, **options):
    torch.manual_seed(0)
    return written(build_sd3(SD3), folder, **options)


def tiny_cogvideox(folder):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(8)
    parts = {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
            num_layers=2, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=8,
            use_rotary_positional_embeddings=True, temporal_compression_ratio=4,
        ),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=32,
            sample_width=32, temporal_compression_ratio=4,
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, eos_token_id=1)
        ),
        "tokenizer": tokenizer, "scheduler": CogVideoXDDIMScheduler(),
    }  # fmt: skip
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return str(folder)
