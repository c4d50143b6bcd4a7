"""Weights of 16 bits on a processor without instructions for them: float32 arithmetic, the same weights, another run id."""

import logging

import pytest
import torch
from tiny import tiny_flux
from torch import nn

from conceptseg.backbones.casting import cast_while_running, fast_dtype
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import View

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    tiny_flux(path)
    return str(path)


def capable(monkeypatch, **instructions):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **instructions})


def maps_of(backbone):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts, concepts = backbone.prompts(["a fish"]), backbone.concepts([["fish", "sky", "sand"]])
    view = View("output", (0, 1), (0.5,))
    return ConceptAttention(backbone).read_cells(backbone.latents(images), prompts, concepts, ["a"], [view]).read(view, (8, 8))


def test_the_dtype_follows_what_the_processor_computes_fast(monkeypatch):
    capable(monkeypatch, avx2=True, avx512_bf16=False)
    assert [fast_dtype(one, CPU) for one in (torch.bfloat16, torch.float16, torch.float64)] == [
        torch.float32, torch.float32, torch.float64,
    ]  # fmt: skip
    assert fast_dtype(torch.bfloat16, torch.device("meta")) == torch.bfloat16
    capable(monkeypatch, avx512_bf16=True)
    assert [fast_dtype(one, CPU) for one in (torch.bfloat16, torch.float16)] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("load", ["whole", "encode_only"])
def test_maps_are_those_of_the_same_weights_cast_as_a_whole(folder, load, monkeypatch, caplog):
    capable(monkeypatch)
    settings = {"dtype": "bfloat16", "load": load, "image_size": 32, "text_tokens": 8}
    backbone = FluxBackbone(folder, **settings)
    with caplog.at_level(logging.WARNING):
        found = maps_of(backbone)
    assert sum("no instructions for bfloat16" in line for line in caplog.messages) == 1
    stored = {weight.dtype for block in backbone.transformer.transformer_blocks for weight in block.parameters()}
    assert stored == {torch.bfloat16} == {w.dtype for w in backbone.text_encoder.encoder.block.parameters()}

    whole = FluxBackbone(folder, compute_dtype="float32", **settings)
    monkeypatch.setattr(whole, "computing", lambda model: model.float())
    assert torch.equal(found, maps_of(whole)) and found.dtype == torch.float32

    capable(monkeypatch, avx512_bf16=True)
    sixteen = FluxBackbone(folder, **settings)
    assert sixteen.dtype == torch.bfloat16 and "compute_dtype" not in sixteen.identity()
    assert {**sixteen.identity(), "compute_dtype": "torch.float32"} == backbone.identity() == whole.identity()
    assert backbone.text_identity() != sixteen.text_identity()


def test_rounded_weights_compute_in_float32_too(folder, monkeypatch):
    capable(monkeypatch)
    settings = {"dtype": "bfloat16", "load": "encode_only", "image_size": 32, "text_tokens": 8}
    full, rounded = (maps_of(FluxBackbone(folder, weights=weights, **settings)) for weights in ("full", "int8"))
    assert rounded.dtype == torch.float32
    assert 0 < (full - rounded).abs().max() < 0.05 * full.abs().max()


def test_a_pass_that_ends_inside_of_a_block_leaves_the_weights_as_they_are_stored():
    class Ended(Exception):
        pass

    def end(module, args):
        raise Ended

    model = nn.Module()
    model.table = nn.Embedding(4, 4)
    model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
    model = cast_while_running(model.to(torch.bfloat16), torch.float32)
    before = [weight.data_ptr() for weight in model.parameters()]
    model.blocks[0][1].register_forward_pre_hook(end)
    with torch.inference_mode(), pytest.raises(Ended):
        model.blocks[0](model.table(torch.tensor([1])))
    assert [weight.data_ptr() for weight in model.parameters()] == before
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
