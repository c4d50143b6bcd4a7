"""Maps while an image is made: the image is the stock pipeline's, and the maps are those of its steps."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from tiny import tiny_flux, tiny_sd3

from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Softmax, View

CAPTIONS, WORDS = ["a fish on grass", "a boat"], [["fish", "grass"], ["boat", "fish"]]
SIZE = (24, 32)
VIEW = View("output", (0, 1, 2), (0.5,), softmax=Softmax.PER_CELL)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # the pipelines tell the model 1000·t / 1000, which is not t to the last bit


def settings(**more):
    return {"image_size": 32, "text_tokens": 8, **more}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "shifted"])
def flux_folder(request, tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"), shifted=request.param, kl=True)


@pytest.fixture(scope="module")
def sd3_folder(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("sd3"), kl=True)


def starts(seed):
    shape = (12, SIZE[0] // 2, SIZE[1] // 2)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + b)) for b in range(2)])


def stock(kind, transformer, folder, **parts):
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        transformer=transformer.from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32), **parts,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_flux_makes_the_stock_pipelines_image(flux_folder):
    backbone = FluxBackbone(flux_folder, **settings())
    images, (maps,) = ConceptAttention(backbone, seed=3).generate(CAPTIONS, WORDS, [VIEW], steps=3, size=SIZE)
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    prompts = backbone.generation_prompts(CAPTIONS)
    latents = torch.nn.functional.pixel_unshuffle(starts(3), 2).flatten(2).transpose(1, 2)  # "c (h a) (w b) -> (h w) (c a b)"
    wanted = stock(FluxPipeline, FluxTransformer2DModel, flux_folder, **none)(
        prompt_embeds=prompts.hidden, pooled_prompt_embeds=torch.zeros(2, 8), latents=latents, height=SIZE[0], width=SIZE[1],
        num_inference_steps=3, guidance_scale=0.0, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images, wanted, **CLOSE)
    assert maps.scores.shape == (2, 2, 6, 8) and backbone.forward_passes == 3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd3_makes_the_stock_pipelines_image_with_and_without_guidance(sd3_folder, guidance):
    backbone = SD3Backbone(sd3_folder, **settings(text_tokens=12, clip_tokens=12))
    extractor = ConceptAttention(backbone, seed=3)
    images, (maps,) = extractor.generate(CAPTIONS, WORDS, [VIEW], steps=3, size=SIZE, guidance=guidance, negative="sand")
    none = dict.fromkeys(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    prompts, against = backbone.prompts(CAPTIONS), backbone.prompts(["sand", "sand"])
    wanted = stock(StableDiffusion3Pipeline, SD3Transformer2DModel, sd3_folder, **none)(
        prompt_embeds=prompts.hidden, pooled_prompt_embeds=prompts.pooled, negative_prompt_embeds=against.hidden,
        negative_pooled_prompt_embeds=against.pooled, latents=starts(3), height=SIZE[0], width=SIZE[1],
        num_inference_steps=3, guidance_scale=guidance, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images, wanted, **CLOSE)
    assert maps.scores.shape == (2, 2, 6, 8) and backbone.forward_passes == 3


def test_asking_for_concepts_changes_no_pixel(flux_folder, sd3_folder):
    flux = FluxBackbone(flux_folder, **settings())
    sd3 = SD3Backbone(sd3_folder, **settings(text_tokens=12, clip_tokens=12))
    for backbone, guidance in ((flux, 0.0), (sd3, 3.0)):
        images = [
            ConceptAttention(backbone).generate(CAPTIONS, words, [VIEW], 2, SIZE, guidance)[0]
            for words in (WORDS, [["sand", "tree", "sun"], ["kite", "boat", "fish"]])
        ]
        assert torch.equal(*images)


def test_with_guidance_the_maps_are_those_of_the_captions_half(sd3_folder):
    """At the first step both halves see the same noise: its maps are then those without guidance."""
    extractor = ConceptAttention(SD3Backbone(sd3_folder, **settings(text_tokens=12, clip_tokens=12)))
    (one,), (two,) = (
        extractor.generate(CAPTIONS, WORDS, [VIEW], steps=3, size=SIZE, guidance=g, negative="sand", read_steps=[0])[1]
        for g in (1.0, 4.0)
    )
    torch.testing.assert_close(one.scores, two.scores, atol=1e-6, rtol=1e-5)


def test_maps_of_several_steps_are_the_mean_of_each_steps(flux_folder):
    extractor = ConceptAttention(FluxBackbone(flux_folder, **settings()))
    each = [extractor.generate(CAPTIONS, WORDS, [VIEW], 3, SIZE, read_steps=[k])[1][0].scores for k in range(3)]
    (all_steps,) = extractor.generate(CAPTIONS, WORDS, [VIEW], 3, SIZE)[1]
    (last,) = extractor.generate(CAPTIONS, WORDS, [VIEW], 3, SIZE, read_steps=[-1])[1]
    torch.testing.assert_close(all_steps.scores, torch.stack(each).mean(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(last.scores, each[2]) and not torch.allclose(each[0], each[2])


def test_a_size_that_tokens_do_not_tile_is_refused_with_the_nearest(flux_folder):
    extractor = ConceptAttention(FluxBackbone(flux_folder, **settings()))
    with pytest.raises(ConfigError, match=r"image_size is 30; .* multiple of 4 is wanted, for example 32"):
        extractor.generate(CAPTIONS, WORDS, [VIEW], 2, (32, 30))


def test_the_captions_clip_vector_is_used_where_the_checkpoint_has_a_clip(tmp_path):
    backbone = FluxBackbone(tiny_flux(tmp_path, clip=True), **settings())
    vectors = backbone.generation_prompts(CAPTIONS).pooled
    ids = backbone.clip_tokenizer(CAPTIONS, padding="max_length", max_length=8, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(vectors, backbone.clip(input_ids=ids).pooler_output)
    assert backbone.prompts(CAPTIONS).pooled is None  # when real images are read, zeros, as released
    asked = FluxBackbone(backbone.checkpoint.path, pooled="caption", **settings())
    np.testing.assert_array_equal(asked.prompts(CAPTIONS).pooled, vectors)
    assert asked.identity() != backbone.identity()


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_an_image_is_encoded_as_the_stock_pipelines_encode_it(kind, tmp_path):
    """Scaled to -1..1, encoded, shifted and scaled; images() is the way back, without loss where the codec is the exact one."""
    family, tiny = {"flux": (FluxBackbone, tiny_flux), "sd3": (SD3Backbone, tiny_sd3)}[kind]
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    backbone = family(tiny(tmp_path / "kl", kl=True), **settings())
    vae = AutoencoderKL.from_pretrained(tmp_path / "kl", subfolder="vae").eval()
    with torch.inference_mode():
        encoded = vae.encode(VaeImageProcessor().normalize(images)).latent_dist.mean
    wanted = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(backbone.latents(images), wanted, **CLOSE)
    exact = family(tiny(tmp_path / "exact"), **settings())
    torch.testing.assert_close(exact.images(exact.latents(images)), images, **CLOSE)
