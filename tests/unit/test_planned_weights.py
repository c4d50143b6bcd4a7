"""A config that does not fit its weights is refused before memory is taken for it, and never filled up with random weights."""

from __future__ import annotations

import json
import shutil
import time
from importlib import resources
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from tiny_encoders import tiny_clip, tiny_vit
from tiny_transformers import made
from transformers import CLIPTextModel, T5EncoderModel

from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.planned_weights import load_part
from conceptseg.errors import ConfigError

SHIPPED = Path(str(resources.files("conceptseg.lab"))) / "weights"
BILLION = 1_000_000_000
PARTS = [
    ("flux", "transformer", FluxTransformer2DModel, {
        "num_layers": (BILLION, 400, 40, 3, -1), "num_single_layers": (BILLION, 3), "num_attention_heads": (BILLION, 2000, -2, 0),
        "attention_head_dim": (BILLION, -8), "joint_attention_dim": (BILLION, -1), "in_channels": (10**20, -4, "many", None),
        "axes_dims_rope": ([BILLION] * 3,),
    }),
    ("sd", "unet", UNet2DConditionModel, {
        "layers_per_block": (BILLION, [BILLION, 1]), "block_out_channels": ([BILLION, BILLION], [1 << 20] * 2, [-32, 32]),
        "cross_attention_dim": (BILLION, [-1, -1]), "transformer_layers_per_block": (BILLION,),
    }),
    ("sd", "text_encoder", CLIPTextModel, {
        "num_hidden_layers": (BILLION, 30, -1), "vocab_size": (BILLION, -5, 0), "hidden_size": (BILLION, 1 << 20, -16),
        "intermediate_size": (BILLION, -1), "max_position_embeddings": (BILLION, -1), "num_attention_heads": (0, BILLION),
    }),
    ("flux", "text_encoder_2", T5EncoderModel, {
        "num_layers": (BILLION, 9), "vocab_size": (BILLION, 10**18), "d_model": (BILLION,), "d_ff": (BILLION,),
    }),
]  # fmt: skip


@pytest.mark.parametrize(("model", "part", "kind", "changes"), PARTS, ids=[f"{m} {p}" for m, p, *_ in PARTS])
def test_a_config_out_of_proportion_is_refused_before_memory_is_taken(tmp_path, model, part, kind, changes):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / model / part, folder / part)
    held = load_part(Checkpoint(str(folder)), part, kind, subfolder=part)
    assert sum(weight.numel() for weight in held.parameters()) > 1000
    whole, silent = json.loads((folder / part / "config.json").read_text()), []
    started = time.process_time()
    for key, values in changes.items():
        assert key in whole
        for value in values:
            (folder / part / "config.json").write_text(json.dumps({**whole, key: value}))
            try:
                load_part(Checkpoint(str(folder)), part, kind, subfolder=part)
                silent.append((key, value))
            except ConfigError:
                pass
    assert not silent
    assert time.process_time() - started < 60


def test_a_block_more_than_the_weights_have_is_named(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / "flux" / "transformer", folder / "transformer")
    file = folder / "transformer" / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, "num_layers": whole["num_layers"] + 1}))
    with pytest.raises(ConfigError, match=r"its transformer lacks \d+ weights .*transformer_blocks"):
        load_part(Checkpoint(str(folder)), "transformer", FluxTransformer2DModel, subfolder="transformer")


def test_encoders_of_one_file_are_refused_too(tmp_path):
    for make, name, changes in (
        (
            tiny_clip,
            "open_clip_config.json",
            {"vision_cfg": {"layers": BILLION, "width": 1 << 22}, "text_cfg": {"vocab_size": BILLION}},
        ),
        (tiny_vit, "config.json", {"model_args": {"depth": BILLION, "embed_dim": 1 << 22}, "": {"num_classes": BILLION}}),
    ):
        backbone = make(tmp_path)
        file = Path(backbone.checkpoint.path) / name
        text = file.read_text()
        for part, settings in changes.items():
            for key, value in settings.items():
                whole = json.loads(text)
                inner = whole.get("model_cfg", whole)
                (inner[part] if part else inner)[key] = value
                file.write_text(json.dumps(whole))
                with pytest.raises(ConfigError, match=f"{key} is|describes a|can't build"):
                    _ = make.__globals__[type(backbone).__name__](str(file.parent), backbone.trained_on).model


def test_models_of_transformers_are_refused_too(tmp_path):
    backbone = made(tmp_path, "CLIPSegForImageSegmentation")
    file = Path(backbone.checkpoint.path) / "config.json"
    whole = json.loads(file.read_text())
    whole["text_config"]["num_hidden_layers"] = BILLION
    file.write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000"):
        _ = backbone.model
    assert torch.get_default_device().type == "cpu"
