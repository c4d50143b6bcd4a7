"""Pipelines that were compiled, quantised, offloaded or adapted: the maps of the plain one, or a refusal by name."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from tiny import tiny_flux
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from conceptseg import DAAM, OVAM, ConceptAttention
from conceptseg.errors import ConceptSegError, ConfigError, DataError
from conceptseg.trace import trace

SD = Path(__file__).parents[1] / "golden" / "daam" / "models_sd"
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
KINDS = {
    "scheduler": FlowMatchEulerDiscreteScheduler, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
    "tokenizer": AutoTokenizer, "text_encoder_2": T5EncoderModel, "tokenizer_2": AutoTokenizer,
    "transformer": FluxTransformer2DModel,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"), kl=True, clip=True)


@cache
def loaded(read, folder):
    if read is concepts:
        pipe = FluxPipeline(**{name: kind.from_pretrained(folder, subfolder=name) for name, kind in KINDS.items()})
    else:
        pipe = StableDiffusionPipeline.from_pretrained(SD, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in modules_of(pipe):
        part.eval()
    return pipe


def made(read, folder):
    """A pipeline of the test's own, to change: a copy of the one that was loaded."""
    return deepcopy(loaded(read, folder))


def concepts(pipe):
    """Maps of ConceptAttention(pipe)."""
    return ConceptAttention(pipe).explain(IMAGE, ["kite", "boat"], size=(32, 32)).scores


def traced(pipe, **more):
    """The map that a trace of the pipeline collects."""
    with trace(pipe, map_side=16, exclude_factor=None) as tr:
        start = torch.Generator().manual_seed(0)
        pipe("a cat and a wombat", height=64, width=64, num_inference_steps=2, generator=start, output_type="np", **more)
    return tr.word_map("wombat").values


@pytest.fixture(scope="module")
def plain(folder):
    return {read: read(made(read, folder)) for read in (concepts, traced)}


def modules_of(pipe):
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def core_name(pipe):
    return "unet" if "unet" in pipe.components else "transformer"


def core_of(pipe):
    return getattr(pipe, core_name(pipe))


def wrapped_by_compile(pipe):
    setattr(pipe, core_name(pipe), torch.compile(core_of(pipe), backend="eager"))


def compiled_in_place(pipe):
    core_of(pipe).compile(backend="eager")


def compiled_by_block(pipe):
    core_of(pipe).compile_repeated_blocks(backend="eager")


def fused(pipe):
    core_of(pipe).fuse_qkv_projections()


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    """As enable_sequential_cpu_offload does, which can't run where the CPU itself computes."""
    for part in modules_of(pipe):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)


def group_offload(pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def device_map(pipe):
    dispatch_model(core_of(pipe), {"": "cpu"}, force_hooks=True)


def int8(pipe):
    quantize_(core_of(pipe), Int8WeightOnlyConfig())


def attention_slicing(pipe):
    pipe.enable_attention_slicing()


def attention_of(pipe):
    core = core_of(pipe)
    return core.transformer_blocks[0].attn if core_name(pipe) == "transformer" else (
        core.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    )  # fmt: skip


class LoRA(nn.Module):
    """A linear layer and what a low-rank adapter adds to it, built as PEFT builds it."""

    def __init__(self, base_layer, scale):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base_layer = base_layer
        self.down = nn.Parameter(scale * torch.randn(2, base_layer.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base_layer.out_features, 2, generator=generator))

    def forward(self, x):
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def lora(pipe, scale=0.0):
    attention_of(pipe).to_q = LoRA(attention_of(pipe).to_q, scale).eval()


EXACT, CLOSE = 1e-6, 2e-2
"""Share of the greatest value by which maps may differ."""
RIGHT = [
    (model_offload, EXACT), (sequential_offload, EXACT), (group_offload, EXACT), (device_map, EXACT), (attention_slicing, 1e-5),
    (int8, CLOSE), (lora, EXACT),
]  # fmt: skip
REFUSED = [
    (wrapped_by_compile, "torch.compile", (concepts, traced)), (compiled_in_place, "torch.compile", (traced,)),
    (compiled_by_block, "torch.compile", (traced,)), (fused, "unfuse_qkv_projections", (concepts, traced)),
]  # fmt: skip


def differs(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize(("change", "tolerance"), RIGHT, ids=[change.__name__ for change, _ in RIGHT])
def test_maps_are_those_of_the_plain_pipeline(folder, plain, change, tolerance):
    for read in (concepts, traced):
        pipe = made(read, folder)
        change(pipe)
        assert differs(read(pipe), plain[read]) <= tolerance, read.__name__


def test_concepts_are_read_in_a_transformer_with_a_block_that_is_compiled_in_place(folder, plain):
    """As compile_repeated_blocks compiles every block; each takes seconds."""
    pipe = made(concepts, folder)
    core_of(pipe).transformer_blocks[1].compile(backend="eager")
    assert differs(concepts(pipe), plain[concepts]) <= EXACT


@pytest.mark.parametrize(("change", "name", "reads"), REFUSED, ids=[change.__name__ for change, _, _ in REFUSED])
def test_what_would_give_other_maps_is_refused_by_name(folder, change, name, reads):
    for read in reads:
        pipe = made(read, folder)
        change(pipe)
        with pytest.raises(ConceptSegError, match=name):
            read(pipe)


def test_a_lora_that_is_loaded_is_in_the_maps_as_if_it_were_merged(folder, plain):
    for read in (concepts, traced):
        pipe = made(read, folder)
        lora(pipe, 0.5)
        adapted = read(pipe)
        assert differs(adapted, plain[read]) > 1e-3, read.__name__
        with torch.no_grad():
            layer = attention_of(pipe).to_q
            layer.base_layer.weight += layer.up @ layer.down
            attention_of(pipe).to_q = layer.base_layer
        assert differs(read(pipe), adapted) <= 1e-4, read.__name__


def load_ip_adapter(unet):
    """Random weights of an IP-Adapter of one token in every cross-attention, as a checkpoint brings them."""
    width, crosses = unet.config.cross_attention_dim, {}
    generator = torch.Generator().manual_seed(0)
    number = 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            out = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for kind in ("k", "v"):
                crosses[f"{number}.to_{kind}_ip.weight"] = torch.randn(out, width, generator=generator)
            number += 2
    image = {
        "proj.weight": torch.randn(4 * width, 8, generator=generator), "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": crosses}])


