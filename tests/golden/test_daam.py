"""DAAM against the reference implementation (castorini/daam 0.2.0, ConceptAttention's baselines at db30c4d), tensor by tensor.

The folder `daam` holds tiny pipelines with random weights and what the reference made of them; its README says what was kept.
Tolerances are those stated with the data: 1e-5 for maps (both sides compute in float32 with other kernels), 2e-5 for U-Net
outputs. `pytest -s` prints the differences.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import nn

from conceptseg.backbones.base import stack_images
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import (
    RELEASED_FACTORS,
    CrossAttention,
    CrossAttentionTap,
    grid_factor,
    kept_heads,
    kept_rows,
    reference_half,
)
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.backbones.word_tokens import prompt_length, reference_positions
from conceptseg.errors import DataError, ViewError
from conceptseg.extractors.daam import DAAM
from conceptseg.saliency.views import View
from conceptseg.trace import PromptMaps, trace
from conceptseg.trace.sums import RunningSums
from conceptseg.types import Concepts, Task

GOLDEN = Path(__file__).parent / "daam"
MAPS = {"atol": 1e-5, "rtol": 1e-5}
U_NET = {"atol": 2e-5, "rtol": 0}
PIPELINES = {
    "generation_sd": ("models_sd", StableDiffusionPipeline),
    "generation_sdxl": ("models_sdxl", StableDiffusionXLPipeline),
}


def held(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    return case, load_file(GOLDEN / f"{name}.safetensors")


def thin(maps):
    """Every third row and column: where images and maps are kept."""
    return maps[..., ::3, ::3]


def close(got, want, tolerance, what):
    print(f"{what}: largest difference {float((got - want).abs().max()):.1e}")
    torch.testing.assert_close(got, want, **tolerance)


# ---------------------------------------------------------------- real images


RELEASED = {
    "sd2": {"prompt": "{caption}", "indexed_prompt": "{caption}{concepts}"},
    "sdxl": {"prompt": "{caption},{concepts}"},
}


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def released(request):
    """The released baseline's settings on the tiny model, its task, and the reference's tensors."""
    case, tensors = held(f"real_image_{request.param}")
    folder = GOLDEN / ("models_sd" if request.param == "sd2" else "models_sdxl")
    backbone = UNetBackbone(str(folder), image_size=512, resize="nearest")
    extractor = DAAM(
        backbone, concept="a {concept}", join=", ", token_match="reference", cfg_rows="legacy_half_of_heads", noise="shared",
        posterior="sample", **RELEASED[request.param],
    )  # fmt: skip
    image = tensors["image"].permute(1, 2, 0).numpy()
    words = Concepts(tuple(case["concepts"]), (1, 0, 0, 0), 0)
    task = Task("golden", image, np.zeros(image.shape[:2], np.uint8), words, case["caption"], (0, 1))
    return extractor, task, case, tensors


def test_released_prompts_are_those_of_the_baseline(released):
    extractor, task, case, tensors = released
    (asked,) = extractor.asked(task)
    assert asked.prompt == case["prompt_fed_to_text_encoder"] and asked.indexed == case["prompt_used_for_token_positions"]
    tokenizer = extractor.backbone.tokenizer
    for one in case["concept_positions"]:
        assert list(reference_positions(tokenizer, asked.indexed, one["concept"])) == one["merge_indices"]
    close(extractor.backbone.text([asked.prompt]), tensors["encoder_hidden_states"], MAPS, "text")


def test_released_images_reach_the_autoencoder_as_they_did(released):
    extractor, task, _, tensors = released
    backbone = extractor.backbone
    image = stack_images([task.image], backbone.size, backbone.resize)
    close(thin(nn.functional.avg_pool2d(2 * image - 1, 8)), tensors["preprocessed_avgpool8"], MAPS, "preprocessing")
    close(thin(backbone.latents(image) / backbone.vae_config["scaling_factor"]), tensors["vae_mean"], U_NET, "posterior mean")


def test_released_maps_and_masks(released):
    extractor, task, case, tensors = released
    backbone, level = extractor.backbone, case["timestep_value"] / 1000
    step = backbone.step_of(level)
    assert step == case["timestep_value"]
    noisy = backbone.noised(tensors["sample0.init_latents"], tensors["sample0.noise"], step)
    close(thin(noisy), tensors["sample0.unet_sample"], MAPS, "noised latents")
    (asked,), view, sums = extractor.asked(task), View("words", extractor.axes().layers, (level,)), {}
    text, conditions = backbone.text([asked.prompt]), backbone.conditions([asked.prompt], (512, 512))
    close(thin(backbone.denoise(noisy, step, text, conditions)), tensors["sample0.noise_pred"], U_NET, "U-Net output")
    extractor.read_level(sums, level, step, noisy, [asked.prompt], extractor.reader([asked], False), [view])
    maps = extractor.fold(sums, view, 1, 1)[0]
    close(thin(maps), tensors["concept_maps"], MAPS, "concept maps")
    masks = thin(maps > maps.mean((1, 2), keepdim=True))
    assert (masks != tensors["mean_threshold_masks"].bool()).float().mean() <= 0.001


def test_all_heads_is_another_map_than_the_released_half(released):
    """The golden maps tell the switch apart: by the data's README, all heads differ by 0.08 where values reach 0.2."""
    extractor, task, case, tensors = released
    whole = DAAM(extractor.backbone, **RELEASED["sdxl" if extractor.indexed_prompt is None else "sd2"], token_match="reference",
                 concept="a {concept}", join=", ")  # fmt: skip
    (asked,), level, sums = whole.asked(task), case["timestep_value"] / 1000, {}
    view = View("words", whole.axes().layers, (level,))
    step = whole.backbone.step_of(level)
    noisy = whole.backbone.noised(tensors["sample0.init_latents"], tensors["sample0.noise"], step)
    whole.read_level(sums, level, step, noisy, [asked.prompt], whole.reader([asked], False), [view])
    assert (thin(whole.fold(sums, view, 1, 1)[0]) - tensors["concept_maps"]).abs().max() > 0.005


