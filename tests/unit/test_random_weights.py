"""Randomised weights: which tensors are drawn, what they keep, and that the setting names the run and its provenance."""

import numpy as np
import pytest
import torch
from torch import nn

from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.backbones.random_weights import RandomWeights
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import Rows
from conceptseg.report.columns import Value
from conceptseg.tables.sheet import Against
from conceptseg.tables.table import differences

LAB = {
    "flux": (FluxBackbone, "transformer", {"image_size": 32}, "single_transformer_blocks.0."),
    "sd3": (SD3Backbone, "transformer", {"image_size": 32}, "transformer_blocks.3."),
    "sd": (UNetBackbone, "unet", {"image_size": 32}, "up_blocks."),
    "clip": (CLIPBackbone, "clip", {"trained_on": "class labels"}, "visual.transformer.resblocks.3."),
    "vit": (ViTBackbone, "model", {"trained_on": "class labels"}, "blocks.3."),
}


def weights(name, **settings):
    kind, part, own, _ = LAB[name]
    backbone = kind(f"lab:{name}", **own, **settings)
    return backbone, {k: v.clone() for k, v in getattr(backbone, part).named_parameters()}


@pytest.mark.parametrize("name", LAB)
def test_a_lab_model_draws_the_weights_that_are_asked_for(name):
    plain, trained = weights(name)
    whole, drawn = weights(name, randomise={"seed": 0})
    last, partly = weights(name, randomise={"seed": 0, "from_block": -1})
    moved = {k for k in trained if not torch.equal(partly[k], trained[k])}
    assert moved and all(k.startswith(LAB[name][3]) for k in moved)
    assert all(torch.equal(partly[k], drawn[k]) for k in moved)
    large = [k for k, v in trained.items() if v.numel() > 1000]
    assert large
    for k in large:
        assert abs(np.corrcoef(trained[k].flatten(), drawn[k].flatten())[0, 1]) < 0.2, k
        assert float(drawn[k].std()) == pytest.approx(float(trained[k].std()), rel=0.15, abs=1e-6), k
    assert (plain.provenance, whole.provenance, last.provenance) == ("lab", "random", "random")
    assert "random" not in plain.identity() and whole.identity()["random"] == {"seed": 0, "from_block": None}
    assert {k: v for k, v in whole.identity().items() if k != "random"} == plain.identity()


def test_a_wrong_setting_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    with pytest.raises(ConfigError, match=r"from_block is 2, but Two has 2 blocks.*Choose -2 to 1"):
        RandomWeights(0, 2).draw(Two())
    RandomWeights(0, -2).draw(Two())
    with pytest.raises(ConfigError, match="from_block is -3"):
        RandomWeights(0, -3).draw(Two())
    with pytest.raises(ConfigError, match="Set it to null"):
        RandomWeights(0, 0).draw(nn.Linear(2, 2))
    for wrong in (0, True, "0", {}, {"seed": -1}, {"seed": True}, {"seed": 0, "from_block": "last"}, {"seed": 0, "block": 1}):
        with pytest.raises(ConfigError, match=r"extractor\.backbone\.randomise is"):
            RandomWeights.of(wrong)


def rows(precisions):
    return Rows.from_records(
        {
            "sample": f"s/{i:02d}", "view": "v", "segmenter": "m", "status": "ok", "classes": [0, 1], "inter": [1, 1],
            "label": [1, 1], "pred": [1, 1], "pred_void": [0, 0], "valid": 2, "void": 0, "correct": 2, "ap": {"foreground": p},
        }
        for i, p in enumerate(precisions)
    )  # fmt: skip


def test_a_row_that_does_not_fall_is_marked():
    trained = np.linspace(0.4, 0.8, 16)
    held = {"trained": rows(trained), "falls": rows(trained - 0.2), "stands": rows(trained[::-1])}
    report = {"draw": "images", "resamples": 500, "level": 0.95}
    for falls, marks in ((True, {"falls": "", "stands": "†"}), (False, {"falls": "", "stands": ""})):
        found = differences(held, Against("trained", "ap_image", falls), report)
        values = {name: value for name, by_column in found.items() for value in by_column.values()}
        assert all(isinstance(value, Value) for value in values.values())
        assert {name: value.mark for name, value in values.items()} == marks
