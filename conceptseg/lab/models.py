"""Stock model classes at lab size, built from a plain mapping of sizes, and their word-level tokenizer; weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from conceptseg.backbones.codec import PatchCodec
from conceptseg.data.drawings import OBJECTS, TINTS
from conceptseg.data.words import OTHER_WORDS
from conceptseg.lab.captions import GLUE, NOUNS

PAD, END, UNKNOWN, BEGIN = "<pad>", "</s>", "<unk>", "<s>"


def word_tokenizer(length: int, begin: bool = False) -> PreTrainedTokenizerFast:
    """One token per word, an end token after them and, as CLIP wants it, one before.

    The drawn world's words come first in the vocabulary; words of the real data sets follow (never trained).
    """
    trained = [*GLUE, *NOUNS, *TINTS]
    others = [w for w in OTHER_WORDS if w not in trained]
    first = [PAD, END, UNKNOWN, *([BEGIN] if begin else [])]
    vocabulary = {w: i for i, w in enumerate([*first, *trained, *others])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    lower, no_marks = normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([lower, no_marks])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, vocabulary[word]) for word in (BEGIN, END) if word in vocabulary]
    single = f"{BEGIN} $A {END}" if begin else f"$A {END}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=length,
        **({"bos_token": BEGIN} if begin else {}),
    )  # fmt: skip


def _t5(sizes: dict[str, Any], words: int) -> T5EncoderModel:
    width = sizes["text_width"]
    return T5EncoderModel(
        T5Config(
            vocab_size=words, d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=sizes["text_layers"],
            num_heads=4, relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, use_cache=False,
        )
    )  # fmt: skip


def _clip_text(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu", attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def _start_as_identity(transformer: torch.nn.Module, modulations: list[torch.nn.Module]) -> None:
    """adaLN-zero: with zero modulation every block passes its input on, and the first velocity is zero."""
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for modulation in modulations:
        torch.nn.init.zeros_(modulation.get_parameter("linear.weight"))
    torch.nn.init.zeros_(transformer.get_parameter("norm_out.linear.weight"))
    torch.nn.init.zeros_(transformer.get_parameter("proj_out.weight"))


def _schedule() -> FlowMatchEulerDiscreteScheduler:
    """Stable Diffusion 3's schedule, most of whose steps are noisy: there a picture's colours and places are settled."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_flux(sizes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a Flux pipeline by the sub-folder that `from_pretrained` reads them from; weights are random."""
    tokenizer = word_tokenizer(sizes["text_tokens"])
    text = _t5(sizes, len(tokenizer))
    codec = PatchCodec(patch=sizes["codec_patch"], scaling_factor=sizes["latent_scale"])
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=3 * (2 * sizes["codec_patch"]) ** 2, num_layers=sizes["double_blocks"],
        num_single_layers=sizes["single_blocks"], attention_head_dim=sizes["head_width"],
        num_attention_heads=sizes["heads"], joint_attention_dim=sizes["text_width"], pooled_projection_dim=sizes["pooled_width"],
        guidance_embeds=False, axes_dims_rope=tuple(sizes["rope"]),
    )  # fmt: skip
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    _start_as_identity(transformer, [getattr(b, n) for b in blocks for n in ("norm", "norm1", "norm1_context") if hasattr(b, n)])
    return {
        "transformer": transformer, "text_encoder_2": text, "tokenizer_2": tokenizer, "vae": codec,
        "scheduler": _schedule(),
    }  # fmt: skip