# ---------------------------------------------------------------- generation


@pytest.fixture(scope="module", params=list(PIPELINES))
def generated(request):
    """A whole guided generation by the stock pipeline, traced, and what the reference collected."""
    case, tensors = held(request.param)
    folder, kind = PIPELINES[request.param]
    pipe = kind.from_pretrained(GOLDEN / folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with trace(pipe, token_match="reference", steps=True) as tr:
        pipe(**case["call"], latents=tensors["latents_init"], output_type="latent")
    return pipe, case, tensors, tr


def test_global_map_of_a_generation(generated):
    _, _, tensors, tr = generated
    close(thin(tr.prompt_maps(factors=RELEASED_FACTORS).maps), tensors["global.default"], MAPS, "global map")


def test_every_raw_map_by_its_sums(generated):
    """Summed over steps; the weighted sum tells rows from columns and heads from heads."""
    _, case, tensors, tr = generated
    for number, (_, layer, head) in enumerate(case["raw_keys_factor_layer_head"]):
        maps = tr.sums.layers[layer][0, head].double()
        t, y, x = (torch.arange(n, dtype=torch.float64) for n in maps.shape)
        weights = torch.cos(0.1 + 0.37 * t[:, None, None] + 0.11 * y[:, None] + 0.23 * x)
        for name, got in (("token_sum", maps.sum((1, 2))), ("token_wsum", (maps * weights).sum((1, 2)))):
            want = tensors[f"checksums.{name}"][number, : len(maps)]
            torch.testing.assert_close(got, want, atol=5e-3, rtol=0)
    assert sorted(tr.sums.layers) == sorted({layer for _, layer, _ in case["raw_keys_factor_layer_head"]})


def test_words_options_and_expansions(generated):
    pipe, case, tensors, tr = generated
    maps = tr.prompt_maps(factors=RELEASED_FACTORS)
    word = case["words"][0]["args"]["word"]
    assert list(reference_positions(pipe.tokenizer, maps.prompt, word)) == case["words"][0]["merge_indices"]
    close(thin(maps.word_map(word).values), tensors["word.0"], MAPS, "word map")
    options = {
        "head_1": lambda: tr.prompt_maps(heads=[1]).maps,
        "factors_2_norm": lambda: tr.prompt_maps(factors=[2]).cut_to("a photo").normalized().maps,
        "only_step0": lambda: tr.prompt_maps(step=0).maps,
    }
    for name, read in options.items():
        if f"options.{name}" in tensors:
            close(thin(read()), tensors[f"options.{name}"], MAPS, name)
    for one in case["expand"]:
        if one.get("tensor") in tensors:
            size = tuple(one["image_size_WxH"])  # the reference takes width for rows
            want = tensors[one["tensor"]].float()
            got = thin(maps.word_map(one["word"]).expanded(size, **one["args"]))
            if one["args"].get("threshold"):
                assert (got != want).float().mean() <= 0.001
            else:
                close(got, want, MAPS, one["tensor"])
        if "ioa" in one:
            pair = one["ioa"]
            share = maps.word_map(pair["a"]).intersection_share(maps.word_map(pair["b"]))
            assert share == pytest.approx(pair["value"], abs=1e-5)


def test_variants_without_guidance_and_with_the_mid_block(generated):
    pipe, case, tensors, _ = generated
    if "options.variant.no_cfg" in tensors:
        with trace(pipe, cfg_rows="legacy_half_of_heads") as tr:
            pipe(**{**case["call"], "guidance_scale": 1.0}, latents=tensors["latents_init"], output_type="latent")
        close(thin(tr.prompt_maps().maps), tensors["options.variant.no_cfg"], MAPS, "no guidance, half of the heads")
    if "options.variant.save_heads" in tensors:
        with trace(pipe, include_mid=True) as tr:
            pipe(**case["call"], latents=tensors["latents_init"], output_type="latent")
        close(thin(tr.prompt_maps().maps), tensors["options.variant.save_heads"], MAPS, "mid block included")


def test_the_u_net_gives_what_it_gave(generated):
    """In the first step, whose latents are the given ones."""
    pipe, _, tensors, _ = generated
    added = {k: tensors[k] for k in ("text_embeds", "time_ids") if k in tensors}
    with torch.inference_mode():
        output = pipe.unet(
            tensors["latents_init"].repeat(2, 1, 1, 1), tensors["step0.timestep"].float(),
            encoder_hidden_states=tensors["encoder_hidden_states"], added_cond_kwargs=added or None, return_dict=False,
        )[0]  # fmt: skip
    close(thin(output), tensors["step0.noise_pred"], U_NET, "U-Net output")


# ---------------------------------------------------------------- pieces


class OneAttention(nn.Module):
    """A host with one cross-attention where a U-Net has it."""

    def __init__(self, case):
        super().__init__()
        self.grid = (case["n_query"] ** 0.5, case["n_query"] ** 0.5)
        inner = nn.Module()
        inner.attn2 = Attention(case["query_dim"], case["cross_dim"], heads=case["heads"], dim_head=case["head_dim"])
        around = Around()
        around.transformer_blocks = nn.ModuleList([inner])
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions = nn.ModuleList([around])

    def forward(self, hidden, text, grid):
        return self.down_blocks[0].attentions[0](torch.zeros(len(hidden), 1, *grid), hidden, text)


class Around(nn.Module):
    def forward(self, image, hidden, text):
        return self.transformer_blocks[0].attn2(hidden, encoder_hidden_states=text)


CASES, MODULE_TENSORS = held("attention_module")
GRIDS = {"cfg_h2_n36_from_4x9_grid": (6, 6)}  # the reference takes 4 x 9 positions for 6 x 6


@pytest.mark.parametrize("name", CASES)
def test_one_attention_module(name):
    case = CASES[name]
    tensors = {k.split("/", 1)[1]: v for k, v in MODULE_TENSORS.items() if k.startswith(f"{name}/")}
    host = OneAttention(case)
    attention = host.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.load_state_dict({k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")})
    layer = CrossAttention(case["layer_idx"], "down_blocks.0.attentions.0.transformer_blocks.0.attn2", case["heads"], 0)
    side = int(case["n_query"] ** 0.5)
    grid, collected, seen = GRIDS.get(name, (side, side)), [], []
    guided = case["batch"] == 2

    def on_layer(attended):
        seen.append(attended.probabilities(slice(None), slice(None)))
        if grid_factor((int(case["latent_hw"] ** 0.5),) * 2, case["n_query"]) != 8:
            rows = kept_rows(case["batch"], guided, "conditional")
            kept = seen[-1][rows][0] if guided else reference_half(seen[-1])
            if case["batch"] == 1:  # what the DAAM extractor keeps of a single unguided image: the larger half of 5 heads
                heads = kept_heads(case["heads"], "legacy_half_of_heads")
                kept = seen[-1][0, heads.start : heads.stop]
                assert torch.equal(kept, reference_half(seen[-1]))
            collected.append(kept.unflatten(1, grid).permute(0, 3, 1, 2))

    with TapSet(host) as taps, torch.inference_mode():
        CrossAttentionTap([layer], on_layer).attach(taps)
        for call in range(case["calls"]):
            hidden, text = tensors[f"call{call}.hidden_states"], tensors[f"call{call}.encoder_hidden_states"]
            close(host(hidden, text, grid), tensors[f"call{call}.output"], U_NET, "module output")
            close(seen[-1].flatten(0, 1)[:, ::3], tensors[f"call{call}.probs"], MAPS, "probabilities")
    if case["collected_keys_factor_layer_head"]:
        close(torch.stack(collected).sum(0)[:, ::3], tensors["maps"], MAPS, "maps")
    else:
        assert not collected


def test_aggregation_of_given_maps():
    case, tensors = held("aggregation")
    by_place = {}
    for name, maps in tensors.items():
        if name.startswith("in"):
            _, factor, layer, head = name.split(".")
            by_place.setdefault((int(layer[5:]), int(head[4:])), []).append(maps)
            side = (case["side"], case["side"])
            assert grid_factor(side, maps.shape[-1] ** 2) == int(factor[6:])
    sums = RunningSums()
    heads = {layer: 1 + max(h for other, h in by_place if other == layer) for layer, _ in by_place}
    for (layer, head), updates in by_place.items():
        for maps in updates:
            sums.add(layer, maps[None, None], slice(head, head + 1), heads[layer])
    for name, chosen in (("default", {}), ("head_1", {"heads": [1]})):
        got = sums.mean(side, 0, factors=RELEASED_FACTORS, **chosen)[: len(case["tokens"]) + 2]
        close(thin(got), tensors[f"global.{name}"], MAPS, name)
    with pytest.raises(ViewError, match="no heat maps for layers"):
        sums.mean(side, 0, layers=[9])
    assert PromptMaps(sums.mean(side, 0), None, None).token_map([0]).values.shape == side


@pytest.mark.parametrize("side", [64, 62, 40, 32, 24, 16, 14, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 80])
def test_released_factors_leave_out_grids_that_no_power_of_two_widens(side):
    """Of two layers, a full-size one and one of this side: castorini/daam 0.2.0 aggregates factors 0, 1, 2, 4, ..., 64."""
    sums, size, generator = RunningSums(), (64, 64), torch.Generator().manual_seed(0)
    for layer, rows in enumerate((64, side)):
        sums.add(layer, torch.rand(1, 1, 2, rows, rows, generator=generator), slice(0, 1), 1)
    factor = int(64 / side)
    counted = factor in {0, *(2**n for n in range(7))}
    wanted = sums.mean(size, 0, layers=[0, 1] if counted else [0])
    assert torch.equal(sums.mean(size, 0, factors=RELEASED_FACTORS), wanted)
    assert grid_factor(size, side * side) == factor


def test_word_positions_by_the_reference_rule():
    tokenizer = UNetBackbone(str(GOLDEN / "models_sd")).tokenizer
    for one in json.loads((GOLDEN / "words.json").read_text()):
        assert prompt_length(tokenizer, one["prompt"]) + 2 == one["n_map_rows"]
        assert tokenizer(one["prompt"]).input_ids == one["input_ids"]
        for query in one["queries"]:
            args = query["args"]
            settings = {"word_index": args.get("word_idx"), "offset": args.get("offset_idx", 0)}
            if "error" in query:
                with pytest.raises(DataError, match="do not occur"):
                    reference_positions(tokenizer, one["prompt"], args["word"], **settings)
            else:
                assert list(reference_positions(tokenizer, one["prompt"], args["word"], **settings)) == query["merge_indices"]
