"""Tiny random models of transformers that read a text and an image, saved as their hub repositories are."""

import json

import torch
import transformers

from conceptseg.backbones.encoders.transformers_model import TransformersBackbone
from conceptseg.lab.models import word_tokenizer

SIZES = {"Sam2Model": 64}


def settings_of(folder, architecture):
    """Return the settings that replace a sheet's."""
    return {
        "path": str(tiny_transformers(folder, architecture)), "revision": None, "dtype": "float32", "device": "cpu",
        "image_size": SIZES.get(architecture, 32), "text_tokens": 12, "prompt": "a {}",
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
    elif architecture == "CLIPSegForImageSegmentation":
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32,
            "patch_size": 4,
        }  # fmt: skip
        config = transformers.CLIPSegConfig(
            text_config=text, vision_config=vision, projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
            decoder_num_attention_heads=2, decoder_intermediate_size=16,
        )  # fmt: skip
    elif architecture == "GroundingDinoForObjectDetection":
        config = transformers.GroundingDinoConfig(
            backbone_config=transformers.SwinConfig(
                image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
                out_features=["stage2", "stage3", "stage4"],
            ),
            text_config={
                "model_type": "bert", **{k: v for k, v in text.items() if k not in ("bos_token_id", "eos_token_id")}
            },
            num_queries=6, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=16,
            decoder_attention_heads=2, d_model=64, num_feature_levels=4, max_text_len=12, encoder_n_points=2, decoder_n_points=2,
        )  # fmt: skip
    else:
        config = transformers.Sam2Config(
            vision_config={
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 1, 1],
                    "window_size_per_stage": [4, 4, 4, 4], "window_positional_embedding_background_size": [4, 4],
                    "global_attention_blocks": [3],
                    "image_size": [64, 64],
                },
                "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 16,
                "image_size": 64,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
            mask_decoder_config={
                "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            },
        )  # fmt: skip
    model = getattr(transformers, architecture)(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
    if architecture == "GroundingDinoForObjectDetection":
        model.model.decoder.layer_norm.weight.data *= 0.05  # scores between 0 and 1, not rounded to either
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return folder