def build_sd3(sizes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a Stable Diffusion 3.5 pipeline: two CLIP text encoders, a T5, and dual attention in the named blocks."""
    clip, t5 = word_tokenizer(sizes["text_tokens"], begin=True), word_tokenizer(sizes["text_tokens"])
    encoders = [CLIPTextModelWithProjection(_clip_text(clip, sizes["clip_width"], sizes["clip_layers"])) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=sizes["image_size"] // sizes["codec_patch"], patch_size=2, in_channels=3 * sizes["codec_patch"] ** 2,
        out_channels=3 * sizes["codec_patch"] ** 2, num_layers=sizes["blocks"], attention_head_dim=sizes["head_width"],
        num_attention_heads=sizes["heads"], joint_attention_dim=sizes["text_width"],
        caption_projection_dim=sizes["heads"] * sizes["head_width"], pooled_projection_dim=2 * sizes["clip_width"],
        pos_embed_max_size=sizes["image_size"] // sizes["codec_patch"] // 2,
        dual_attention_layers=tuple(sizes["dual_attention_blocks"]), qk_norm="rms_norm",
    )  # fmt: skip
    names = ("norm1", "norm1_context")
    _start_as_identity(transformer, [getattr(b, n) for b in transformer.transformer_blocks for n in names])
    return {
        "transformer": transformer, "text_encoder": encoders[0], "text_encoder_2": encoders[1],
        "text_encoder_3": _t5(sizes, len(t5)), "tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5,
        "vae": PatchCodec(patch=sizes["codec_patch"], scaling_factor=sizes["latent_scale"]),
        "scheduler": _schedule(),
    }  # fmt: skip


DIFFUSION: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1, "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",  # sampling starts where noise is pure (Lin et al., arXiv:2305.08891)
}  # fmt: skip


def _unet(sizes: dict[str, Any], text_width: int, **more: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sizes["image_size"] // sizes["codec_patch"], in_channels=3 * sizes["codec_patch"] ** 2,
        out_channels=3 * sizes["codec_patch"] ** 2, block_out_channels=tuple(sizes["channels"]), layers_per_block=1,
        down_block_types=tuple("CrossAttnDownBlock2D" if reads else "DownBlock2D" for reads in sizes["reads_text"]),
        up_block_types=tuple("CrossAttnUpBlock2D" if reads else "UpBlock2D" for reads in reversed(sizes["reads_text"])),
        cross_attention_dim=text_width, norm_num_groups=sizes["norm_groups"], **more,
    )  # fmt: skip


def build_sd(sizes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a Stable Diffusion pipeline: a U-Net with cross-attention at several grids and one CLIP text encoder."""
    tokenizer = word_tokenizer(sizes["text_tokens"], begin=True)
    return {
        "unet": _unet(sizes, sizes["text_width"], attention_head_dim=sizes["heads"]),
        "text_encoder": CLIPTextModel(_clip_text(tokenizer, sizes["text_width"], sizes["text_layers"])),
        "tokenizer": tokenizer, "vae": PatchCodec(patch=sizes["codec_patch"], scaling_factor=sizes["latent_scale"]),
        "scheduler": DDIMScheduler(**DIFFUSION, clip_sample=False, set_alpha_to_one=False),
    }  # fmt: skip


def build_sdxl(sizes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a Stable Diffusion XL pipeline: several transformer layers at the coarsest grid, two text encoders whose
    layers before the last stand side by side, and the second one's pooled vector with size conditioning beside the time step.
    """
    tokenizer = word_tokenizer(sizes["text_tokens"], begin=True)
    text = _clip_text(tokenizer, sizes["text_width"], sizes["text_layers"])
    unet = _unet(
        sizes, 2 * sizes["text_width"], attention_head_dim=tuple(sizes["heads"]), use_linear_projection=True,
        transformer_layers_per_block=tuple(sizes["transformer_layers"]), addition_embed_type="text_time",
        addition_time_embed_dim=sizes["size_width"],
        projection_class_embeddings_input_dim=sizes["text_width"] + 6 * sizes["size_width"],
    )  # fmt: skip
    return {
        "unet": unet, "text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text),
        "tokenizer": tokenizer, "tokenizer_2": tokenizer,
        "vae": PatchCodec(patch=sizes["codec_patch"], scaling_factor=sizes["latent_scale"]),
        "scheduler": EulerDiscreteScheduler(**DIFFUSION),
    }  # fmt: skip


def build_clip(sizes: dict[str, Any]) -> dict[str, Any]:
    """A stock open_clip CLIP, the config it is built from, and its tokenizer."""
    from open_clip.model import CLIP

    tokenizer = word_tokenizer(sizes["text_tokens"], begin=True)
    config = {
        "embed_dim": sizes["embedding"],
        "vision_cfg": {
            "image_size": sizes["image_size"], "patch_size": sizes["patch"], "width": sizes["width"],
            "layers": sizes["layers"], "head_width": sizes["head_width"],
        },
        "text_cfg": {
            "context_length": sizes["text_tokens"], "vocab_size": len(tokenizer), "width": sizes["text_width"],
            "heads": sizes["text_heads"], "layers": sizes["text_layers"], "pool_type": "eos", "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }  # fmt: skip
    dropped = {"patch_dropout": sizes["patch_drop"]}  # in training alone, so no part of what is saved
    model = CLIP(**{**config, "vision_cfg": {**config["vision_cfg"], **dropped}})
    return {"model": model, "config": config, "tokenizer": tokenizer}


def build_vit(sizes: dict[str, Any], classes: int) -> dict[str, Any]:
    """A stock timm VisionTransformer and the arguments it is built from; no classes, no head."""
    import timm

    config = {
        "img_size": sizes["image_size"], "patch_size": sizes["patch"], "embed_dim": sizes["width"], "depth": sizes["layers"],
        "num_heads": sizes["heads"], "mlp_ratio": sizes["mlp_ratio"],
    }  # fmt: skip
    architecture = "vit_tiny_patch16_224"  # any plain ViT: the arguments say the rest
    dropped = sizes["patch_drop"]  # in training alone, so no part of what is saved
    model = timm.create_model(
        architecture, pretrained=False, num_classes=classes, dynamic_img_size=True, patch_drop_rate=dropped, **config
    )  # fmt: skip
    return {"model": model, "config": config, "architecture": architecture, "classes": classes}


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write every part as fp16 safetensors in the sub-folder that real checkpoints use."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)
        elif isinstance(part, PreTrainedTokenizerFast):
            _forget_padding(part)
        part.save_pretrained(folder / name)


def _forget_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whether a tokenizer has padded in training is no part of the model."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def _fp16(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().to(torch.float16).contiguous() for k, v in model.state_dict().items()}


def save_clip(parts: dict[str, Any], folder: Path) -> None:
    """Write an open_clip folder (its "local-dir:" layout): config, fp16 weights and tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    side = parts["config"]["vision_cfg"]["image_size"]
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [side, side], "interpolation": "bicubic", "resize_mode": "squash"}
    text = json.dumps({"model_cfg": parts["config"], "preprocess_cfg": about}, indent=1) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    save_file(_fp16(parts["model"]), folder / "open_clip_model.safetensors")
    _forget_padding(parts["tokenizer"])
    parts["tokenizer"].save_pretrained(folder)


def save_vit(parts: dict[str, Any], folder: Path) -> None:
    """Write a timm folder (its "local-dir:" layout): config.json and fp16 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    side = parts["config"]["img_size"]
    about = {
        "architecture": parts["architecture"], "num_classes": parts["classes"], "global_pool": "token",
        "model_args": {**parts["config"], "dynamic_img_size": True},
        "pretrained_cfg": {
            "input_size": [3, side, side], "fixed_input_size": False, "interpolation": "bicubic", "crop_pct": 1.0,
            "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": parts["classes"],
            **({"label_names": list(OBJECTS)} if parts["classes"] else {}),
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    save_file(_fp16(parts["model"]), folder / "model.safetensors")
