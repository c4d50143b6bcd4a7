"""ViT checkpoints in the layout of transformers (`model_type` "vit"), read as timm's VisionTransformer of the same layers.

Layout: transformers 5, models/vit/modeling_vit.py. DINO's own ViTs on the hub are in it, without a classifier.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conceptseg.errors import TapError

_NAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
_PART = re.compile(r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)$")


def in_transformers_layout(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of transformers rather than of timm."""
    return "model_type" in config and "architecture" not in config


def timm_config(config: Mapping[str, Any], preprocessing: Mapping[str, Any], path: str) -> dict[str, Any]:
    """timm's config.json for a transformers ViT. preprocessing: its preprocessor_config.json, or {}.

    Raises TapError for a model of another type.
    """
    if config["model_type"] != "vit" or config.get("hidden_act", "gelu") != "gelu":
        raise TapError(
            f'tapping "{path}": its config.json says model_type "{config["model_type"]}" with activation '
            f'"{config.get("hidden_act", "gelu")}"; wanted transformers\' "vit" with "gelu", or timm\'s layout. Choose a plain '
            f"ViT (backbone@extractor.backbone=vit_base_patch16_224)."
        )
    side = config["image_size"]
    height, width = (side, side) if isinstance(side, int) else side
    classifies = any("ImageClassification" in name for name in config.get("architectures") or ())
    labels = (config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}) if classifies else {}  # transformers' own, not saved
    names = [labels[key] for key in sorted(labels, key=int)]
    return {
        "architecture": "vit_base_patch16_224", "num_classes": len(names),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "model_args": {
            "patch_size": config["patch_size"], "embed_dim": config["hidden_size"], "depth": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"], "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
            "qkv_bias": config.get("qkv_bias", True), "global_pool": "token",
        },
        "pretrained_cfg": {
            "input_size": [config.get("num_channels", 3), height, width], "label_names": names,
            "mean": preprocessing.get("image_mean", [0.5] * 3), "std": preprocessing.get("image_std", [0.5] * 3),
        },
    }  # fmt: skip


def timm_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights [...] under timm's names: queries, keys and values of a block in one matrix, the unused pooler dropped."""
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, weight in state.items():
        plain = name.removeprefix("vit.")
        if plain.startswith("pooler."):
            continue
        if part := _PART.match(plain):
            parts.setdefault(f"blocks.{part[1]}.attn.qkv.{part[3]}", {})[part[2]] = weight
            continue
        for pattern, replacement in _NAMES:
            plain = re.sub(pattern, replacement, plain)
        found[plain] = weight
    return {**found, **{name: torch.cat([held["query"], held["key"], held["value"]]) for name, held in parts.items()}}
