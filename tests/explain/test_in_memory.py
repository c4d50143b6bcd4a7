"""Models and pipelines in memory are read where they are, and give the maps of their checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from tiny import tiny_cogvideox, tiny_flux, tiny_sd3
from tiny_chat_models import flux2, qwen_image, saved, z_image
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

import conceptseg
from conceptseg import DAAM, ConceptAttention, MaskCLIP, TransInterp, load_extractor
from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.errors import ConfigError

SD = Path(__file__).parents[1] / "golden" / "daam" / "models_sd"
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
WORDS = ["kite", "boat"]


def test_a_flux_pipeline_is_read_without_a_second_copy(tmp_path):
    folder = tiny_flux(tmp_path, kl=True, clip=True)
    kinds = {
        "scheduler": FlowMatchEulerDiscreteScheduler, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
        "tokenizer": AutoTokenizer, "text_encoder_2": T5EncoderModel, "tokenizer_2": AutoTokenizer,
        "transformer": FluxTransformer2DModel,
    }  # fmt: skip
    pipe = FluxPipeline(**{name: kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items()})
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    method = ConceptAttention(pipe)
    assert method.backbone.transformer is pipe.transformer and method.backbone.vae is pipe.vae
    found = method.explain(IMAGE, WORDS, size=(32, 32))
    backbone = method.backbone
    other = ConceptAttention.from_pretrained(folder, text_tokens=backbone.text_tokens, image_size=32, resize=backbone.resize)
    torch.testing.assert_close(found.scores, other.explain(IMAGE, WORDS).scores, atol=1e-3, rtol=1e-3)
    assert method.explain(prompt="a kite", words=WORDS, steps=1, size=(32, 32)).image.shape == (32, 32, 3)
    assert all(weight.requires_grad for weight in pipe.transformer.parameters())  # left as it was
    pipe.transformer.train()
    with pytest.raises(ConfigError, match="training mode"):
        ConceptAttention(pipe)


SD3_PARTS = {
    "transformer": SD3Transformer2DModel, "scheduler": FlowMatchEulerDiscreteScheduler, "vae": AutoencoderKL,
    "text_encoder": CLIPTextModelWithProjection, "tokenizer": AutoTokenizer, "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer_2": AutoTokenizer, "text_encoder_3": T5EncoderModel, "tokenizer_3": AutoTokenizer,
}  # fmt: skip
VIDEO_PARTS = {
    "transformer": CogVideoXTransformer3DModel, "scheduler": CogVideoXDDIMScheduler, "vae": AutoencoderKLCogVideoX,
    "text_encoder": T5EncoderModel, "tokenizer": AutoTokenizer,
}  # fmt: skip


def read_in(kind, parts, folder):
    """A stock pipeline in float32, as somebody has it in memory."""
    found = {name: part.from_pretrained(folder, subfolder=name) for name, part in parts.items()}
    return kind(**{name: part.float() if isinstance(part, torch.nn.Module) else part for name, part in found.items()})


# Family -> pipeline in memory of a folder, the settings that tiny tokenizers ask for, and the padded length that is found.
FAMILIES = {
    "sd3": (lambda folder: read_in(StableDiffusion3Pipeline, SD3_PARTS, tiny_sd3(folder, kl=True)), {"clip_tokens": 12}, 12),
    "cogvideox": (lambda folder: read_in(CogVideoXPipeline, VIDEO_PARTS, tiny_cogvideox(folder)), {}, 8),
    "flux2": (lambda folder: saved(flux2, folder), {"text_tokens": 120, "concept_token": 118}, 512),
    "qwen_image": (lambda folder: saved(qwen_image, folder), {}, 512),
    "z_image": (lambda folder: saved(z_image, folder), {}, 512),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pipelines_of_every_family_give_the_maps_and_images_of_their_checkpoint(family, tmp_path):
    build, settings, tokens = FAMILIES[family]
    pipe = build(tmp_path)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    method = ConceptAttention(pipe)
    assert method.backbone.text_tokens == tokens and method.backbone.transformer is pipe.transformer
    for name, value in settings.items():
        setattr(method.backbone, name, value)
    told = {"image_size": 32, "resize": method.backbone.resize, "text_tokens": method.backbone.text_tokens, **settings}
    other = ConceptAttention.from_pretrained(str(tmp_path), **told)
    words = ["fish", "boat"]
    found, wanted = method.explain(IMAGE, words, size=(32, 32)), other.explain(IMAGE, words)
    assert wanted.scores.std() > 1e-3
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)
    made, wanted = (one.explain(prompt="a boat", words=words, steps=2, size=(32, 32)) for one in (method, other))
    assert np.abs(made.image.astype(int) - wanted.image).max() <= 1 and wanted.image.std() > 0
    torch.testing.assert_close(made.scores, wanted.scores, atol=1e-5, rtol=1e-5)
    pipe.scheduler = DDIMScheduler() if family == "cogvideox" else FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ConfigError, match=r"Set pipe.scheduler = (FlowMatchEuler|CogVideoXDDIM)"):
        ConceptAttention(pipe)


def test_a_stable_diffusion_pipeline_explains_images_and_what_it_makes():
    pipe = StableDiffusionPipeline.from_pretrained(SD, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    method = DAAM(pipe, map_side=16, exclude_factor=None)
    assert method.backbone.unet is pipe.unet
    assert method.explain(IMAGE, ["cat", "wombat"], size=(64, 64)).scores.shape == (2, 16, 16)
    made = method.explain(prompt="a cat and a wombat", words=["cat"], steps=2, size=(64, 64), guidance=1.0, seed=3)
    assert made.image.shape == (64, 64, 3) and made["cat"].shape == (16, 16)
    with pytest.raises(ConfigError, match=r"DAAM\(pipe\)"):
        DAAM.from_pretrained("lab:sd").explain(prompt="a kite", words=["kite"])


def test_encoders_in_memory_give_the_maps_of_their_checkpoint():
    clip = load_extractor("maskclip")
    assert isinstance(clip.backbone, CLIPBackbone)
    with pytest.raises(ConfigError, match="how images are normalised"):
        MaskCLIP((clip.backbone.clip, clip.backbone.tokenizer))
    clip.backbone.model.image_mean, clip.backbone.model.image_std = clip.backbone.native_normalisation
    held = MaskCLIP((clip.backbone.clip, clip.backbone.tokenizer)).explain(IMAGE, WORDS)
    torch.testing.assert_close(held.scores, clip.explain(IMAGE, WORDS).scores)
    vit = load_extractor("transinterp")
    vit.backbone.model.pretrained_cfg = {**vit.backbone.config["pretrained_cfg"], "label_names": list(vit.backbone.labels)}
    held = TransInterp(vit.backbone.model).explain(IMAGE, WORDS)
    torch.testing.assert_close(held.scores, vit.explain(IMAGE, WORDS).scores)


@pytest.mark.parametrize("given", ["lab_flux", object(), torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(given):
    with pytest.raises(ConfigError, match="wanted a"):
        ConceptAttention(given)
    with pytest.raises(ConfigError, match="backbone is a UNetBackbone, and ConceptAttention reads"):
        load_extractor("concept_attention", backbone="lab_sd")


def test_the_package_exports_what_its_documentation_imports():
    for name in conceptseg.__all__:
        assert callable(getattr(conceptseg, name)) or name == "__version__"
    assert set(conceptseg.__all__) <= set(dir(conceptseg))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        conceptseg.nothing  # noqa: B018


def test_a_list_of_images_is_explained_one_by_one_and_errors_name_arguments_of_python():
    method = load_extractor("naclip")
    both = method.explain([IMAGE, IMAGE[:16]], WORDS, progress=False)
    assert [one.image.shape[0] for one in both] == [32, 16]
    torch.testing.assert_close(both[1].scores, method.explain(IMAGE[:16], WORDS).scores)
    for call, said in (
        (lambda: load_extractor("naclap"), 'no method "naclap".*naclip'),
        (lambda: load_extractor("naclip", sigm=1), "sigm"),
        (lambda: load_extractor("concept_attention", noise="loud"), "^noise: unknown"),
        (lambda: ConceptAttention.from_pretrained("owner/name"), "^revision is empty"),
        (lambda: method.explain(IMAGE, WORDS, seed=1), "^explain: seed=1 would change nothing"),
        (lambda: method.explain(IMAGE, WORDS, size=(8, 8)), "^explain: size="),
        (lambda: method.explain(IMAGE, WORDS, caption="a kite"), "^explain: caption="),
        (lambda: method.explain(prompt="a kite", words=WORDS), "makes none"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()


def test_results_are_masks_overlays_and_pictures(tmp_path):
    found = load_extractor("naclip").explain(IMAGE, WORDS, background=["grass"])
    masks = [found.mask(word) for word in WORDS]
    assert masks[0].shape == (32, 32) and masks[0].dtype == bool and not (masks[0] & masks[1]).any()
    assert found.mask("kite", "otsu").any() and found.others.shape[0] == 1
    assert set(found.maps) == set(WORDS) and found.at_image_size()["kite"].shape == (32, 32)
    assert found.overlay("kite").size == (32, 32) and found.overlay().width > 200
    assert found._repr_png_().startswith(b"\x89PNG") and "kite" in repr(found)
    own_scale = load_extractor("legrad").explain(IMAGE, WORDS)
    assert own_scale.mask("kite").any()
    with pytest.raises(ConfigError, match="every word has a scale of its own"):
        own_scale.mask("kite", "argmax")
    with pytest.raises(ConfigError, match="no other word competes"):
        load_extractor("legrad").explain(IMAGE, WORDS, background=["grass"])
