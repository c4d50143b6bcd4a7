"""ConceptAttention on FLUX against the reference implementation (helblazer811/ConceptAttention), tensor by tensor.

flux_a.safetensors holds what the reference's own transformer returned for given weights and inputs (commits db30c4d,
218a11f, a0cbb75), flux_a_segmentation.safetensors what its segmentation models (218a11f) made of clean latents. Every
tensor of both files is one test here; what was left out of them to save room is in the folder's README. `pytest -s` prints the
largest difference of each family.
"""

import re
from functools import cache, partial

import pytest
import torch
from mmdit_runs import (
    EXACT,
    GOLDEN,
    GRID,
    HEAT,
    SCORED,
    SCORES,
    SHARES,
    SUMS,
    SWITCHES,
    VECTOR_READERS,
    Allowed,
    FluxRun,
    Given,
    Judgement,
    RecordedTimes,
    by_head,
    evaluation_maps,
    names,
    ratios,
    recorded_noise,
    same_draws,
    told_recorded_times,
)
from safetensors.torch import load_file

from conceptseg.backbones.base import schedule, shared_noise
from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.transformers.concept_stream import ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.cells import cell_scores
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View
from conceptseg.segment.threshold import above_mean

LEVELS_APART = Allowed(1e-6)
JUDGEMENT = Judgement()
compare = JUDGEMENT.compare


@pytest.fixture(scope="module", autouse=True)
def printed_differences():
    yield
    print(JUDGEMENT, end="")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux_a")
    (folder / "transformer").symlink_to(GOLDEN / "flux_a_transformer")
    return FluxBackbone(str(folder))


@pytest.fixture(scope="module")
def backbone(stock):
    return told_recorded_times(FluxBackbone(stock.checkpoint.path))


@pytest.fixture(scope="module")
def flux():
    return load_file(GOLDEN / "flux_a.safetensors")


@pytest.fixture(scope="module")
def evaluation():
    return load_file(GOLDEN / "flux_a_segmentation.safetensors")


# ---------------------------------------------------------------- one call of the transformer


@pytest.fixture(scope="module")
def recorded(backbone, flux):
    held = {}

    def get(name):
        if name not in held:
            held[name] = FluxRun(backbone, flux, name)
        return held[name]

    return get


FLUX = names("flux_a")


def judged(recorded, flux, name):
    """Compare a tensor of one run, whose name is the run's and the tensor's."""
    run, tensor = re.fullmatch(r"((?:port\.)?\w+)\.(.+)", name).groups()
    got, allowed = recorded(run).read(tensor)
    compare(f"{'port ' * run.startswith('port.')}{tensor.split('.')[0]}", got, flux[name], allowed)


@pytest.mark.parametrize("name", [n for n in FLUX if n.endswith("velocity")])
def test_the_velocity_is_the_references(recorded, flux, name):
    judged(recorded, flux, name)


@pytest.mark.parametrize("name", [n for n in FLUX if n.rsplit(".", 1)[-1] in VECTOR_READERS])
def test_every_vector_is_the_references(recorded, flux, name):
    judged(recorded, flux, name)


@pytest.mark.parametrize("name", [n for n in FLUX if n.rsplit(".", 1)[-1] in SCORED])
def test_scores_of_joined_heads_are_the_references(recorded, flux, name):
    judged(recorded, flux, name)


@pytest.mark.parametrize("name", [n for n in FLUX if n.endswith(".scores_cross")])
@pytest.mark.parametrize("heads", [Fold.MEAN, Fold.SUM])
@pytest.mark.parametrize("softmax", [Softmax.NONE, Softmax.PER_CELL])
def test_cross_scores_fold_the_references_heads(recorded, flux, name, heads, softmax):
    by_heads = flux[name] if softmax is Softmax.NONE else flux[name].softmax(-2)
    wanted = by_heads.sum(2) if heads is Fold.SUM else by_heads.mean(2)
    got = recorded(name.rsplit(".", 1)[0]).scores("cross", softmax, heads)
    compare("scores_cross", got, wanted, SCORES if softmax is Softmax.NONE else SHARES)


@pytest.mark.parametrize("name", [n for n in FLUX if ".scores_util_" in n])
def test_the_activations_give_the_shared_helpers_scores(recorded, flux, name):
    kind = CellKind("none of the spaces", Normalize.NONE, Softmax.NONE, Fold.MEAN)
    turned = name.endswith("iq_ck")
    got = recorded(name.rsplit(".", 1)[0]).stacked(
        lambda a: cell_scores(
            by_head(a.concept_keys if turned else a.concept_queries) / 16**0.5,
            by_head(a.image_queries if turned else a.image_keys), kind,
        )
    )  # fmt: skip
    compare("scores_util", got.transpose(-1, -2) if turned else got, flux[name], SCORES)


