"""ViTs of transformers, read as timm's: the stock model's numbers, at its own size and at a larger one."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import batch, randomised, tiny_vit
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from conceptseg.backbones.encoders.tower import tap_normed
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import TapError
from conceptseg.extractors.transinterp import TransInterp

SIZES = {
    "image_size": 24, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 48, "layer_norm_eps": 1e-3,
}  # fmt: skip
LABELS = {0: "apple", 1: "kite", 2: "boat"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model = randomised(ViTForImageClassification(ViTConfig(**SIZES, id2label=LABELS, label2id={})), 0).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3}))
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return folder, model


def backbone(folder, **settings):
    return ViTBackbone(str(folder), "class labels", **settings)


def test_logits_labels_and_normalisation_are_those_of_transformers(stock):
    folder, model = stock
    ours, shown = backbone(folder), batch(2)
    images = ours.images(shown.tasks)
    torch.testing.assert_close(ours.model(images), model(images).logits, atol=1e-5, rtol=1e-5)
    assert ours.native_labels == ["apple", "kite", "boat"] and ours.native_size == (24, 24)
    torch.testing.assert_close(ours.black(images), torch.full_like(images, -0.4 / 0.3))
    assert not torch.allclose(tiny_vit(folder / "other").model(images)[:, :3], model(images).logits)


def test_position_rows_are_interpolated_for_another_size(stock):
    folder, model = stock
    ours, shown = backbone(folder, image_size=48), batch(1, side=48)
    images = ours.images(shown.tasks)
    assert ours.tower.grid == (6, 6)
    ours.model.pos_embed.data[:, 1:] = 0
    positions = model.vit.embeddings.position_embeddings
    kept = positions.data.clone()
    positions.data[:, 1:] = 0  # so that the two rules of interpolation agree
    found = model(images, interpolate_pos_encoding=True).logits
    positions.data.copy_(kept)
    torch.testing.assert_close(ours.model(images), found, atol=1e-5, rtol=1e-5)
    assert backbone(folder, image_size=384).tower.grid == (48, 48)


def test_methods_on_it_see_the_attention_of_the_stock_model(stock):
    folder, _ = stock
    ours, shown = backbone(folder, dtype="float64"), batch(2)
    double = ViTForImageClassification.from_pretrained(folder, attn_implementation="eager").double().eval()
    images = ours.images(shown.tasks)
    normed = {}
    with TapSet(ours.model) as taps:
        for layer in range(3):
            tap_normed(taps, ours.tower, layer, partial(normed.__setitem__, layer))
        ours.run(images, taps)
    for layer, matrix in enumerate(double(images, output_attentions=True).attentions):
        torch.testing.assert_close(ours.tower.attention(layer, normed[layer]), matrix)
    assert TransInterp(ours).saliency(shown).isfinite().all()


def test_a_model_without_a_classifier_and_without_its_prefix_is_read(stock, tmp_path):
    model = randomised(ViTModel(ViTConfig(**SIZES)), 1).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"provenance": "random"}))
    ours = backbone(tmp_path)
    images = ours.images(batch(1).tasks)
    torch.testing.assert_close(ours.model(images), model(images).last_hidden_state[:, 0], atol=1e-5, rtol=1e-5)


def test_a_folder_is_known_by_its_layout_and_keeps_a_classifier_of_unnamed_labels(tmp_path):
    model = randomised(ViTForImageClassification(ViTConfig(**SIZES)), 2).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps({"provenance": "random"}))
    method = TransInterp.from_pretrained(str(tmp_path))
    images = method.backbone.images(batch(1).tasks)
    torch.testing.assert_close(method.backbone.model(images), model.double()(images).logits, atol=1e-5, rtol=1e-5)
    assert method.trained_on == "class labels" and method.backbone.labels == ("LABEL_0", "LABEL_1")


def test_another_type_of_model_is_refused_by_name(stock, tmp_path):
    folder, _ = stock
    about = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "model_type": "swin"}))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(TapError, match='model_type "swin"'):
        backbone(tmp_path).config  # noqa: B018 - reading it is what is tested
