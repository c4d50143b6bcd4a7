"""The lab's trainer at toy size: seeded, resumable, and what it writes is read like a real checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conceptseg.backbones.flux import FluxBackbone
from conceptseg.errors import ConfigError
from conceptseg.lab.recipes import load_recipe
from conceptseg.lab.train import train, train_and_write

TOY = [
    "steps=4", "batch=2", "swap_batch=2", "scenes=6", "compile=false", "checkpoint_every=1", "warmup=1",
    "phases=[{from: 2, ask: lists, swap_weight: 0.5}]", "sizes.double_blocks=2", "sizes.single_blocks=0", "sizes.heads=2",
    "sizes.head_width=8", "sizes.rope=[4,2,2]", "sizes.text_width=16", "sizes.text_layers=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished toy training."""
    work = tmp_path_factory.mktemp("whole")
    folder = train_and_write(load_recipe("flux", TOY), work)
    assert folder is not None
    return work, folder


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(whole, tmp_path):
    assert train_and_write(load_recipe("flux", TOY), tmp_path, stop_after=2) is None
    train(load_recipe("flux", TOY), tmp_path)
    one, two = load_file(whole[0] / "checkpoint.safetensors"), load_file(tmp_path / "checkpoint.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)


def test_the_card_says_what_was_done(whole):
    card = json.loads((whole[1] / "card.json").read_text())
    assert card["provenance"] == "lab" and card["steps"] == 4 and card["seed"] == 0
    assert "apple" in card["trained_words"] and card["recipe"]["scenes"] == 6 and card["losses"]
    assert "never the papers' claims" in (whole[1] / "README.md").read_text()


def test_the_written_model_is_read_like_a_real_checkpoint(whole):
    backbone = FluxBackbone(str(whole[1]), image_size=64, resize="bicubic", text_tokens=16)
    assert backbone.provenance == "lab" and backbone.layers == (0, 1)
    latents = backbone.latents(torch.rand(1, 3, 64, 64))
    assert latents.shape == (1, 12, 32, 32)
    assert backbone.concepts([["apple", "grass"]]).shape == (1, 2, 16)
    velocity = backbone.denoise(latents, 0.5, backbone.text(["a apple"]), backbone.zero_pooled(1))
    assert velocity is not None and velocity.shape == (1, 256, 48) and torch.isfinite(velocity).all()


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "flux"'):
        load_recipe("fluks")


def test_a_misspelt_recipe_setting_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "steps"'):
        load_recipe("flux", ["stpes=3"])
