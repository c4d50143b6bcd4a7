"""Stable Diffusion 3's text, and the benchmark's extractor on it, from a tiny checkpoint in the layout of real ones."""

import numpy as np
import pytest
import torch
from composing import plainly
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny import tiny_sd3

from conceptseg.backbones.transformers.sd3 import SD3Backbone, encode_prompts
from conceptseg.errors import DataError
from conceptseg.saliency.views import expand_views
from conceptseg.targets import instantiate
from conceptseg.types import Batch, Concepts, Task

CAPTIONS = ["a fish on grass", "a boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


def backbone_of(folder, **settings):
    return SD3Backbone(folder, image_size=32, text_tokens=12, clip_tokens=12, **settings)


@pytest.fixture(scope="module")
def backbone(folder):
    return backbone_of(folder)


def test_prompts_are_encoded_as_the_stock_pipeline_encodes_them(backbone, folder):
    parts = dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), backbone.text_encoders, strict=True))
    parts |= dict(zip(("tokenizer", "tokenizer_2", "tokenizer_3"), backbone.tokenizers, strict=True))
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = StableDiffusion3Pipeline(transformer=None, vae=None, scheduler=scheduler, **parts)
    with torch.inference_mode():
        hidden, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=12, device="cpu"
        )
    found = backbone.prompts(CAPTIONS)
    assert found.hidden.shape == (2, 24, 16) and found.pooled.shape == (2, 16)
    torch.testing.assert_close(found.hidden, hidden, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-6, rtol=1e-6)


def test_gradients_reach_every_text_encoder(backbone):
    encoders = [encoder.requires_grad_(True) for encoder in backbone.text_encoders]
    hidden, pooled = encode_prompts(CAPTIONS, backbone.tokenizers, encoders, 12, 12)
    (hidden.square().mean() + pooled.square().mean()).backward()
    assert all(any(w.grad is not None and w.grad.any() for w in encoder.parameters()) for encoder in encoders)
    for encoder in encoders:
        encoder.requires_grad_(False).zero_grad()


def test_joined_concepts_are_the_begin_mark_and_a_clip_token_each(backbone):
    """As released: one prompt of all words; its first tokens are taken, and the first of them is not scored."""
    found = backbone.concepts([["fish", "grass", "boat"]])
    prompt = backbone.prompts(["fish grass boat"]).hidden
    assert torch.equal(found.tokens, prompt[:, :4]) and found.present is None
    assert torch.equal(found.words[0], torch.cat([torch.zeros(3, 1), torch.eye(3)], 1))
    later = backbone.concepts([["fish", "grass", "sun"]])
    assert torch.equal(later.tokens[:, 2], found.tokens[:, 2])  # CLIP reads from left to right
    assert not torch.equal(later.tokens[:, 3], found.tokens[:, 3])


def test_joined_words_of_several_tokens_do_not_shift_those_after_them(backbone):
    """The release takes one token a word, so that every word after a long one is read off its neighbour."""
    prompt = backbone.prompts(["red fish grass"]).hidden[0]
    first = backbone.concepts([["red fish", "grass"]])
    assert torch.equal(first.tokens[0], prompt[[0, 1, 3]])
    joint = SD3Backbone.concepts(backbone_of(backbone.checkpoint.path, concept_pooling="joint"), [["red fish", "grass"]])
    assert torch.equal(joint.tokens[0], prompt[:4])
    assert joint.words[0].tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 1]]


def test_concepts_can_be_read_alone_by_the_t5(folder):
    backbone = backbone_of(folder, concept_text="t5")
    found = backbone.concepts([["fish", "grass"]])
    for place, word in enumerate(("fish", "grass")):
        assert torch.equal(found.tokens[0, place], backbone.prompts([word]).hidden[0, 12])
    assert found.words is None and backbone.identity() != backbone_of(folder).identity()


def test_more_words_than_a_clip_prompt_holds_are_refused(backbone):
    with pytest.raises(DataError, match=r"are 12 CLIP tokens in one prompt; 10 fit.*concept_text=t5"):
        backbone.concepts([["fish", "grass", "boat", "sun"] * 3])


@pytest.mark.parametrize("concept_text", ["joined", "t5"])
def test_the_benchmarks_extractor_runs_on_it_from_its_sheet(folder, concept_text):
    """extractor=concept_attention backbone@extractor.backbone=lab_sd3: a batch is single images, views add no pass."""
    config = plainly("extractor=concept_attention", "backbone@extractor.backbone=lab_sd3")
    tiny = {"path": folder, "image_size": 32, "text_tokens": 12, "clip_tokens": 12, "concept_text": concept_text}
    config["extractor"]["backbone"] |= tiny
    extractor = instantiate(config["extractor"], "extractor")
    views = list(expand_views(config["views"], extractor.axes()).values())
    images = np.random.default_rng(0).random((2, 40, 40, 3), np.float32)
    concepts = Concepts(("fish", "grass", "sky"), (1, 0, 0))
    tasks = [Task(str(n), images[n], np.zeros((40, 40), np.uint8), concepts, "a fish", (0, 1)) for n in range(2)]
    (maps,) = extractor.stream(Batch(tuple(tasks)), views)
    assert maps.scores.shape == (2, 3, 8, 8) and torch.isfinite(maps.scores).all()
    for number, task in enumerate(tasks):
        (alone,) = extractor.stream(Batch((task,)), views)
        torch.testing.assert_close(maps.scores[number], alone.scores[0], atol=1e-5, rtol=1e-5)
    before = extractor.backbone.forward_passes
    every = {"all": {"space": list(extractor.axes().spaces), "each": "layer", "timesteps": [0.5]}}
    sweep = list(expand_views(every, extractor.axes()).values())
    assert len(list(extractor.stream(Batch(tuple(tasks)), [*views, *sweep]))) == 1 + 10 * 3 - 3
    assert extractor.backbone.forward_passes == before + 1