@pytest.mark.parametrize("name", [n for n in FLUX if ".heat_" in n and not n.startswith("multi_t")])
def test_every_heatmap_is_the_references(recorded, flux, name):
    judged(recorded, flux, name)


@pytest.mark.parametrize("name", [n for n in FLUX if n.startswith("multi_t")])
def test_a_view_over_two_timesteps_is_the_references(backbone, flux, name):
    heat, times, layers = re.fullmatch(r"multi_t\.heat_(\w+)\.T(\d+)\.L(\d+)", name).groups()
    space, normalize, softmax = HEAT[heat]
    levels = tuple(flux["in.timesteps"][int(t)].item() for t in times)
    view = View(space, tuple(map(int, layers)), levels, normalize=normalize, softmax=softmax)
    cells = Given(backbone).read_cells(
        unpack(flux["in.img"][:1], GRID), Prompts(flux["in.txt"][:1]), ConceptTokens(flux["in.concepts"][:1]), ["one"], [view]
    )
    maps = cells.read(view, GRID)
    compare(f"multi_t heat_{heat}", maps[0] if heat == "output_softmax_of_mean" else maps, flux[name], SHARES)


@pytest.mark.parametrize("run", ["port.enc_t0", "port.gen_t0"])
def test_the_ports_softmax_is_over_tokens(recorded, flux, run):
    wanted = flux[f"{run}.scores"].softmax(-1)
    compare("port softmax over tokens", recorded(run).scores("output_projected", Softmax.TOKENS), wanted, SHARES)


def test_ids_are_the_references(flux):
    assert torch.equal(image_ids(*GRID), flux["in.img_ids"])
    assert not flux["in.txt_ids"].any() and not flux["in.concept_ids"].any()  # which the concept stream takes for granted


@pytest.mark.parametrize("time", [0.0, 250.0, 370.0, 500.0, 810.0, 815.0, 1000.0])
def test_a_stock_models_sines_are_the_recorded_ones_but_for_the_last_place_of_frequencies(stock, time):
    """A unit in the last place of a frequency below 1, times t, and a rounding of the phase: 2^-24 t each."""
    told = torch.tensor([time])
    ours, recorded = stock.transformer.time_text_embed.time_proj(told), RecordedTimes()(told)
    compare("stock sines", ours, recorded, Allowed(2**-23 * (time + 1)))


@pytest.mark.parametrize("run", ["enc_t0", "gen_t0", "enc_t1", "batch2", "port.gen_t0"])
def test_a_stock_models_sines_move_tensors_no_more_than_frequencies_can(stock, flux, run):
    """One unit in the last place of some frequency is what may separate this processor's runs from the reference's."""
    for name, off in ratios(FluxRun(stock, flux, run).compared(flux, run)).items():
        assert off <= 4, f"{name}: {off:.2f} of what is allowed with the recorded frequencies"


def test_the_concepts_leave_the_velocity_as_it_is(backbone, recorded, flux):
    noisy = unpack(flux["in.img"], GRID)
    plain = backbone.denoise(noisy, flux["in.timesteps"], Prompts(flux["in.txt"], flux["in.y_pooled"]))
    assert torch.equal(recorded("batch2").velocity, plain)


def test_every_tensor_of_a_run_has_a_test():
    read = ("velocity", "scores", *VECTOR_READERS)
    left = [n for n in FLUX if not n.startswith(("in.", "port.in.")) and not re.search(rf"\.({'|'.join(read)}|heat_|scores_)", n)]
    assert left == []


# ---------------------------------------------------------------- from clean latents to masks

EVALUATION = names("flux_a_segmentation")
LEVELS = {"k1": 0.75, "k2": 0.5, "k3": 0.25}


@pytest.fixture(scope="module")
def reference_noise(evaluation):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("conceptseg.extractors.concept_attention.shared_noise", recorded_noise(evaluation))
        yield


@pytest.fixture(scope="module")
def read_maps(backbone, evaluation, reference_noise):
    """Maps of a view, read once: its masks and winners are those of the maps that a test compares."""
    return cache(partial(evaluation_maps, backbone, evaluation))


def view_of(name, evaluation):
    """The view, noise seed, switches and order of concepts that a tensor's name stands for."""
    parts = name.split(".")
    layers = tuple(map(int, next(p for p in parts if re.fullmatch(r"L\d+", p))[1:]))
    space = {"cross_attention": "cross", **{s: s for s in ("output", "cross", "value")}}[parts[1 if parts[0] == "voc" else 0]]
    if "keep_head_dim" in parts:
        space = "output_per_head"
    draws = 3 if "n3" in parts else 1
    if space == "cross":
        # The reference indexes the sample axis with its float schedule, which truncates to 0: only the first noise sample
        # counts, so its maps of three samples are its maps of one.
        draws = 1
    options = {
        "normalize": Normalize.LINEAR if "norm1" in parts else Normalize.NONE,
        "softmax": Softmax.PER_CELL if "softmax1" in parts else Softmax.NONE,
        "blur": 1.0 if "blur1" in parts else 0.0,
    }
    switches = next((SWITCHES[p] for p in parts if p in SWITCHES), (True, True))
    if parts[0] == "voc":
        # VOC takes the shifted schedule, although the model is schnell, and adds layers (and heads) up.
        level = evaluation["in.t.voc.k3"][0].item()
        return View(space, layers, (level,), fold=Fold.SUM, **options), 0, switches, True
    level = LEVELS[next(p for p in parts if re.fullmatch(r"k\d", p))]
    return View(space, layers, (level,), draws=draws, **options), 4, switches, False


