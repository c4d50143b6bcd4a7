"""Tiny stock encoders with random weights, saved in the layouts that real checkpoints have, and tasks to show them."""

import json

import numpy as np
import timm
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from transformers import SiglipConfig, SiglipModel

from conceptseg.backbones.encoders.activations import tap_activations
from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.backbones.encoders.siglip import SigLIPBackbone
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.taps import TapSet
from conceptseg.data.drawings import OBJECTS
from conceptseg.lab.models import word_tokenizer
from conceptseg.types import Batch, Concepts, Task

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}


def randomised(model, seed):
    """Weights that make every part do something: norms around 1, the rest normal with the spread of its fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        if not weight.is_floating_point() or weight.ndim == 0:
            continue
        spread = 0.2 if weight.ndim == 1 else weight[0].numel() ** -0.5 if weight.ndim in (2, 4) else 0.3
        drawn = spread * torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + drawn if weight.ndim == 1 and "weight" in name else drawn)
    return model


def write_vit(folder, weights=None, seed=0, architecture="vit_tiny_patch16_224", classes=12, labels=OBJECTS, **sizes):
    """A timm folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0, **sizes}
    if weights is None:
        weights = randomised(timm.create_model(architecture, num_classes=classes, **sizes), seed).state_dict()
    side = sizes["img_size"] if isinstance(sizes["img_size"], tuple) else (sizes["img_size"],) * 2
    about = {
        "architecture": architecture, "num_classes": classes, "global_pool": "token", "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, *side], **HALF, "label_names": list(labels)[:classes]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def tiny_vit(folder, trained_on="class labels", dtype="float32", image_size=None, position_resize="timm", **sizes):
    return ViTBackbone(
        str(write_vit(folder, **sizes)), trained_on, dtype=dtype, image_size=image_size, position_resize=position_resize
    )


def write_clip(folder, weights=None, seed=1, config=None, tokenizer=True):
    """An open_clip folder whose tokenizer has one token a word."""
    folder.mkdir(parents=True, exist_ok=True)
    words = word_tokenizer(12, begin=True)
    config = config or {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 24, "layers": 4, "head_width": 8, "mlp_ratio": 2.0},
        "text_cfg": {
            "context_length": 12, "vocab_size": len(words), "width": 16, "heads": 2, "layers": 2, "pool_type": "eos",
            "eos_id": words.eos_token_id, "pad_id": words.pad_token_id,
        },
    }  # fmt: skip
    if weights is None:
        weights = randomised(CLIP(**config), seed).state_dict()
    about = {"model_cfg": config, "preprocess_cfg": {**HALF, "size": 24, "interpolation": "bicubic", "resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "open_clip_model.safetensors")
    if tokenizer:
        words.save_pretrained(folder)
    return folder


def tiny_clip(folder, dtype="float32", image_size=None, templates=("a {}", "on a {}"), labels="scenes", **settings):
    return CLIPBackbone(
        str(write_clip(folder, **settings)), dtype=dtype, image_size=image_size, templates=list(templates), labels=labels
    )


SIGLIP_SIZES = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def write_siglip(folder, seed=2):
    """A folder that transformers' SiglipModel saves, with a tokenizer of one token a word; returns the stock model."""
    words = word_tokenizer(12, begin=True)
    text = {**SIGLIP_SIZES, "vocab_size": len(words), "max_position_embeddings": 12, "pad_token_id": words.pad_token_id}
    vision = {**SIGLIP_SIZES, "image_size": 24, "patch_size": 8}
    model = randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed).eval()
    model.logit_scale.data.fill_(1.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return model


def tiny_siglip(folder, dtype="float32", image_size=None, templates=("a {}", "on a {}"), labels="scenes"):
    write_siglip(folder)
    return SigLIPBackbone(str(folder), dtype=dtype, image_size=image_size, templates=list(templates), labels=labels)


def task(image, names=("apple", "grass", "sky"), labels=(1, 0, 0), key="made/0"):
    """A task that shows this image, [H W 3] in 0..1 or uint8, and asks for the first word."""
    shown = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
    truth = np.zeros(image.shape[:2], np.uint8)
    return Task(key, shown, truth, Concepts(tuple(names), tuple(labels), 0), f"a {names[0]}", (0, 1))


def batch(count, side=24, seed=0, names=("apple", "grass", "sky"), labels=(1, 0, 0)):
    """Random smooth images, a batch of them."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((count, 4, 4, 3))
    images = coarse.repeat(side // 4, 1).repeat(side // 4, 2)
    return Batch(tuple(task(image, names, labels, f"made/{n}") for n, image in enumerate(images)))


def one_by_one(method, shown):
    """The same maps from batches of one."""
    return torch.cat([method.saliency(Batch((one,))) for one in shown.tasks])


def activations(backbone, images, first=0):
    """Return the activations of the host's blocks on these images."""
    with torch.no_grad(), TapSet(backbone.model) as taps:
        gathered = tap_activations(taps, backbone.tower, first)
        backbone.run(images, taps)
        return gathered()
