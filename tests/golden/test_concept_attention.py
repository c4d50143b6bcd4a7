"""ConceptAttention on FLUX against the reference implementation (helblazer811/ConceptAttention), tensor by tensor.

flux_a.safetensors holds what the reference's own transformer returned for given weights and inputs (commits db30c4d,
218a11f, a0cbb75), flux_a_segmentation.safetensors what its segmentation models (218a11f) made of clean latents. Every
tensor of both files is one test here; what was left out of them to save room is in the folder's README. `pytest -s` prints the
largest difference of each family.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conceptseg.backbones.base import schedule, shared_noise
from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention, _vectors
from conceptseg.saliency.cells import CellStore, cell_scores
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View
from conceptseg.segment.threshold import above_mean

GOLDEN = Path(__file__).parent / "concept_attention"
GRID = (8, 6)
SWITCHES = {"abl_cross": (True, False), "abl_self": (False, True), "abl_neither": (False, False)}

# Both sides compute in float32 with other kernels, so they differ in the order of summation, about 1e-7 of the terms added.
VECTORS = 1e-5  # values of order 1 after three blocks
SCORES = 5e-5  # dot products over up to 48 features, of magnitude 10 and more
SHARES = 1e-5  # softmaxed maps lie in 0..1
SUMS = 2e-4  # VOC maps: scores summed over layers and heads, of magnitude 100
EXACT = 0.0  # inputs, bfloat16 arithmetic and decisions: the map nearest to its cut is 1.8e-5 away from it

LARGEST = defaultdict(float)


def names(file):
    with safe_open(GOLDEN / f"{file}.safetensors", "pt") as opened:
        return list(opened.keys())


def compare(family, got, wanted, tolerance):
    assert got.shape == wanted.shape
    difference = (got.double() - wanted.double()).abs().max().item()
    LARGEST[family] = max(LARGEST[family], difference)
    assert difference <= tolerance, f"{family}: {difference:.2e}, allowed {tolerance:.0e}"


@pytest.fixture(scope="module", autouse=True)
def printed_differences():
    yield
    for family, difference in sorted(LARGEST.items()):
        print(f"\n{family:45} {difference:.1e}", end="")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux_a")
    (folder / "transformer").symlink_to(GOLDEN / "flux_a_transformer")
    return FluxBackbone(str(folder))


@pytest.fixture(scope="module")
def flux():
    return load_file(GOLDEN / "flux_a.safetensors")


@pytest.fixture(scope="module")
def evaluation():
    return load_file(GOLDEN / "flux_a_segmentation.safetensors")


# ---------------------------------------------------------------- one call of the transformer


def by_head(x):
    return x.transpose(1, 2)


class Recorded:
    """What one run of the host with its concept stream yields: the velocity and the activations of every block."""

    def __init__(self, backbone, flux, name):
        rows = slice(0, 2) if name == "batch2" else slice(0, 1)
        level = flux["in.timesteps"][1:] if name.endswith("_t1") else flux["in.timesteps"][rows]
        zeros = torch.zeros(len(level), 24)
        pooled = flux["in.y_pooled"][rows] if name in ("gen_t0", "batch2", "port.gen_t0") else zeros
        cross, own = SWITCHES.get(name, (True, True))
        self.blocks = []
        stream = ConceptStream(
            flux["in.concepts"][rows],
            # The reference's main code gives concepts a zero pooled vector, its diffusers port a real one.
            flux["port.in.pooled_concepts_gen"] if name == "port.gen_t0" else zeros,
            lambda layer, found: self.blocks.append(found),
            last_layer=2, cross_attention=cross, self_attention=own, stop=False,
        )  # fmt: skip
        noisy = unpack(flux["in.img"][rows], GRID)
        self.velocity = backbone.denoise(noisy, level, Prompts(flux["in.txt"][rows], pooled), stream)
        self.kept = slice(1, 2) if name == "batch2" else slice(None)  # of two images the file holds the second

    def stacked(self, read):
        return torch.stack([read(block)[self.kept] for block in self.blocks])

    def scores(self, space, softmax=Softmax.NONE, heads=Fold.MEAN):
        """Cells of all three layers, [K B C L], through the package's own spaces."""
        kind = CellKind(space, Normalize.NONE, softmax, heads)
        return self.stacked(lambda block: cell_scores(*SPACES[space][1](block), kind))


