"""Weights in eight bits: close to the full ones, half their bytes, rows of their own, and said so when the package is absent."""

import sys

import pytest
import torch
from test_encode_only import SCHNELL
from tiny import tiny_flux, tiny_sd3

from conceptseg.backbones.transformers.encode_only import planned_bytes
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.quantized_weights import stored_bytes
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Normalize, Softmax, View

VIEWS = [
    View(space, (0, 1, 2), (0.5,), normalize=Normalize.LINEAR, softmax=Softmax.PER_CELL) for space in ("output", "cross", "value")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {"flux": tiny_flux(tmp_path_factory.mktemp("flux")), "sd3": tiny_sd3(tmp_path_factory.mktemp("sd3"))}


def read(folders, kind, **settings):
    if kind == "flux":
        backbone = FluxBackbone(folders["flux"], image_size=32, text_tokens=8, **settings)
    else:
        backbone = SD3Backbone(folders["sd3"], image_size=32, text_tokens=12, clip_tokens=12, **settings)
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    prompts, concepts = backbone.prompts(["a fish", "a boat"]), backbone.concepts([["fish", "sky", "sand"]] * 2)
    latents = backbone.latents(images)
    cells = ConceptAttention(backbone).read_cells(latents, prompts, concepts, ["a", "b"], VIEWS)
    return [cells.read(view, backbone.grid(latents)) for view in VIEWS], backbone


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_maps_stay_close_to_those_of_full_weights_and_are_not_the_same(folders, kind):
    """Probabilities through three random blocks, rounded to 1 part in 254 of each row's largest weight: 0.02 apart at most."""
    full, _ = read(folders, kind)
    rounded, backbone = read(folders, kind, weights="int8")
    for one, two in zip(full, rounded, strict=True):
        assert 1e-5 < (one - two).abs().max() < 0.02
        assert one.std() > 0.02  # maps that say nothing would agree too
    block = backbone.transformer.transformer_blocks[1]
    for matrix in (block.attn.to_q, block.attn.add_k_proj, block.ff.net[2]):
        rows, columns = matrix.weight.shape
        assert stored_bytes(matrix.weight) == rows * columns + rows * 5  # a float32 scale and an int8 zero point a row
    assert stored_bytes(block.norm1.linear.weight) == 4 * block.norm1.linear.weight.numel()


def test_the_cut_model_rounds_as_the_whole_one_does_to_the_last_bit(folders):
    whole, _ = read(folders, "flux", weights="int8")
    cut, _ = read(folders, "flux", weights="int8", load="encode_only")
    assert all(torch.equal(one, two) for one, two in zip(whole, cut, strict=True))


def test_rounded_weights_have_rows_of_their_own(folders):
    full, rounded = (FluxBackbone(folders["flux"], weights=weights) for weights in ("full", "int8"))
    assert rounded.identity() == {**full.identity(), "weights": "int8"}
    assert rounded.text_identity() == full.text_identity()  # texts are encoded alike
    with pytest.raises(ConfigError, match=r'extractor\.backbone\.weights: unknown "int4"'):
        FluxBackbone(folders["flux"], weights="int4")


def test_reading_flux_in_eight_bits_takes_at_most_four_and_a_quarter_gigabytes_of_weights():
    """Blocks 0 to 17 of FLUX.1 with scales, embeddings and constants; 7.9 GB in bfloat16."""
    planned = planned_bytes(SCHNELL, 17, torch.bfloat16, weights="int8")
    print(f"\nplanned for FLUX.1 schnell, blocks 0-17, int8: {planned / 1e9:.2f} GB")
    assert 3.5e9 < planned <= 4.25e9


def test_without_torchao_it_is_said_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"pip install 'conceptseg\[int8\]', or use extractor\.backbone\.weights=full\."):
        read(folders, "flux", weights="int8")