def test_the_words_map_is_read_beside_an_ip_adapter(folder, plain):
    """At scale 0 the picture that is shown changes nothing, so the maps are the plain ones; at scale 1 they are others."""
    pipe = made(traced, folder)
    load_ip_adapter(pipe.unet)
    shown = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))
    found = {}
    for scale in (0.0, 1.0):
        pipe.set_ip_adapter_scale(scale)
        found[scale] = traced(pipe, ip_adapter_image_embeds=[shown])
    assert differs(found[0.0], plain[traced]) <= 1e-4 < 1e-3 < differs(found[1.0], plain[traced])


def test_images_are_not_read_while_an_ip_adapter_waits_for_a_picture(folder, plain):
    """Also one that was loaded after the method was made; without it the maps are the plain ones again."""
    pipe = made(traced, folder)
    methods = [kind(pipe) for kind in (DAAM, OVAM)]
    load_ip_adapter(pipe.unet)
    for method in methods:
        with pytest.raises(ConfigError, match=r"IP-Adapter.*unload_ip_adapter"):
            method.explain(IMAGE, ["cat"], size=(64, 64))
    flux = made(concepts, folder)
    method, block = ConceptAttention(flux), flux.transformer.transformer_blocks[0]
    stock = block.attn.processor
    block.attn.set_processor(FluxIPAdapterAttnProcessor(24, 16))
    with pytest.raises(ConfigError, match=r"IP-Adapter.*unload_ip_adapter"):
        method.explain(IMAGE, ["kite", "boat"], size=(32, 32))
    block.attn.set_processor(stock)
    assert differs(concepts(flux), plain[concepts]) <= EXACT


# ---------------------------------------------------------------- textual inversion


def vectors_of(encoder, tokenizer, words):
    """[n d]: input embeddings of words of one token."""
    return encoder.get_input_embeddings().weight.detach()[tokenizer.convert_tokens_to_ids(words)].clone()


def test_a_textual_inversion_is_read_as_the_words_whose_vectors_it_has(folder):
    """In a Flux its words are read by the T5; in a U-Net by CLIP."""
    sd, flux = made(traced, folder), made(concepts, folder)
    for pipe, places, names, shown, kind in (
        (sd, {"tokenizer": "text_encoder"}, ["cat</w>", "dog</w>"], (64, 64), DAAM),
        (flux, {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}, ["kite", "boat"], (32, 32), ConceptAttention),
    ):
        words = [name.removesuffix("</w>") for name in names]
        for read, encodes in places.items():
            tokenizer, encoder = getattr(pipe, read), getattr(pipe, encodes)
            if read == "tokenizer_2":  # so far CLIP alone knows it
                with pytest.raises(DataError, match=f'"<one>" is not in {read}'):
                    kind(pipe).explain(IMAGE, ["<one>", "boat"], size=shown)
            found = vectors_of(encoder, tokenizer, names)
            pipe.load_textual_inversion(found[:1], token="<one>", tokenizer=tokenizer, text_encoder=encoder)
            pipe.load_textual_inversion(found, token="<two>", tokenizer=tokenizer, text_encoder=encoder)
        method, told = kind(pipe), {"size": shown}
        if kind is ConceptAttention:
            method.backbone.concept_pooling, told["caption"] = "mean", "a sky"
        wanted = method.explain(IMAGE, [*words, " ".join(words)], **told).scores
        assert differs(wanted[0], wanted[2]) > 1e-3
        # The tiny T5's tokenizer drops all signs, so that "<two>_1" can't be written for it.
        both = "<two> <two>_1" if kind is DAAM else " ".join(words)
        said = method.explain(IMAGE, ["<one>", words[1], both], **told).scores
        assert differs(said, wanted) <= 1e-5, kind
        with pytest.raises(DataError, match=r'"<two>" has 2 vectors.*Write all of them: "<two> <two>_1"'):
            method.explain(IMAGE, ["<two>", words[0]], **told)
