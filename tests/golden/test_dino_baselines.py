"""DINO's self-attention against what DINO (7c446df) and ConceptAttention's wrapper of it returned on a tiny random ViT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import batch, write_vit

from conceptseg.backbones.encoders.tower import tap_normed
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.self_attention import SelfAttention
from conceptseg.segment.resize import nearest_floor
from conceptseg.segment.threshold import above_mean

ROOT = Path(__file__).parent / "vit_baselines" / "dino_p8"
INPUTS, WANTED = load_file(ROOT / "inputs.safetensors"), load_file(ROOT / "outputs.safetensors")
ABSOLUTE = 1e-5  # the judge's own, for every tensor
CASES = ("native", "wide", "crop", "resized", "pil")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    about = json.loads((ROOT / "config.json").read_text())["model"]
    sizes = {k: v for k, v in about.items() if k not in ("kind", "num_classes", "global_pool")}
    return write_vit(tmp_path_factory.mktemp("dino"), load_file(ROOT / "weights.safetensors"), classes=0, labels=(), **sizes)


def made(folder, shown, rule="dino"):
    """A backbone of the case's size that is handed the case's own tensor."""
    backbone = ViTBackbone(str(folder), "images", image_size=list(shown.shape[-2:]), position_resize=rule)
    backbone.images = lambda tasks: shown
    return backbone


def differs(name, got, key):
    off = float((got - WANTED[f"{name}.{key}"]).abs().max())
    print(f"dino {name} {key}: {off:.1e}")
    return off


@pytest.mark.parametrize("name", CASES)
def test_maps_and_masks_are_the_wrappers_on_any_grid(folder, name):
    shown = INPUTS[f"{name}.model_input"]
    backbone = made(folder, shown)
    assert differs(name, backbone.tower.positions[None], "pos_embed") <= ABSOLUTE
    maps = SelfAttention(backbone).saliency(batch(1, names=("a", "b"), labels=(1, 0)))[0]
    assert torch.allclose(maps, WANTED[f"{name}.cls_attn"].mean(0).expand_as(maps), atol=ABSOLUTE, rtol=0)
    enlarged = nearest_floor(maps.numpy(), tuple(shown.shape[-2:]))
    assert differs(name, torch.from_numpy(enlarged), "wrapper") <= ABSOLUTE
    masks = np.stack([above_mean(one) for one in enlarged])
    assert np.array_equal(masks, WANTED[f"{name}.mask"].numpy().astype(bool))


@pytest.mark.parametrize("name", CASES)
def test_the_class_tokens_row_sums_to_one_over_all_tokens(folder, name):
    """The last block's attention of the class token, as visualize_attention.py of facebookresearch/dino reads it."""
    shown = INPUTS[f"{name}.model_input"]
    backbone, last = made(folder, shown), 3
    normed = []
    with torch.no_grad(), TapSet(backbone.model) as taps:
        tap_normed(taps, backbone.tower, last, normed.append)
        backbone.run(shown, taps)
    whole = backbone.tower.attention(last, normed[0])
    assert differs(name, whole[0], "last_attn") <= ABSOLUTE
    row = backbone.tower.class_attention(last, normed[0])
    torch.testing.assert_close(row.sum(-1), torch.ones_like(row[..., 0]))
    torch.testing.assert_close(row, whole[:, :, 0])


def test_features_at_the_native_size_are_dinos_own(folder):
    backbone = made(folder, INPUTS["native.model_input"])
    with torch.no_grad():
        assert differs("native", backbone.run(INPUTS["native.image"]), "features") <= ABSOLUTE


def test_timms_own_resampling_would_be_seen(folder):
    shown = INPUTS["wide.model_input"]
    maps = SelfAttention(made(folder, shown, rule="timm")).saliency(batch(1, names=("a", "b"), labels=(1, 0)))[0, 0]
    wanted = WANTED["wide.cls_attn"].mean(0)
    assert float((maps - wanted).abs().max() / wanted.max()) > 0.01
