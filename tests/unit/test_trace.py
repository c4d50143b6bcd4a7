"""Tracing a stock pipeline: what is collected, what is refused, and that nothing is left behind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from conceptseg.backbones.unets.attention_maps import cross_attentions, upsample
from conceptseg.backbones.word_tokens import exact_positions, word_spans
from conceptseg.errors import DataError, TapError, ViewError
from conceptseg.trace import trace

FOLDER = Path(__file__).parents[1] / "golden" / "daam" / "models_sd"
PROMPT = "a cat and a wombat, near a cat"
SHAPE = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
SIDE = {"map_side": 16}  # latents of 8 x 8 would have factor 8 against maps of 64
SAME = {"atol": 1e-6, "rtol": 1e-5}  # the same numbers added in another order


@pytest.fixture(scope="module")
def pipe():
    found = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


def run(pipe, prompt=PROMPT, seed=0, **changed):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **{**SHAPE, **changed}).images


def traced(pipe, prompt=PROMPT, settings=SIDE, **changed):
    with trace(pipe, **settings) as tr:
        run(pipe, prompt, **changed)
    return tr


@pytest.fixture(scope="module")
def base(pipe):
    """The plain traced run that most tests look at."""
    return traced(pipe)


# ---------------------------------------------------------------- the numbers


def test_probabilities_of_all_tokens_add_up_to_the_number_of_steps(pipe):
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]  # of given embeddings all 77 positions are held
    tr = traced(pipe, None, prompt_embeds=embeds, guidance_scale=1.0)
    for maps in tr.sums.layers.values():
        torch.testing.assert_close(maps.sum(2), torch.full_like(maps.sum(2), 2.0), atol=1e-5, rtol=0)


SD1 = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8}
FOUR = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip
SDXL = {
    "layers_per_block": 2, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers", "mid", "pairs"),
    [({**SD1, **FOUR}, 15, 1, 120), ({**SD1, **FOUR, "attention_head_dim": [5, 10, 20, 20]}, 15, 1, 175), (SDXL, 60, 10, 1100)],
    ids=["SD 1.x", "SD 2.x", "SDXL"],
)
def test_real_models_have_the_layers_and_pairs_of_the_reference(config, layers, mid, pairs):
    """Cross-attention layers of SD 1, SD 2 and SDXL, counted from their configurations alone."""
    found = cross_attentions(config)
    outside = [one for one in found if not one.path.startswith("mid")]
    assert (len(outside), len(found) - len(outside), sum(one.heads for one in outside)) == (layers, mid, pairs)
    assert [one.index for one in found] == list(range(len(found)))


def test_located_layers_are_those_of_the_model(pipe):
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    found = cross_attentions(pipe.unet.config)
    assert sorted(one.path for one in found) == sorted(names)
    assert all(pipe.unet.get_submodule(one.path).heads == one.heads for one in found)


def test_guidance_changes_no_number_of_heads(pipe, base):
    guided, plain = base, traced(pipe, guidance_scale=1.0)
    heads = [{layer: maps.shape[1] for layer, maps in tr.sums.layers.items()} for tr in (guided, plain)]
    assert heads[0] == heads[1] == dict.fromkeys(heads[0], 4)


def test_without_guidance_the_reference_drops_the_first_half_of_the_heads(pipe):
    whole, half = (
        traced(pipe, guidance_scale=1.0, settings={**SIDE, **more}) for more in ({}, {"cfg_rows": "legacy_half_of_heads"})
    )
    for layer, maps in half.sums.layers.items():
        torch.testing.assert_close(maps, whole.sums.layers[layer][:, 2:], **SAME)


def test_both_halves_of_guidance_count_as_more_heads(pipe, base):
    both, conditional = traced(pipe, settings={**SIDE, "cfg_rows": "all"}), base
    for layer, maps in both.sums.layers.items():
        assert maps.shape[1] == 8
        torch.testing.assert_close(maps[:, 4:], conditional.sums.layers[layer], **SAME)
        assert not torch.allclose(maps[:, :4], maps[:, 4:])


def test_the_mean_over_pairs_is_that_of_all_maps_stacked(base):
    tr = base
    stacked = torch.cat([upsample(maps[0], tr.size, "bicubic_clamped") for maps in tr.sums.layers.values()])
    torch.testing.assert_close(tr.prompt_maps().maps, stacked.mean(0), **SAME)


def test_grids_may_have_one_weight_each_and_steps_their_mean(base):
    grids, layers = {}, sorted(base.sums.layers)[:-1]  # so that grids differ in layers
    for layer in layers:
        maps = base.sums.layers[layer]
        grids.setdefault(maps.shape[-1], []).append(upsample(maps[0], base.size, "bicubic_clamped"))
    means = [torch.cat(maps).mean(0) for maps in grids.values()]
    assert len(means) > 1
    by_grid, by_pair = (base.prompt_maps(layers=layers, space_reduce=how).maps for how in ("grids", "pairs"))
    torch.testing.assert_close(by_grid, torch.stack(means).mean(0), **SAME)
    assert not torch.allclose(by_grid, by_pair, atol=1e-4)
    torch.testing.assert_close(base.prompt_maps(time_reduce="mean").maps, base.prompt_maps().maps / 2, **SAME)
    with pytest.raises(ViewError, match="unknown"):
        base.prompt_maps(space_reduce="layers")


def test_one_running_map_is_close_to_raw_sums_and_far_smaller(pipe, base):
    """It cuts at 0 in every step, not once; on maps from 0 to 2 that changes less than a hundredth."""
    pairs, one = base, traced(pipe, settings={**SIDE, "keep": "map"})
    torch.testing.assert_close(one.prompt_maps().maps, pairs.prompt_maps().maps, atol=1e-2, rtol=0)
    assert one.bytes < pairs.bytes / 3
    with pytest.raises(ViewError, match="keep=pairs"):
        one.prompt_maps(layers=[2])


def test_single_steps_add_up_and_are_held_on_request_only(pipe, base):
    tr = traced(pipe, settings={**SIDE, "keep": "map", "steps": True})
    added = tr.prompt_maps(step=0).maps + tr.prompt_maps(step=1).maps
    torch.testing.assert_close(added, tr.prompt_maps().maps, **SAME)
    with pytest.raises(ViewError, match="steps=True"):
        base.prompt_maps(step=0)


def test_images_that_are_not_square_keep_rows_and_columns(pipe):
    """The transposed image of transposed latents: the tiny U-Net is not symmetric, so only shapes and grids are compared."""
    tr = traced(pipe, width=128)
    assert tr.word_map("wombat").values.shape == (16, 32)
    for maps in tr.sums.layers.values():
        assert maps.shape[-1] == 2 * maps.shape[-2]


def test_two_images_per_prompt_and_two_prompts_stay_apart(pipe):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a cat and a wombat", "a photo of the grass"]
    together = traced(pipe, prompts, num_images_per_prompt=2, latents=latents)
    assert together.images == 4
    for image in range(4):
        alone = traced(pipe, prompts[image // 2], latents=latents[image : image + 1])
        word = ("wombat", "grass")[image // 2]
        torch.testing.assert_close(together.word_map(word, image).values, alone.word_map(word).values, atol=2e-5, rtol=0)


def test_a_repeated_word_is_the_mean_of_its_occurrences(base):
    tr = base
    one, two = (tr.word_map("cat", occurrence=number).values for number in range(2))
    torch.testing.assert_close(tr.word_map("cat").values, (one + two) / 2, **SAME)
    assert not torch.allclose(one, two)
    with pytest.raises(ViewError, match="occurs 2 times"):
        tr.word_map("cat", occurrence=2)


def test_a_word_is_not_found_inside_another(pipe):
    tokenizer = pipe.tokenizer
    with pytest.raises(DataError, match="it is not there"):
        word_spans(tokenizer, "a catnip plant", "cat")
    assert exact_positions(tokenizer, "a catfish, a Cat", "cat") == (6,)
    assert exact_positions(tokenizer, "snowball on the grass", "snowball") == (1, 2)
    assert len(word_spans(tokenizer, "a hot  dog and a hot dog", "hot dog")) == 2
    with pytest.raises(DataError, match="lies past the 77 tokens"):
        exact_positions(tokenizer, "cat " * 75 + "wombat", "wombat")


def test_a_grid_eight_times_narrower_than_the_map_is_left_out(pipe, base):
    assert len(base.sums.layers) == 6  # 2 x 2 of a map of 16 x 16: factor 8
    assert len(traced(pipe, settings={**SIDE, "exclude_factor": None}).sums.layers) == 9
    with pytest.raises(ViewError, match="this trace holds layers"):
        base.prompt_maps(layers=[0])


# ---------------------------------------------------------------- what the pipeline sees of it


def test_the_pipeline_gives_the_same_bits(pipe):
    assert torch.equal(run(pipe), traced_images(pipe))


def traced_images(pipe):
    with trace(pipe, **SIDE):
        return run(pipe)


def state_of(pipe):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in pipe.unet.modules()]
    return hooks, [type(p) for p in pipe.unet.attn_processors.values()], sorted(pipe.__dict__)


def test_everything_is_put_back(pipe):
    before = state_of(pipe)
    tr = traced(pipe)
    assert state_of(pipe) == before and tr.word_map("cat").values.max() > 0


def test_everything_is_put_back_after_an_error_in_the_pipeline_and_in_a_hook(pipe, monkeypatch):
    before = state_of(pipe)
    with pytest.raises(ZeroDivisionError), trace(pipe, **SIDE):
        raise ZeroDivisionError
    assert state_of(pipe) == before
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="inside"), trace(pipe, **SIDE) as tr:
        patched.setattr(tr, "_collect", lambda *a: (_ for _ in ()).throw(RuntimeError("inside")))
        run(pipe)
    assert state_of(pipe) == before


def test_a_second_trace_of_the_same_pipeline_is_refused_and_the_first_goes_on(pipe):
    with trace(pipe, **SIDE) as tr:
        with pytest.raises(TapError, match="being traced already"), trace(pipe):
            pass
        run(pipe)
    assert tr.steps_done == 2


def test_a_new_call_starts_afresh(pipe):
    with trace(pipe, **SIDE) as tr:
        run(pipe)
        run(pipe, "the grass", num_inference_steps=3)
    assert tr.steps_done == 3 and tr.call.prompts == ("the grass",)


def test_progress_stands_in_the_pipelines_own_bar(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    try:
        traced(pipe)
    finally:
        pipe.set_progress_bar_config(disable=True)
    shown = capfd.readouterr().err
    assert "tracing 9 layers" in shown and "2/2" in shown


# ---------------------------------------------------------------- other pipelines


def test_image_to_image_and_inpainting_are_traced(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    parts = {**pipe.components, "requires_safety_checker": False}
    for kind, more in (
        (StableDiffusionImg2ImgPipeline, {}),
        (StableDiffusionInpaintPipeline, {"mask_image": picture.convert("L")}),
    ):
        other = kind(**parts)
        other.set_progress_bar_config(disable=True)
        with trace(other, **SIDE) as tr:
            other(PROMPT, image=picture, strength=0.9, num_inference_steps=3, output_type="latent", **more)
        assert tr.word_map("wombat").values.shape == (16, 16) and tr.steps_done >= 2


def test_given_embeddings_are_traced_by_position_by_prompt_or_by_memory(pipe):
    embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    said = traced(pipe, guidance_scale=1.0).word_map("wombat").values
    silent = traced(pipe, None, prompt_embeds=embeds, guidance_scale=1.0)
    with pytest.raises(ViewError, match="was given embeddings"):
        silent.word_map("wombat")
    torch.testing.assert_close(silent.token_map(exact_positions(pipe.tokenizer, PROMPT, "wombat")).values, said, **SAME)
    told = traced(pipe, None, {**SIDE, "prompt": PROMPT}, prompt_embeds=embeds, guidance_scale=1.0)
    torch.testing.assert_close(told.word_map("wombat").values, said, **SAME)
    with trace(pipe, **SIDE) as tr:
        remembered = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        run(pipe, None, prompt_embeds=remembered, guidance_scale=1.0)
    torch.testing.assert_close(tr.word_map("wombat").values, said, **SAME)


def test_longer_embeddings_than_one_encoding_are_traced_by_position(pipe):
    embeds = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (PROMPT, "the grass")], dim=1)
    tr = traced(pipe, None, prompt_embeds=embeds, guidance_scale=1.0)
    assert tr.prompt_maps().maps.shape[0] == 154 and tr.token_map([78]).values.shape == (16, 16)


# ---------------------------------------------------------------- what can't be traced


def test_a_pipeline_with_a_third_pass_is_refused():
    other = StableDiffusionPAGPipeline.from_pretrained(FOLDER, local_files_only=True, pag_applied_layers=["mid"])
    other.set_progress_bar_config(disable=True)
    before = state_of(other)
    with pytest.raises(TapError, match="runs with 3 rows, wanted 2"), trace(other, **SIDE):
        run(other)
    assert state_of(other)[0] == before[0] and "encode_prompt" not in other.__dict__


def test_a_pipeline_without_a_u_net_is_refused():
    class Flux:
        transformer = torch.nn.Linear(1, 1)

    with pytest.raises(TapError, match="no UNet2DConditionModel"):
        trace(Flux())


def test_fused_projections_and_a_bare_u_net_are_refused(pipe):
    with pytest.raises(TapError, match="Call the pipeline"), trace(pipe, **SIDE):
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32))
    fused = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    fused.unet.fuse_qkv_projections()
    with pytest.raises(TapError, match="unfuse_qkv_projections"), trace(fused):
        pass


def test_a_layer_that_is_skipped_is_refused(pipe, monkeypatch):
    """As a cache between steps would do."""
    attention = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    monkeypatch.setattr(attention, "forward", lambda hidden, **kwargs: hidden)
    with pytest.raises(TapError, match="did not project queries and keys"), trace(pipe, **SIDE):
        run(pipe)


def test_nothing_was_run_yet(pipe):
    with trace(pipe, **SIDE) as tr, pytest.raises(ViewError, match="holds no maps yet"):
        tr.word_map("cat")


# ---------------------------------------------------------------- pictures


def test_an_overlay_and_masks_have_the_size_of_the_image(base):
    word = base.word_map("wombat")
    picture = Image.new("RGB", (96, 64), (200, 10, 10))
    assert word.overlay(picture).size == (96, 64)
    paper, released, mean = (word.mask((64, 96), 0.4, rule) for rule in ("paper", "released", "mean"))
    wide = word.expanded((64, 96), absolute=True)
    assert torch.equal(paper, (wide >= 0.4 * wide.max()).float())
    assert torch.equal(released, ((wide - wide.min()) / (wide.max() - wide.min() + 1e-8) > 0.4).float())
    assert torch.equal(mean, (wide > wide.mean()).float())
