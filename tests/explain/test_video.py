"""CogVideoX from a tiny checkpoint: frames in, maps of frames x height x width out."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from transformers import T5Config, T5EncoderModel

from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.lab.models import save, word_tokenizer
from conceptseg.saliency.views import View
from conceptseg.types import Batch, Concepts, Task

WORDS = ["fish", "boat", "sky"]


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox")
    torch.manual_seed(0)
    tokenizer = word_tokenizer(8)
    parts = {
        "transformer": CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
            num_layers=2, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=8,
            use_rotary_positional_embeddings=True, temporal_compression_ratio=4,
        ),
        "vae": AutoencoderKLCogVideoX(
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_height=32,
            sample_width=32, temporal_compression_ratio=4,
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        ),
        "text_encoder": T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, eos_token_id=1)
        ),
        "tokenizer": tokenizer, "scheduler": CogVideoXDDIMScheduler(),
    }  # fmt: skip
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return ConceptAttention.from_pretrained(str(folder), image_size=32, text_tokens=8)


def test_frames_give_maps_of_frames_height_and_width(method):
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), np.uint8)  # 4k + 1 frames: two latent ones
    found = method.explain(frames, WORDS, size=(32, 48))
    assert method.backbone.kind == "cogvideox"
    assert found.maps.shape == (3, 2, 2, 3) and found["boat"].shape == (2, 2, 3) and found.image.shape == (5, 40, 56, 3)
    torch.testing.assert_close(found.maps.sum(0), torch.ones(2, 2, 3))


def test_a_still_image_is_one_frame_to_the_benchmark(method):
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    task = Task("one", image, np.zeros((32, 32), np.uint8), Concepts(tuple(WORDS), (1, 0, 0)), "a fish", (0, 1))
    (maps,) = method.stream(Batch((task,)), [View("output", (0, 1), (0.5,))])
    assert maps.scores.shape == (1, 3, 2, 2) and torch.isfinite(maps.scores).all()


def test_noise_is_mixed_by_the_models_own_schedule(method):
    noise, latents = torch.randn(2, 3), torch.randn(2, 3)
    share = method.backbone.scheduler.alphas_cumprod[499]
    torch.testing.assert_close(method.backbone.mix(noise, latents, 0.5), share.sqrt() * latents + (1 - share).sqrt() * noise)


def test_making_a_video_is_refused(method):
    with pytest.raises(ConfigError, match="not offered on CogVideoX"):
        method.explain("a fish", WORDS)