@pytest.fixture(scope="module")
def recorded(backbone, flux):
    held = {}

    def get(name):
        if name not in held:
            held[name] = Recorded(backbone, flux, name)
        return held[name]

    return get


VECTOR_READERS = {
    "concept_q": lambda a: by_head(a.concept_queries),
    "concept_k": lambda a: by_head(a.concept_keys),
    "concept_v": lambda a: by_head(a.concept_values),
    "concept_out": lambda a: a.concept_outputs,
    "image_q": lambda a: by_head(a.image_queries),
    "image_k": lambda a: by_head(a.image_keys),
    "image_v": lambda a: by_head(a.image_values),
    "image_out": lambda a: a.image_outputs,
    "concept_out_proj": lambda a: a.project_concepts(a.concept_outputs),
    "image_out_proj": lambda a: a.project_image(a.image_outputs),
}
HEAT = {
    "output_raw": ("output", Normalize.NONE, Softmax.NONE),
    "output_softmax": ("output", Normalize.NONE, Softmax.PER_CELL),
    "output_softmax_of_mean": ("output", Normalize.NONE, Softmax.OF_MEAN),
    "output_linnorm_softmax": ("output", Normalize.LINEAR, Softmax.PER_CELL),
    "crossqq_softmax": ("cross_query_query", Normalize.NONE, Softmax.PER_CELL),
}


FLUX = names("flux_a")


@pytest.mark.parametrize("name", [n for n in FLUX if n.endswith("velocity")])
def test_the_velocity_is_the_references(recorded, flux, name):
    run = recorded(name.rsplit(".", 1)[0])
    compare("velocity", run.velocity[run.kept], flux[name], VECTORS)


@pytest.mark.parametrize("name", [n for n in FLUX if n.rsplit(".", 1)[-1] in VECTOR_READERS])
def test_every_vector_is_the_references(recorded, flux, name):
    run, tensor = name.rsplit(".", 1)
    compare(f"{'port ' * name.startswith('port.')}{tensor}", recorded(run).stacked(VECTOR_READERS[tensor]), flux[name], VECTORS)


@pytest.mark.parametrize(
    "name", [n for n in FLUX if n.endswith((".scores_output", ".scores_crossqq", ".scores_crossmix", ".scores"))]
)
def test_scores_of_joined_heads_are_the_references(recorded, flux, name):
    run, tensor = name.rsplit(".", 1)
    space = {"scores_output": "output", "scores_crossqq": "cross_query_query", "scores_crossmix": "cross_mixed"}
    compare(f"{'port ' * name.startswith('port.')}{tensor}", recorded(run).scores(space.get(tensor, "output_projected")),
            flux[name], SCORES)  # fmt: skip


@pytest.mark.parametrize("name", [n for n in FLUX if n.endswith(".scores_cross")])
@pytest.mark.parametrize("heads", [Fold.MEAN, Fold.SUM])
@pytest.mark.parametrize("softmax", [Softmax.NONE, Softmax.PER_CELL])
def test_cross_scores_fold_the_references_heads(recorded, flux, name, heads, softmax):
    by_heads = flux[name] if softmax is Softmax.NONE else flux[name].softmax(-2)
    wanted = by_heads.sum(2) if heads is Fold.SUM else by_heads.mean(2)
    compare("scores_cross", recorded(name.rsplit(".", 1)[0]).scores("cross", softmax, heads), wanted, SCORES)


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
    run, heat, layers = re.fullmatch(r"(\w+)\.heat_(\w+)\.L(\d+)", name).groups()
    space, normalize, softmax = HEAT[heat]
    view = View(space, tuple(map(int, layers)), (0.5,), normalize=normalize, softmax=softmax)
    cells, blocks = CellStore(), recorded(run).blocks
    for layer, block in enumerate(blocks):
        cells.put(view.cell, layer, 0.5, 0, _scores(block, view))
    maps = cells.read(view, GRID)
    # The helper that takes the softmax of the mean drops the batch axis: it keeps the first image.
    maps = maps[0] if heat == "output_softmax_of_mean" else maps[recorded(run).kept]
    compare(f"heat_{heat}", maps, flux[name], SCORES if heat == "output_raw" else SHARES)


