"""FLUX.2, Qwen-, LongCat-, Ovis- and Z-Image from tiny repositories: texts, concept tokens and images as stock pipelines'."""

import logging
from functools import cache

import pytest
import torch
from tiny_chat_models import flux2, flux2_klein, longcat_image, ovis_image, qwen_image, saved, z_image

from conceptseg.backbones.in_memory import backbone_from
from conceptseg.backbones.sheets import backbone_of
from conceptseg.backbones.transformers.flux2 import Flux2Backbone, Flux2KleinBackbone
from conceptseg.backbones.transformers.flux_relatives import LongCatImageBackbone, OvisImageBackbone
from conceptseg.backbones.transformers.qwen_image import QwenImageBackbone
from conceptseg.backbones.transformers.z_image import ZImageBackbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Softmax, View

CAPTIONS, CONCEPTS = ["a dragon on the rock", "a boat"], [["dragon", "rock"], ["boat", "fire engine"]]
SIZE = (24, 32)
VIEW = View("output", (0, 1), (0.5,), softmax=Softmax.PER_CELL)
# float32 on both sides; the pipelines encode padded batches and tell the model 1000 t / 1000.
CLOSE = {"atol": 5e-5, "rtol": 1e-4}
FAMILIES = {
    "flux2": (flux2, Flux2Backbone, {"text_tokens": 120, "concept_token": 118}),
    "flux2_klein": (flux2_klein, Flux2KleinBackbone, {"text_tokens": 48}),
    "qwen_image": (qwen_image, QwenImageBackbone, {"text_tokens": 64}),
    "longcat_image": (longcat_image, LongCatImageBackbone, {"text_tokens": 32}),
    "ovis_image": (ovis_image, OvisImageBackbone, {"text_tokens": 48}),
    "z_image": (z_image, ZImageBackbone, {"text_tokens": 48}),
}


class Case:
    def __init__(self, name, folder):
        build, self.kind, self.settings = FAMILIES[name]
        self.name, self.folder = name, str(folder)
        self.pipeline = saved(build, folder)
        self.length = {"max_sequence_length": self.settings["text_tokens"]}
        if name == "longcat_image":
            self.length, self.pipeline.tokenizer_max_length = {}, self.settings["text_tokens"]
        self.read = {}

    def made(self, **settings):
        return self.kind(self.folder, image_size=32, **{**self.settings, **settings})

    def shared(self, **settings):
        """One backbone for all tests that give it the same settings, so that its parts are read once."""
        key = tuple(settings.items())
        if key not in self.read:
            self.read[key] = self.made(**settings)
        return self.read[key]

    def stock_texts(self, strings):
        """Return the stock input to the transformer, [n d] for each string, without padding where the pipeline drops it."""
        if self.name == "z_image":
            return self.pipeline.encode_prompt(list(strings), do_classifier_free_guidance=False, **self.length)[0]
        found, mask, *_ = self.pipeline.encode_prompt(list(strings), **self.length)
        if self.name.startswith(("flux2", "longcat", "ovis")) or mask is None:
            return list(found)
        return [row[here.bool()] for row, here in zip(found, mask, strict=True)]

    def ids(self, string):
        """The tokens that the stock text model reads of a string."""
        seen = []
        hook = self.pipeline.text_encoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
        )
        self.stock_texts([string])
        hook.remove()
        return seen[0]

    def message(self, string):
        """The text that the stock text model reads, without padding."""
        tokenizer = getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)
        return tokenizer.decode(self.ids(string)).replace(tokenizer.pad_token, "")

    def places(self, string):
        """Where a string stands among the tokens of its message, by what the tokens before and after it say."""
        tokenizer = getattr(self.pipeline.tokenizer, "tokenizer", self.pipeline.tokenizer)
        said = [tokenizer.decode([token]) for token in self.ids(string)]
        if self.name == "flux2":
            start, end = said.index("[INST]") + 1, said.index("[/INST]")
        else:
            start = next(k for k in range(len(said)) if said[k : k + 2] == ["user", "\n"]) + 2
            end = said.index("<|endoftext|>" if self.name == "longcat_image" else "<|im_end|>", start)
        if self.name == "ovis_image":  # the prompt follows a system prompt and a blank, which is its first word's
            start = next(k for k in range(len(said)) if said[k] == ":") + 1
        assert "".join(said[start:end]).strip() == string
        dropped = {"qwen_image": 34, "ovis_image": 28, "longcat_image": start}.get(self.name, 0)
        return start - dropped, end - dropped


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, cases):
    return cases(request.param)


def test_the_family_is_told_by_the_files_and_by_the_pipeline(case):
    assert type(backbone_of(case.folder, image_size=32)) is case.kind
    loaded = backbone_from(case.pipeline)
    assert type(loaded) is case.kind
    assert loaded.text_tokens == {"longcat_image": 32, "ovis_image": 256}.get(case.name, 512)


