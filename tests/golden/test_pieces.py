"""Building blocks against what the reference's own functions returned (pieces.safetensors, commit db30c4d)."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdit_runs import same_draws
from safetensors import safe_open
from safetensors.torch import load_file

from conceptseg.backbones.base import schedule, shared_noise, stack_images
from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.saliency.normalize import gaussian_blur, linear_over_concepts
from conceptseg.segment.resize import resize_image

FILE = Path(__file__).parent / "concept_attention" / "pieces.safetensors"
with safe_open(FILE, "pt") as opened:
    NAMES = list(opened.keys())

FLOAT32 = 1e-6  # values of order 1, computed in float32 on both sides


@pytest.fixture(scope="module")
def pieces():
    return load_file(FILE)


def largest(got, wanted):
    assert got.shape == wanted.shape
    return (got.double() - wanted.double()).abs().max().item()


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("schedule.")])
def test_the_schedule_is_the_references(pieces, name):
    steps, tokens, shift = re.fullmatch(r"schedule\.steps(\d+)\.seq(\d+)\.(\w+)", name).groups()
    levels = schedule(int(steps), int(tokens), shifted=shift == "shift")
    assert largest(torch.tensor(levels, dtype=torch.float64), pieces[name]) <= FLOAT32


def test_the_schedule_holds_the_levels_of_the_published_rows():
    """Levels of the released schedule (flux/src/flux/sampling.py, get_schedule), to six and four decimals."""
    assert schedule(4, 4096, shifted=False) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [round(t, 6) for t in schedule(4, 4096, shifted=True)] == [1.0, 0.904531, 0.759511, 0.512844, 0.0]
    fifty = schedule(50, 4096, shifted=True)
    published = {0: 1, 10: 0.9266, 20: 0.8257, 25: 0.7595, 30: 0.6780, 35: 0.5751, 38: 0.4993, 40: 0.4412, 45: 0.2598, 49: 0.0606}
    assert {k: round(fifty[k], 4) for k in published} == published


def test_the_blur_is_the_references(pieces):
    assert largest(gaussian_blur(pieces["blur.x"][None], 1.0)[0], pieces["blur.y_k3_s1"]) <= FLOAT32


def test_the_blurs_taps_are_those_of_the_published_rows():
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    taps = np.array([0.27407, 0.45186, 0.27407])  # GaussianBlur(kernel 3, sigma 1) of run_experiment.py, to five decimals
    assert np.allclose(gaussian_blur(point, 1.0)[0, 0, 1:4, 1:4].numpy(), np.outer(taps, taps), atol=5e-6)


def test_linear_normalisation_is_the_references(pieces):
    assert largest(linear_over_concepts(pieces["linnorm.x"]), pieces["linnorm.y_dim-2"]) <= FLOAT32


@pytest.mark.parametrize("seed", [0, 4])
def test_shared_noise_is_the_references(pieces, seed):
    noise = shared_noise((16, 16, 12), seed, 0, "cpu", torch.bfloat16)
    assert same_draws(noise.float(), pieces[f"noise.seed{seed}.bf16_as_f32"])
    assert not same_draws(noise.float(), pieces[f"noise.seed{4 - seed}.bf16_as_f32"])


def test_draws_of_shared_noise_count_up_from_the_seed():
    assert torch.equal(shared_noise((2, 4), 3, 2, "cpu", torch.bfloat16), shared_noise((2, 4), 5, 0, "cpu", torch.bfloat16))


def test_latents_are_packed_as_the_reference_packs_them(pieces):
    assert torch.equal(pack(pieces["pack.latents"]), pieces["pack.tokens"])
    assert torch.equal(image_ids(8, 6)[None], pieces["pack.img_ids"])


def test_unpacking_undoes_packing(pieces):
    assert torch.equal(unpack(pieces["pack.tokens"], (8, 6)), pieces["pack.latents"])


def seen_by_the_vae(image):
    """An image in 0..1 as FluxBackbone.latents hands it on: at 1024 pixels by the nearest rule, in -1..1."""
    return 2 * stack_images([image], (1024, 1024), "nearest")[0] - 1


def test_an_image_reaches_the_vae_as_in_the_released_evaluation(pieces):
    image = resize_image(pieces["preproc.image_uint8_hwc"].numpy(), (512, 512), "bicubic").astype(np.float32) / 255
    seen = seen_by_the_vae(image)
    assert largest(seen[:, ::16, ::16], pieces["preproc.vae_input_1024_every16th"]) <= FLOAT32
    assert largest(torch.stack([seen.mean(), seen.std()]), pieces["preproc.vae_input_mean_std"]) <= FLOAT32


def test_an_image_reaches_the_vae_as_in_the_public_pipeline(pieces):
    image = pieces["preproc.image_uint8_hwc"].numpy().astype(np.float32) / 255
    assert largest(seen_by_the_vae(image)[:, ::16, ::16], pieces["preproc.pil_direct_1024_every16th"]) <= FLOAT32


class Words:
    """A tokenizer that gives the string's own number and an end, in place of T5's."""

    unk_token_id = None
    eos_token_id = 9

    def __call__(self, strings, **options):
        return SimpleNamespace(input_ids=torch.tensor([[int(s), 9, 0] for s in strings]))


def test_a_concept_is_embedded_as_the_first_token_of_its_word_alone(pieces, tmp_path):
    backbone = FluxBackbone(str(tmp_path))
    backbone.tokenizer = Words()
    backbone.text_encoder = lambda input_ids: SimpleNamespace(last_hidden_state=pieces["embed.t5_hidden"][input_ids[:, 0]])
    backbone.config = {"pooled_projection_dim": 9}
    assert torch.equal(backbone.concepts([["0", "1", "2"]]).tokens, pieces["embed.concepts"])
    assert torch.equal(backbone.zero_pooled(1), pieces["embed.vec"])
    assert not pieces["embed.concept_ids"].any()


def test_every_piece_has_a_test():
    families = {"blur", "embed", "linnorm", "noise", "pack", "preproc", "schedule"}
    assert {n.split(".")[0] for n in NAMES} == families