def tolerance_of(name):
    return SUMS if name.startswith("voc.") else SHARES if "softmax1" in name else SCORES


def family_of(name):
    parts = name.split(".")
    kind = [p for p in parts[1:] if p in ("keep_head_dim", *SWITCHES) or re.fullmatch(r"output|cross_attention|softmax1|n3", p)]
    return " ".join(["segmentation", parts[0], *kind])


@pytest.mark.parametrize("name", [n for n in EVALUATION if n.endswith(".map")])
def test_every_evaluation_map_is_the_references(read_maps, evaluation, name):
    compare(family_of(name), read_maps(*view_of(name, evaluation)), evaluation[name], tolerance_of(name))


@pytest.mark.parametrize("name", [n for n in EVALUATION if n.endswith(".mask")])
def test_every_evaluation_mask_is_the_references(read_maps, evaluation, name):
    maps = read_maps(*view_of(name, evaluation)).numpy()
    masks = torch.stack([torch.from_numpy(above_mean(one)) for one in maps]).to(torch.uint8)
    compare("segmentation masks (pixels)", masks, evaluation[name], EXACT)


@pytest.mark.parametrize("name", [n for n in EVALUATION if n.endswith(".argmax")])
def test_every_voc_argmax_is_the_references(read_maps, evaluation, name):
    winners = read_maps(*view_of(name, evaluation)).argmax(0).to(torch.uint8)
    compare("segmentation voc argmax (pixels)", winners, evaluation[name], EXACT)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_noised_latents_are_the_references_bit_for_bit(backbone, evaluation, reference_noise, k):
    extractor = ConceptAttention(backbone, noise="shared", seed=4)
    noisy, _ = extractor.noised(evaluation["in.latents"], LEVELS[f"k{k}"], ["one"], draws=1)
    compare("noised latents", noisy.float(), evaluation[f"noising.schnell.k{k}.seed4.noisy_latents_bf16_as_f32"], EXACT)


@pytest.mark.parametrize(("case", "seed"), [("k2", 4), ("voc.k3", 0)])
def test_the_model_is_told_the_references_time_and_tokens(backbone, evaluation, reference_noise, case, seed):
    level = evaluation["in.t.voc.k3"][0].item() if case == "voc.k3" else LEVELS[case]
    noisy, told = ConceptAttention(backbone, noise="shared", seed=seed).noised(evaluation["in.latents"], level, ["one"], 1)
    assert told == evaluation[f"in.t_vec.{case}"].item()
    compare("packed tokens", pack(noisy.float()), evaluation[f"in.packed_img.{case}.seed{seed}"], EXACT)


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_shared_noise_is_the_references(evaluation, draw):
    noise = shared_noise((16, 16, 12), 4, draw, "cpu", torch.bfloat16)
    assert same_draws(noise.float(), evaluation[f"in.noise_bf16_as_f32.seed{4 + draw}"])


def test_the_levels_of_the_schedule_are_the_references(evaluation):
    plain, shifted = schedule(4, 48, shifted=False), schedule(4, 48, shifted=True)
    for k in (1, 2, 3):
        compare("schedule tails", torch.tensor(plain[k:]), evaluation[f"in.t.schnell.k{k}"], LEVELS_APART)
    compare("schedule tails", torch.tensor(shifted[3:]), evaluation["in.t.voc.k3"], LEVELS_APART)


def test_a_concept_is_the_first_token_of_its_word(evaluation):
    assert torch.equal(evaluation["in.t5_concepts"][:, 0], evaluation["in.concepts_embedded"][0])


def test_three_cross_draws_differ_from_one_here_though_not_in_the_reference(read_maps, evaluation):
    ours = View("cross", (0, 1, 2), (0.5,), draws=3, softmax=Softmax.PER_CELL)
    one = evaluation["cross.softmax1.n1.k2.L012.map"]
    assert torch.equal(evaluation["cross.softmax1.n3.k2.L012.map"], one)
    assert (read_maps(ours, seed=4) - one).abs().max() > 100 * SHARES.absolute


def test_every_tensor_of_the_evaluation_has_a_test():
    assert [n for n in EVALUATION if not n.startswith(("in.", "noising.")) and not n.endswith((".map", ".mask", ".argmax"))] == []
