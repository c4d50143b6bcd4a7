"""Words and captions that are longer than a text encoder reads: refused by every family, at the limit and not before it."""

import json
import logging

import numpy as np
import pytest
import torch
from test_chat_families import FAMILIES, Case
from tiny import tiny_flux, tiny_sd3
from tiny_encoders import batch, tiny_clip
from tiny_transformers import made

from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.data.drawings import OBJECTS
from conceptseg.errors import DataError
from conceptseg.extractors.clipseg import CLIPSeg
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.extractors.cross_attention import PromptCrossAttention
from conceptseg.extractors.daam import DAAM
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.extractors.ovam import OVAM
from conceptseg.lab.models import build_sd, save
from conceptseg.saliency.views import View
from conceptseg.types import Batch, Concepts, Task

LIMIT = 16
WORDS = (*OBJECTS, "grass", "sky", "sand", "water", "brick", "snow")


def asked(words, caption="a boat"):
    image = np.random.default_rng(0).random((16, 16, 3), np.float32)
    concepts = Concepts(tuple(words), (1, *[0] * (len(words) - 1)))
    return Batch((Task("one", image, np.zeros((16, 16), np.uint8), concepts, caption, (0, 1)),))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return FluxBackbone(tiny_flux(tmp_path_factory.mktemp("flux")), image_size=16, text_tokens=LIMIT)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    sizes = {
        "channels": [8, 16], "reads_text": [True, True], "heads": 2, "norm_groups": 4, "text_tokens": LIMIT, "text_width": 16,
        "text_layers": 1, "image_size": 24, "codec_patch": 2, "latent_scale": 1.5,
    }  # fmt: skip
    save(build_sd(sizes), folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return UNetBackbone(str(folder), image_size=24)


def said(count):
    return " ".join(["boat"] * count)


def test_flux_refuses_captions_and_words_past_its_tokens(flux):
    method = ConceptAttention(flux)
    view = [View("output", (0,), (0.5,))]
    assert next(method.stream(asked(["fish", "sky"], said(LIMIT - 1)), view)).scores.isfinite().all()  # and the end mark
    with pytest.raises(DataError, match=r"has 17 tokens.*reads 16 \(extractor\.backbone\.text_tokens\)"):
        next(method.stream(asked(["fish", "sky"], said(LIMIT)), view))
    with pytest.raises(DataError, match="reads 16"):
        next(method.stream(asked(["fish", said(LIMIT)]), view))
    with pytest.raises(DataError, match="reads 16"):
        method.explain(np.zeros((16, 16, 3), np.uint8), ["fish", "sky"], caption=said(200))


def test_a_text_that_a_cache_holds_cut_is_refused_too(flux, tmp_path):
    made_before = FluxBackbone(flux.checkpoint.path, image_size=16, text_tokens=LIMIT, text_cache=str(tmp_path))
    made_before.fill({said(99): said(99)}, made_before.encode)  # as versions did that did not look at lengths
    later = FluxBackbone(flux.checkpoint.path, image_size=16, text_tokens=LIMIT, text_cache=str(tmp_path))
    with pytest.raises(DataError, match="has 100 tokens"):
        later.prompts([said(99)])


@pytest.mark.parametrize("text", ["joined", "t5"])
def test_sd3_refuses_what_its_t5_and_joined_concepts_do_not_hold(sd3, text):
    backbone = SD3Backbone(sd3, image_size=16, text_tokens=LIMIT, clip_tokens=12, concept_text=text)
    with pytest.raises(DataError, match="of the T5"):
        backbone.prompts([said(LIMIT)])
    with pytest.raises(DataError, match="fit" if text == "joined" else "of the T5"):
        backbone.concepts([["fish", said(LIMIT)]])


def test_sd3_says_so_where_only_the_clips_cut_a_caption(sd3, caplog):
    backbone = SD3Backbone(sd3, image_size=16, text_tokens=LIMIT, clip_tokens=8)
    with caplog.at_level(logging.WARNING):
        backbone.prompts([said(6)])
        assert "CLIP tokens" not in caplog.text
        backbone.prompts([said(12)])
    assert "has 14 CLIP tokens, of which the CLIPs read 8" in caplog.text


def test_the_prompts_own_tokens_are_read_up_to_the_last_one(flux):
    method, view = PromptCrossAttention(flux), View("key_query", (0,), (0.5,))
    (maps,) = method.stream(asked(WORDS[: LIMIT - 1]), [view])
    assert maps.scores.shape[1] == LIMIT - 1 and len({one.sum().item() for one in maps.scores[0]}) == LIMIT - 1


def test_the_prompts_own_tokens_are_read_no_further(flux):
    """One word more than fits would be read at the end mark, two more at nothing."""
    method, view = PromptCrossAttention(flux), View("key_query", (0,), (0.5,))
    with pytest.raises(DataError, match="reads 16"):
        next(method.stream(asked(WORDS[:LIMIT]), [view]))


@pytest.mark.parametrize("text", ["joined", "t5"])
def test_the_prompts_own_tokens_on_sd3_stay_within_their_encoder(sd3, text):
    backbone = SD3Backbone(sd3, image_size=16, text_tokens=20, clip_tokens=10, concept_text=text)
    method, view = PromptCrossAttention(backbone), View("key_query", (0,), (0.5,))
    if text == "t5":
        assert next(method.stream(asked(WORDS[:12]), [view])).scores.isfinite().all()
    else:
        with pytest.raises(DataError, match="reads 10"):
            next(method.stream(asked(WORDS[:12]), [view]))


@pytest.mark.parametrize("method", [DAAM, OVAM])
def test_u_nets_refuse_words_and_captions_past_their_tokens(unet, method):
    view = [View("words" if method is DAAM else "token_softmax", (0,), (0.5,))]
    listed = method(unet, concept="{concept}", join=" ")
    fits = LIMIT - 2  # start and end token
    assert next(listed.stream(asked(WORDS[:fits]), view)).scores.isfinite().all()
    with pytest.raises(DataError, match=r"past the 16 tokens|reads 16"):
        next(listed.stream(asked(WORDS[: fits + 1]), view))
    told = method(unet, prompt="{caption}, {concepts}") if method is DAAM else method(unet)
    with pytest.raises(DataError, match=r"past the 16 tokens|reads 16"):
        next(told.stream(asked(["fish", "sky"], said(LIMIT)), view))


@pytest.mark.parametrize("nested", [("boat", "red boat"), ("red boat", "boat")])
@pytest.mark.parametrize("method", [DAAM, OVAM])
def test_a_word_inside_another_has_a_map_of_its_own(unet, method, nested):
    """ "boat" is read at its own token alone: what it would be if the other were not named after it."""
    extractor = method(unet)
    view = [View("words" if method is DAAM else "token_softmax", tuple(one.index for one in extractor.layers), (0.5,))]
    reader = extractor.reader([extractor.asked(asked(nested).tasks[0])[0]], totals=False)
    shares = reader.shares[0] if method is DAAM else reader.shares[0, 0]
    by_word = {word: shares[number] > 0 for number, word in enumerate(nested)}
    assert by_word["boat"].sum() == 1 and by_word["red boat"].sum() == 2
    assert not (by_word["boat"] & by_word["red boat"]).any()
    assert next(extractor.stream(asked(nested), view)).scores.isfinite().all()


def test_open_clip_refuses_names_past_its_context(tmp_path):
    method = MaskCLIP(tiny_clip(tmp_path))  # context of 12, templates "a {}" and "on a {}"
    assert method.saliency(batch(1, names=(said(8), "grass", "sky"))).isfinite().all()
    with pytest.raises(DataError, match=r"has 13 tokens.*reads 12 \(the context_length"):
        method.saliency(batch(1, names=(said(9), "grass", "sky")))


def test_open_clips_own_byte_pairs_refuse_names_past_the_context(tmp_path):
    backbone = tiny_clip(tmp_path)
    backbone._tokenizer = "bpe"
    assert backbone.token_ids([said(10)]).shape == (1, 12)
    with pytest.raises(DataError, match="has 13 tokens"):
        backbone.token_ids([said(11)])


@pytest.mark.parametrize("architecture", ["CLIPSegForImageSegmentation", "GroupViTModel", "GroundingDinoForObjectDetection"])
def test_models_of_transformers_refuse_names_past_their_tokens(tmp_path, architecture):
    backbone = made(tmp_path, architecture)  # 12 tokens, prompt "a {}"
    assert backbone.token_ids([said(9)])[0].shape == (1, 12)
    with pytest.raises(DataError, match=r"has 13 tokens.*text_tokens"):
        backbone.token_ids([said(10)])
    if architecture == "CLIPSegForImageSegmentation":
        with pytest.raises(DataError, match="has 13 tokens"):
            CLIPSeg(backbone).saliency(batch(1, names=(said(10), "grass", "sky")))


@pytest.mark.parametrize("name", FAMILIES)
def test_chat_families_refuse_texts_that_their_messages_cut(tmp_path, name):
    case = Case(name, tmp_path)
    backbone = case.made()
    longest = next(count for count in range(1, 200) if not fits(backbone, said(count)))
    assert longest > 2
    if name != "qwen_image":  # whose pipeline cuts the encoded text, not its tokens
        assert reads_whole(case, longest - 1) and not reads_whole(case, longest)
    backbone.prompts([said(longest - 1)])
    with pytest.raises(DataError, match=rf"reads {case.settings['text_tokens']} \("):
        backbone.prompts([said(longest)])
    with pytest.raises(DataError, match="would be cut off"):
        backbone.concepts([["rock", said(longest)]])


def reads_whole(case, count):
    """Whether the stock text model reads every word and, but for Z-Image, the end of the message."""
    message = case.message(said(count))
    if case.name == "z_image":
        return message.count("boat") == count
    return message == case.message("boat").replace("boat", said(count))


def fits(backbone, text):
    try:
        backbone.check_length(text)
    except DataError:
        return False
    return True