def test_captions_are_encoded_as_the_stock_pipeline_does(case):
    prompts = case.shared().prompts(CAPTIONS)
    wanted = case.stock_texts(CAPTIONS)
    present = torch.ones(prompts.hidden.shape[:2], dtype=torch.bool) if prompts.present is None else prompts.present
    for row, here, stock in zip(prompts.hidden, present, wanted, strict=True):
        torch.testing.assert_close(row[here], stock, **CLOSE)
    assert prompts.hidden.abs().mean() > 0.1


@pytest.mark.parametrize("word", ["dragon", "fire engine", "skyscraper", "user", "assistant"])
def test_a_concepts_tokens_are_its_own_within_its_message(case, word):
    """Also a word in pieces, and words that the template says itself."""
    start, end = case.places(word)
    (stock,) = case.stock_texts([word])
    if case.name == "flux2":
        assert end - 1 == case.settings["concept_token"]
        poolings = {"first": stock[end - 1]}  # as released: the last token, whatever the word's length
    else:
        own = stock[start:end]
        poolings = {"first": own[0], "last": own[-1], "mean": own.mean(0)}
    for pooling, wanted in poolings.items():
        found = case.shared(concept_pooling=pooling).concepts([[word, "sky"]])
        torch.testing.assert_close(found.tokens[0, 0], wanted, **CLOSE)


def test_words_of_a_prompt_are_found_among_its_tokens(case):
    backbone = case.shared()
    backbone.prompts(["dragon fire engine sky"])
    places, (start, end) = backbone.word_places(["dragon", "fire engine", "sky"]), case.places("dragon fire engine sky")
    assert [list(place) for place in places] == [[start], [start + 1, start + 2], [start + 3]] and end == start + 4


@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_the_image_that_is_made_is_the_stock_pipelines(case, guidance):
    backbone = case.shared()
    before = backbone.forward_passes
    images, (maps,) = ConceptAttention(backbone, seed=3).generate(CAPTIONS, CONCEPTS, [VIEW], 3, SIZE, guidance, negative="sand")
    shape = backbone.latent_shape(*SIZE)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(3 + b)) for b in range(2)])
    options = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 3, "output_type": "pt", **case.length}
    if case.name == "flux2":
        options |= {"guidance_scale": guidance, "latents": noise}
    elif case.name == "flux2_klein":
        with torch.inference_mode():
            sand = case.pipeline.encode_prompt(["sand"] * 2, **case.length)[0]
        options |= {"guidance_scale": guidance, "latents": noise, "negative_prompt_embeds": sand}
    elif case.name != "z_image":  # their own layout of tokens
        tokens = noise.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        scale = "true_cfg_scale" if case.name == "qwen_image" else "guidance_scale"
        options |= {scale: guidance, "latents": tokens, "negative_prompt": ["sand"] * 2 if guidance else None}
        if case.name == "longcat_image":
            options["enable_prompt_rewrite"] = False
    else:
        options |= {"guidance_scale": max(0.0, guidance - 1), "latents": noise, "negative_prompt": ["sand"] * 2}
    wanted = case.pipeline(prompt=list(CAPTIONS), **options).images
    torch.testing.assert_close(images, wanted, **CLOSE)
    assert images.std() > 0.01 and backbone.forward_passes - before == 3
    assert maps.scores.shape == (2, 2, 6, 8) and maps.scores.std() > 1e-3


def test_an_image_with_a_side_that_tokens_do_not_tile_is_refused(case):
    for height, width in ((31, 32), (32, 31)):
        with pytest.raises(ConfigError, match="image_size is 31"):
            case.made().latents(torch.zeros(1, 3, height, width))


def test_text_models_are_read_once_and_never_stay_beside_the_transformer(case, tmp_path):
    first = case.made(text_cache=str(tmp_path), text_encoders="release")
    first.concepts(CONCEPTS)
    first.prompts(CAPTIONS)
    assert "text_pipeline" not in first.__dict__
    again = case.made(text_cache=str(tmp_path), text_encoders="release")
    one, two = first.concepts(CONCEPTS).tokens, again.concepts(CONCEPTS).tokens
    again.prompts(CAPTIONS)
    assert torch.equal(one, two) and "text_pipeline" not in again.__dict__


def test_flux2_says_when_the_token_it_takes_is_not_the_words_last(cases, caplog):
    case = cases("flux2")
    with caplog.at_level(logging.WARNING):
        case.made().concepts([["dragon", "rock"]])
        assert not [record for record in caplog.records if record.name.startswith("conceptseg")]
        case.made(concept_token=110).concepts([["dragon", "rock"]])
    assert 'the last token of "dragon" is at 118 of the 120' in caplog.text
