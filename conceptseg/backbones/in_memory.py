"""Backbones of models that are in memory already: a diffusers pipeline, or a model of open_clip, timm or transformers.

The modules stay where they are and as they are; nothing is copied, moved or frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import nn

from conceptseg.backbones.base import Backbone, LoadedCheckpoint
from conceptseg.backbones.sheet_files import sheet_of
from conceptseg.backbones.sheets import CLIP, SIGLIP, UNET, VIT, families
from conceptseg.errors import ConfigError, did_you_mean

Loaded: TypeAlias = Any
"""A pipeline or model in memory, or a pair (model, tokenizer or processor): see `backbone_from`."""


def backbone_from(model: Any) -> Any:
    """The backbone around a model in memory; a `Backbone` comes back as it is.

    model: a diffusers pipeline with a transformer of a known family or a U-Net; an open_clip CLIP, or a pair (CLIP, tokenizer)
    where it does not use open_clip's own byte pairs; a timm VisionTransformer; or a pair (model, processor) of transformers.
    Raises ConfigError for anything else, and for a model in training mode.
    """
    if isinstance(model, Backbone):
        return model
    if isinstance(model, str):
        raise ConfigError(f'backbone is the text "{model}"; wanted a model. To read one by name use from_pretrained("{model}").')
    first, second = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
    if hasattr(first, "components"):
        return _of_pipeline(first)
    if isinstance(first, nn.Module):
        for build in (_of_clip, _of_vit, _of_siglip, _of_transformers):
            found = build(first, second)
            if found is not None:
                return found
    raise ConfigError(
        f"backbone is a {type(model).__name__}; wanted a diffusers pipeline with a transformer or a U-Net, an open_clip CLIP, a "
        f"timm VisionTransformer, or a pair (model, processor) of transformers."
    )


def _of_pipeline(pipe: Any) -> Backbone:
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    core = "transformer" if "transformer" in parts else "unet"
    if core not in parts:
        raise ConfigError(f"the {type(pipe).__name__} has neither a transformer nor a unet, so no image is denoised in it.")
    model = parts[core]
    if hasattr(model, "_orig_mod"):
        raise ConfigError(
            f"the pipeline's {core} was wrapped by torch.compile. Set pipe.{core} = pipe.{core}._orig_mod, or compile it in "
            f"place: pipe.{core}.compile()."
        )
    name = str(getattr(pipe.config, "_name_or_path", "") or getattr(model.config, "_name_or_path", "") or type(pipe).__name__)
    kind = type(pipe).__name__ if type(pipe).__name__ in families() else type(model).__name__
    if core == "transformer" and kind not in families():
        raise ConfigError(f"the pipeline's transformer is a {kind}. {did_you_mean(kind, families())}")
    target = UNET if core == "unet" else families()[kind]
    kept = {"image_size", "resize", "text_tokens", "concept_pooling", "pooled", "clip_tokens", "concept_text", "concept_token"}
    settings = {key: value for key, value in (sheet_of(name) or {}).items() if key in kept}
    settings.setdefault("image_size", _image_size(pipe, model))
    settings["compute_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")  # its weights are not touched
    if core == "transformer" and "text_tokens" not in settings:
        settings["text_tokens"] = _text_tokens(pipe, model, parts)
    found = _built(target, name, parts, getattr(pipe, "_execution_device", pipe.device), model, **settings)
    if "vae" in parts:
        found.vae_dtype = parts["vae"].dtype
    if core == "transformer":
        found.text_pipeline = pipe
        if (solver := type(pipe.scheduler).__name__) not in found.schedulers:
            raise ConfigError(
                f"the pipeline's scheduler is a {solver}; images are made here by a {' or a '.join(found.schedulers)}. "
                f"Set pipe.scheduler = {found.schedulers[0]}.from_config(pipe.scheduler.config)."
            )
        found.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # a copy: its timesteps are set here
    found.pipeline = pipe
    return found


def _image_size(pipe: Any, model: Any) -> int | list[int]:
    """Pixels a side, or [height, width], that the pipeline makes by default."""
    if "sample_height" in model.config:  # of video
        factor = int(pipe.vae_scale_factor_spatial)
        return [factor * int(model.config[f"sample_{side}"]) for side in ("height", "width")]
    cells = getattr(pipe, "default_sample_size", None) or model.config.get("sample_size") or 64
    cells = cells if isinstance(cells, int) else max(cells)
    return int(cells * getattr(pipe, "vae_scale_factor", 8))


def _text_tokens(pipe: Any, model: Any, parts: Mapping[str, Any]) -> int:
    """Padded text length: the pipeline's own, 256 for a Flux without embedded guidance (schnell); at most the tokenizer's."""
    own = signature(type(pipe).__call__).parameters.get("max_sequence_length")
    schnell = type(model).__name__ == "FluxTransformer2DModel" and model.config.get("guidance_embeds") is False
    fixed = getattr(pipe, "tokenizer_max_length", 256)  # of a pipeline whose call has no such argument
    wanted = 256 if schnell else int(fixed if own is None else own.default)
    lengths = [
        getattr(parts[key], "model_max_length", wanted) for key in ("tokenizer_3", "tokenizer_2", "tokenizer") if key in parts
    ]
    return int(min(wanted, lengths[0])) if lengths else wanted


def _of_clip(model: nn.Module, tokenizer: Any) -> Backbone | None:
    visual: Any = getattr(model, "visual", None)
    if visual is None or not hasattr(model, "encode_text"):
        return None
    if getattr(visual, "image_mean", None) is None or getattr(visual, "image_std", None) is None:
        raise ConfigError(
            "the CLIP does not say how images are normalised (visual.image_mean and visual.image_std, which "
            "open_clip.create_model sets). Set both to those that it was trained with."
        )
    size = visual.image_size if isinstance(visual.image_size, int) else list(visual.image_size)
    length = int(getattr(model, "context_length", 77))
    found = _built(
        CLIP, type(model).__name__, {"model": model}, next(model.parameters()).device, model, trained_on="images and captions",
        tokenizer="bpe" if tokenizer is None else "files",
        templates=["a photo of a {}."] if tokenizer is None else ["a {}"],
    )  # fmt: skip
    found.config = {
        "model_cfg": {"vision_cfg": {"image_size": size}, "text_cfg": {"context_length": length}},
        "preprocess_cfg": {
            "mean": visual.image_mean,
            "std": visual.image_std,
        },
    }
    found.clip, found.tokenizer = model, getattr(tokenizer, "tokenizer", tokenizer)
    return found


def _of_vit(model: nn.Module, _: Any) -> Backbone | None:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        return None
    about = dict(getattr(model, "pretrained_cfg", None) or {})
    if "mean" not in about or "std" not in about:
        raise ConfigError(
            "the VisionTransformer has no pretrained_cfg with mean and std, so how images are normalised is unknown."
        )
    size = tuple(model.patch_embed.img_size)
    labels = about.get("label_names") or ("imagenet" if model.num_classes == 1000 else None)
    found = _built(
        VIT, about.get("architecture") or type(model).__name__, {"model": model}, next(model.parameters()).device, model,
        trained_on="class labels" if model.num_classes else "images", labels=labels,
    )  # fmt: skip
    found.config = {
        "num_classes": model.num_classes,
        "pretrained_cfg": {"input_size": (3, *size), "mean": about["mean"], "std": about["std"]},
    }
    found.model = model
    return found


def _of_siglip(model: nn.Module, processor: Any) -> Backbone | None:
    if type(model).__name__ != "SiglipModel" or processor is None:
        return None
    config: Any = model.config
    found = _built(
        SIGLIP, str(config._name_or_path or "SiglipModel"), {"model": model}, next(model.parameters()).device, model,
        trained_on="images and captions",
    )  # fmt: skip
    found.config = config.to_dict()
    found._preprocessing = {"image_mean": processor.image_processor.image_mean, "image_std": processor.image_processor.image_std}
    found.siglip, found.tokenizer = model, processor.tokenizer
    return found


def _of_transformers(model: nn.Module, processor: Any) -> Backbone | None:
    config: Any = getattr(model, "config", None)
    if config is None or processor is None:
        return None
    images = getattr(processor, "image_processor", processor)
    size: Any = images.size if isinstance(images.size, int) else dict(images.size)
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    if type(model).__name__ == "GroupViTModel" and config._attn_implementation != "eager":
        raise ConfigError('GroupViT\'s masks are its attention: read it with attn_implementation="eager".')
    found = _built(
        "conceptseg.backbones.encoders.transformers_model.TransformersBackbone", type(model).__name__, {"model": model},
        next(model.parameters()).device, model, architecture=type(model).__name__, image_size=int(side),
        mean=list(images.image_mean), std=list(images.image_std),
        trained_on="images and captions" if type(model).__name__ == "GroupViTModel" else "masks or boxes",
    )  # fmt: skip
    found.model, found.tokenizer = model, getattr(processor, "tokenizer", None)
    return found


def _built(target: str, name: str, parts: Mapping[str, Any], device: torch.device, model: nn.Module, **settings: Any) -> Any:
    if model.training:
        raise ConfigError(f"the {type(model).__name__} is in training mode, where dropout is random: call .eval() first.")
    module, _, kind = target.rpartition(".")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    found = getattr(import_module(module), kind)(path=name, device=str(device), dtype=dtype, **settings)
    found.checkpoint = LoadedCheckpoint(name, parts=parts)
    return found
