"""Cross-attention of the prompt's own tokens, against a literal sum over heads and features."""

import numpy as np
import pytest
import torch
from tiny import tiny_flux, tiny_sd3

from conceptseg.backbones.transformers.concept_stream import ConceptStream
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.extractors.cross_attention import PromptCrossAttention
from conceptseg.saliency.views import Fold, Softmax, View
from conceptseg.types import Batch, Concepts, Task

WORDS = ("red fish", "sky")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return FluxBackbone(tiny_flux(tmp_path_factory.mktemp("flux")), image_size=16, text_tokens=8)


def batch():
    image = np.random.default_rng(0).random((16, 16, 3), np.float32)
    return Batch((Task("one", image, np.zeros((16, 16), np.uint8), Concepts(WORDS, (1, 0)), "a boat", (0, 1)),))


def test_words_are_found_in_the_prompt_of_every_family(backbone, tmp_path):
    assert backbone.word_places(WORDS) == [range(0, 2), range(2, 3)]
    path = tiny_sd3(tmp_path)
    sd3 = {text: SD3Backbone(path, text_tokens=12, clip_tokens=12, concept_text=text) for text in ("joined", "t5")}
    assert sd3["joined"].word_places(WORDS) == [range(1, 3), range(3, 4)]  # after begin-of-text
    assert sd3["t5"].word_places(WORDS) == [range(12, 14), range(14, 15)]  # after the CLIPs' twelve


@pytest.mark.parametrize("fold", Fold)
@pytest.mark.parametrize("softmax", [Softmax.NONE, Softmax.PER_CELL])
@pytest.mark.parametrize("space", ["key_query", "query_key", "key_query_share", "joint_share"])
def test_maps_are_the_written_out_sums(backbone, space, softmax, fold):
    extractor, found = PromptCrossAttention(backbone), []
    view = View(space, (0, 2), (0.5,), softmax=softmax, fold=fold)
    (maps,) = extractor.stream(batch(), [view])
    images = torch.from_numpy(batch().tasks[0].image).permute(2, 0, 1)[None]
    prompts = backbone.prompts(["red fish sky"])
    noisy, _ = extractor.noised(backbone.latents(images), 0.5, ["one"], 1)
    stream = ConceptStream(prompts.hidden[:, :1], backbone.zero_pooled(1), lambda layer, block: found.append(block), 2)
    backbone.denoise(noisy, 0.5, prompts, stream)
    cells = []
    for layer in (0, 2):
        block = found[layer]
        pair = (block.text_queries, block.image_keys) if space == "query_key" else (block.text_keys, block.image_queries)
        keys, queries = (vectors[0].double() for vectors in pair)  # [N A d], [L A d]
        tokens = torch.tensor([[sum(float(k[a] @ q[a]) for a in range(2)) for q in queries] for k in keys])
        if space == "joint_share":
            seen, images_ = block.rotated_image_queries()[0].double(), block.rotated_image_keys[0].double()
            tokens = torch.zeros(len(keys), len(seen))
            for a in range(2):
                for at, query in enumerate(seen[:, a]):
                    weights = torch.exp(torch.stack([k[a] @ query for k in (*keys, *images_)]) / query.numel() ** 0.5)
                    tokens[:, at] += (weights / weights.sum())[: len(keys)]
        tokens = tokens / (2 if fold is Fold.MEAN else 1)
        if space == "key_query_share":
            tokens = torch.exp(tokens) / torch.exp(tokens).sum(0)
        words = torch.stack([(tokens[0] + tokens[1]) / 2, tokens[2]])
        cells.append(torch.exp(words) / torch.exp(words).sum(0) if softmax is Softmax.PER_CELL else words)
    wanted = sum(cells) / (1 if fold is Fold.SUM else 2)
    torch.testing.assert_close(maps.scores[0].flatten(1), wanted, atol=1e-5, rtol=1e-4)


def test_the_caption_is_not_read(backbone):
    (one,) = PromptCrossAttention(backbone).stream(batch(), [View("key_query", (1,), (0.5,))])
    backbone.encode_text(["red fish sky"])
    assert one.scores.std() > 0 and "a boat" not in backbone.texts