def _scores(block, view):
    return cell_scores(*_vectors(block, view.cell, ConceptTokens(torch.empty(0, 0, 0))), view.cell)


class Given(ConceptAttention):
    """Shows the model the very latents it is given, whatever the level."""

    def noised(self, latents, level, keys, draws):
        return latents, level


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
def read_maps(backbone, evaluation):
    """The package's way from clean latents to maps, with the reference's noise."""

    def read(view, seed, switches=(True, True), background_first=False):
        concepts = evaluation["in.concepts_embedded"]
        extractor = ConceptAttention(backbone, *switches, noise="shared", seed=seed)
        cells = extractor.read_cells(
            evaluation["in.latents"], Prompts(evaluation["in.t5_caption"]),
            ConceptTokens(concepts.roll(-1, 1) if background_first else concepts), ["one"], [view],
        )  # fmt: skip
        return cells.read(view, GRID)[0]

    return read


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
def test_noised_latents_are_the_references_bit_for_bit(backbone, evaluation, k):
    extractor = ConceptAttention(backbone, noise="shared", seed=4)
    noisy, _ = extractor.noised(evaluation["in.latents"], LEVELS[f"k{k}"], ["one"], draws=1)
    compare("noised latents", noisy.float(), evaluation[f"noising.schnell.k{k}.seed4.noisy_latents_bf16_as_f32"], EXACT)


@pytest.mark.parametrize(("case", "seed"), [("k2", 4), ("voc.k3", 0)])
def test_the_model_is_told_the_references_time_and_tokens(backbone, evaluation, case, seed):
    level = evaluation["in.t.voc.k3"][0].item() if case == "voc.k3" else LEVELS[case]
    noisy, told = ConceptAttention(backbone, noise="shared", seed=seed).noised(evaluation["in.latents"], level, ["one"], 1)
    assert told == evaluation[f"in.t_vec.{case}"].item()
    compare("packed tokens", pack(noisy.float()), evaluation[f"in.packed_img.{case}.seed{seed}"], EXACT)


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_shared_noise_is_the_references(evaluation, draw):
    noise = shared_noise((16, 16, 12), 4, draw, "cpu", torch.bfloat16)
    compare("shared noise", noise.float(), evaluation[f"in.noise_bf16_as_f32.seed{4 + draw}"], EXACT)


def test_the_levels_of_the_schedule_are_the_references(evaluation):
    plain, shifted = schedule(4, 48, shifted=False), schedule(4, 48, shifted=True)
    for k in (1, 2, 3):
        compare("schedule tails", torch.tensor(plain[k:]), evaluation[f"in.t.schnell.k{k}"], 1e-6)
    compare("schedule tails", torch.tensor(shifted[3:]), evaluation["in.t.voc.k3"], 1e-6)


def test_a_concept_is_the_first_token_of_its_word(evaluation):
    assert torch.equal(evaluation["in.t5_concepts"][:, 0], evaluation["in.concepts_embedded"][0])


def test_three_cross_draws_differ_from_one_here_though_not_in_the_reference(read_maps, evaluation):
    ours = View("cross", (0, 1, 2), (0.5,), draws=3, softmax=Softmax.PER_CELL)
    one = evaluation["cross.softmax1.n1.k2.L012.map"]
    assert torch.equal(evaluation["cross.softmax1.n3.k2.L012.map"], one)
    assert (read_maps(ours, seed=4) - one).abs().max() > 100 * SHARES


def test_every_tensor_of_the_evaluation_has_a_test():
    assert [n for n in EVALUATION if not n.startswith(("in.", "noising.")) and not n.endswith((".map", ".mask", ".argmax"))] == []
