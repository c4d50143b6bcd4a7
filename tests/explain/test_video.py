"""CogVideoX from a tiny checkpoint: frames in, maps of frames x height x width out."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image
from tiny import tiny_cogvideox

from conceptseg.backbones.transformers.cogvideox import CogVideoXBackbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Softmax, View
from conceptseg.types import Batch, Concepts, Task

WORDS = ["fish", "boat", "sky"]


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    return ConceptAttention.from_pretrained(tiny_cogvideox(tmp_path_factory.mktemp("cogvideox")), image_size=32, text_tokens=8)


def test_frames_give_maps_of_frames_height_and_width(method):
    frames = np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), np.uint8)  # 4k + 1 frames: two latent ones
    found = method.explain(frames, WORDS, caption="a fish", size=(32, 48))
    assert method.backbone.kind == "cogvideox"
    assert found.scores.shape == (3, 2, 2, 3) and found["boat"].shape == (2, 2, 3) and found.image.shape == (5, 40, 56, 3)
    torch.testing.assert_close(found.scores.sum(0), torch.ones(2, 2, 3))


def test_a_still_image_is_one_frame_to_the_benchmark(method):
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    task = Task("one", image, np.zeros((32, 32), np.uint8), Concepts(tuple(WORDS), (1, 0, 0)), "a fish", (0, 1))
    (maps,) = method.stream(Batch((task,)), [View("output", (0, 1), (0.5,))])
    assert maps.scores.shape == (1, 3, 2, 2) and torch.isfinite(maps.scores).all()


def test_noise_is_mixed_by_the_models_own_schedule(method):
    noise, latents = torch.randn(2, 3), torch.randn(2, 3)
    share = method.backbone.scheduler.alphas_cumprod[499]
    torch.testing.assert_close(method.backbone.mix(noise, latents, 0.5), share.sqrt() * latents + (1 - share).sqrt() * noise)


def stock(method):
    backbone = method.backbone
    pipeline = CogVideoXPipeline(
        backbone.tokenizer, backbone.text_encoder, backbone.vae, backbone.transformer,
        type(backbone.scheduler).from_config(backbone.scheduler.config),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_video_that_is_made_is_the_stock_pipelines_and_its_maps_have_its_frames(method, guidance):
    """Tracing changes nothing: texts, guidance, rotary positions and DDIM steps are the pipeline's, and no concept is seen."""
    seed = ConceptAttention(method.backbone, seed=3)
    before = method.backbone.forward_passes
    views = [View("output", (0, 1), (0.5,), softmax=Softmax.PER_CELL), View("cross", (1,), (0.5,))]
    videos, maps = seed.generate(["a fish", "a boat"], [WORDS, WORDS[::-1]], views, 3, (32, 48), guidance, negative="sand")
    noise = torch.stack([torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(3 + b)) for b in range(2)])
    wanted = stock(method)(
        ["a fish", "a boat"], ["sand", "sand"], height=32, width=48, num_frames=9, num_inference_steps=3, guidance_scale=guidance,
        latents=noise, output_type="pt", max_sequence_length=8,
    ).frames  # fmt: skip
    assert videos.shape == wanted.shape == (2, 9, 3, 32, 48) and method.backbone.forward_passes == before + 3
    torch.testing.assert_close(videos, wanted, atol=2e-5, rtol=1e-4)
    assert [m.scores.shape for m in maps] == [(2, 3, 3, 2, 3)] * 2
    torch.testing.assert_close(maps[0].scores.sum(1), torch.ones(2, 3, 2, 3))


def with_solver(method, scheduler, folder):
    """The same checkpoint, but for the solver that it names."""
    shutil.copytree(method.backbone.checkpoint.path, folder)
    scheduler.save_pretrained(folder / "scheduler")
    return ConceptAttention.from_pretrained(str(folder), image_size=32, text_tokens=8, seed=3)


def test_a_checkpoint_that_names_the_second_order_solver_makes_the_stock_pipelines_video(method, tmp_path):
    """It looks one step back and draws noise at every step, from each video's own generator; settings as in CogVideoX-5b."""
    solver = CogVideoXDPMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0,
        clip_sample=False,
    )  # fmt: skip
    other = with_solver(method, solver, tmp_path / "dpm")
    view = [View("output", (1,), (0.5,))]
    made = [other.generate(["a fish", "a boat"], [WORDS, WORDS], view, 4, (32, 48), 6.0)[0] for _ in range(2)]
    wanted = stock(other)(
        ["a fish", "a boat"], height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=6.0, output_type="pt",
        generator=[torch.Generator().manual_seed(3 + b) for b in range(2)], max_sequence_length=8,
    ).frames  # fmt: skip
    assert isinstance(other.backbone.scheduler, CogVideoXDPMScheduler) and torch.equal(*made)
    torch.testing.assert_close(made[0], wanted, atol=2e-5, rtol=1e-4)
    alone = other.generate(["a fish"], [WORDS], view, 4, (32, 48), 6.0)[0]
    torch.testing.assert_close(made[0][:1], alone, atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="CogVideoXDDIMScheduler"):
        _ = with_solver(method, FlowMatchEulerDiscreteScheduler(), tmp_path / "euler").backbone.scheduler


def test_other_concepts_leave_the_same_video_and_other_maps(method):
    view = [View("output", (1,), (0.5,))]
    one, two = (method.generate(["a fish"], [words], view, 2, (32, 32), 6.0) for words in (WORDS, ["sand", "sun", "tree"]))
    assert torch.equal(one[0], two[0]) and not torch.allclose(one[1][0].scores, two[1][0].scores)


def test_a_prompt_gives_frames_a_sheet_and_a_moving_picture(method, tmp_path):
    found = method.explain(prompt="a fish", words=WORDS, size=(32, 32), steps=2, guidance=6.0)
    assert found.image.shape == (9, 32, 32, 3) and found.scores.shape == (3, 3, 2, 2)
    assert found.frame(1).scale == (float(found.scores.min()), float(found.scores.max()))
    np.testing.assert_array_equal(found.frame(1).image, found.image[4])  # the second of three maps stands in the middle
    one = found.frame(0).sheet()
    whole = found.sheet()  # a row for each map, titles and legend once
    assert whole.width == one.width and 2 * one.height < whole.height < 3 * one.height
    moving = found.save_image(tmp_path / "video.png")
    with Image.open(moving) as picture:
        assert moving.suffix == ".gif" and picture.n_frames == 9


def test_frames_that_the_autoencoder_cannot_take_are_refused():
    with pytest.raises(ConfigError, match=r"frames is 5; .* 8k \+ 1 is wanted, for example 1\."):
        CogVideoXBackbone("lab:none", frames=5)


def test_a_text_length_that_added_positions_do_not_fit_is_refused_before_encoding(tmp_path):
    folder = tiny_cogvideox(tmp_path)
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_rotary_positional_embeddings": False}))
    with pytest.raises(ConfigError, match=r"text_tokens is 6; .* texts of 8 tokens .*text_tokens=8 is wanted"):
        CogVideoXBackbone(folder, image_size=32, text_tokens=6).prompts(["a fish"])
    image = np.zeros((32, 32, 3), np.uint8)
    whole = ConceptAttention.from_pretrained(folder, image_size=32, text_tokens=8)
    assert whole.explain(image[None], WORDS, caption="a fish").scores.shape == (3, 1, 2, 2)
