"""Tiny random models of transformers that read a text and an image, saved as their hub repositories are."""

import json

import torch
import transformers

from conceptseg.backbones.transformers_model import TransformersBackbone
from conceptseg.lab.models import word_tokenizer


def settings_of(folder, architecture):
    """What replaces a sheet's settings."""
    return {
        "path": str(tiny_transformers(folder, architecture)), "revision": None, "dtype": "float32", "device": "cpu",
        "image_size": 32, "text_tokens": 12, "prompt": "a {}",
    }  # fmt: skip


def made(folder, architecture):
    about = {"architecture": architecture, "trained_on": "masks or boxes", "mean": [0.5] * 3, "std": [0.5] * 3}
    return TransformersBackbone(**settings_of(folder, architecture), **about)


def tiny_transformers(folder, architecture):
    """A tiny random model of transformers, saved as its hub repositories are."""
    words = word_tokenizer(12, begin=True)
    special = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 16, **special,
    }  # fmt: skip
    torch.manual_seed(0)
    if architecture == "GroupViTModel":
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "depths": [1, 1, 1], "num_hidden_layers": 3,
            "num_group_tokens": [6, 3, 0],
            "num_output_groups": [6, 3, 0], "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
        }  # fmt: skip
        config = transformers.GroupViTConfig(
            text_config=text, vision_config=vision, projection_dim=16, projection_intermediate_dim=32
        )
    else:
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
            "patch_size": 4,
        }  # fmt: skip
        config = transformers.CLIPSegConfig(
            text_config=text, vision_config=vision, projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        )  # fmt: skip
    model = getattr(transformers, architecture)(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return folder
