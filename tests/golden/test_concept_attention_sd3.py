"""ConceptAttention on SD3 against the reference implementation (helblazer811/ConceptAttention, commit db30c4d), tensor by tensor.

sd3_a.safetensors holds what the reference's transformer returned; sd3_a_dual.safetensors the same with a second, image-only
attention in two blocks, DERIVED by the file's author since the reference itself can't run it. Every tensor is one test here.
"""

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conceptseg.backbones.transformers.concept_stream import ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.extractors.concept_attention import ConceptAttention, _vectors
from conceptseg.extractors.cross_attention import prompt_scores
from conceptseg.saliency.cells import CellStore, cell_scores
from conceptseg.saliency.normalize import softmax_over_concepts, unit_length
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View

GOLDEN = Path(__file__).parent / "concept_attention"
GRID, LAYERS = (8, 6), 3
VECTORS, SCORES, SHARES = 1e-5, 5e-5, 1e-5  # those of the golden set: float32 with other kernels on both sides
CASES = ["sd3_a", "sd3_a_dual"]
LARGEST = defaultdict(float)


def names(case):
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as opened:
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
def backbones(tmp_path_factory):
    held = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        (folder / "transformer").symlink_to(GOLDEN / f"{case}_transformer")
        held[case] = SD3Backbone(str(folder))
    return held


@pytest.fixture(scope="module")
def given():
    return {case: load_file(GOLDEN / f"{case}.safetensors") for case in CASES}


ROWS = {"t0": slice(0, 1), "t1": slice(0, 1), "batch2": slice(0, 2)}


def tokens_of(golden, rows):
    """The reference's concept tokens: begin-of-text, which travels along and is not scored, then a token a concept."""
    tokens = golden["in.concepts"][rows]
    words = torch.cat([torch.zeros(4, 1), torch.eye(4)], 1).expand(len(tokens), -1, -1)
    return ConceptTokens(tokens, words)


class Recorded:
    """One call of the host: its velocity and the activations of every block."""

    def __init__(self, backbone, golden, run):
        rows = ROWS[run]
        level = golden["in.t"][1:] if run == "t1" else golden["in.t"][rows]
        self.concepts, self.blocks = tokens_of(golden, rows), []
        stream = ConceptStream(self.concepts.tokens, None, lambda layer, found: self.blocks.append(found), LAYERS - 1, stop=False)
        prompts = Prompts(golden["in.txt"][rows], golden["in.pooled"][rows])
        self.velocity = backbone.denoise(golden["in.latents"][rows], level.double() / 1000, prompts, stream)
        self.kept = slice(1, 2) if run == "batch2" else slice(None)  # of two images the file holds the second

    def stacked(self, read):
        return torch.stack([read(block)[self.kept] for block in self.blocks])

    def heat(self, layers, normalize, softmax):
        view = View("output_beside_concepts", layers, (0.5,), normalize=normalize, softmax=softmax)
        cells = CellStore()
        for layer in layers:
            cells.put(view.cell, layer, 0.5, 0, cell_scores(*_vectors(self.blocks[layer], view.cell, self.concepts), view.cell))
        return cells.read(view, GRID)


@pytest.fixture(scope="module")
def recorded(backbones, given):
    held = {}

    def get(case, run):
        if (case, run) not in held:
            held[case, run] = Recorded(backbones[case], given[case], run)
        return held[case, run]

    return get


def every(pattern):
    found = [(case, name) for case in CASES for name in names(case) if re.fullmatch(pattern, name)]
    assert found
    return pytest.mark.parametrize(("case", "name"), found)


@every(r"\w+\.velocity")
def test_the_velocity_is_the_references(recorded, given, case, name):
    run = recorded(case, name.split(".")[0])
    compare(f"{case} velocity", run.velocity[run.kept], given[case][name], VECTORS)


@every(r"\w+\.concept_out")
def test_concept_outputs_are_the_references_begin_of_text_included(recorded, given, case, name):
    got = recorded(case, name.split(".")[0]).stacked(lambda a: a.concept_outputs)
    compare(f"{case} concept_out", got, given[case][name], VECTORS)


@every(r"\w+\.image_out")
def test_image_outputs_are_those_of_attention_to_image_and_concepts(recorded, given, case, name):
    got = recorded(case, name.split(".")[0]).stacked(lambda a: a.image_outputs_beside_concepts())
    compare(f"{case} image_out", got, given[case][name], VECTORS)
    ordinary = recorded(case, name.split(".")[0]).stacked(lambda a: a.image_outputs)
    assert (ordinary - given[case][name]).abs().max() > 1000 * VECTORS


def text_scores(run):
    kind = CellKind("none of the spaces", Normalize.NONE, Softmax.NONE, Fold.MEAN)
    return run.stacked(lambda a: cell_scores(a.text_keys.transpose(1, 2), a.image_queries.transpose(1, 2), kind))


@every(r"\w+\.scores_cross_text")
def test_the_prompts_keys_against_image_queries_are_the_references(recorded, given, case, name):
    compare(f"{case} scores_cross_text", text_scores(recorded(case, name.split(".")[0])), given[case][name], SCORES)


@every(r"(t0|t1|batch2)\.heat_.*")
def test_every_heatmap_is_the_references(recorded, given, case, name):
    run, softmax, layers = re.fullmatch(r"(\w+)\.heat_l2norm_(\w+)\.L(\d+)", name).groups()
    kind = Softmax.NONE if softmax == "raw" else Softmax.PER_CELL
    maps = recorded(case, run).heat(tuple(map(int, layers)), Normalize.UNIT, kind)
    compare(f"{case} heat {softmax}", maps[0], given[case][name], SHARES)  # its heat maps drop the batch: the first image


@every(r"t0\.seg_concept_linnorm_.*")
def test_the_older_segmentation_path_is_the_references(recorded, given, case, name):
    softmax, first, end = re.fullmatch(r"t0\.seg_concept_linnorm_(\w+)\.range(\d)_(\d)", name).groups()
    kind = Softmax.NONE if softmax == "raw" else Softmax.PER_CELL
    maps = recorded(case, "t0").heat(tuple(range(int(first), int(end))), Normalize.LINEAR, kind)
    compare(f"{case} seg {softmax}", maps[0], given[case][name], SCORES if softmax == "raw" else SHARES)


@every(r"t0\.seg_textcross_.*")
def test_the_older_text_cross_attention_is_the_references(recorded, given, case, name):
    first, end = map(int, re.fullmatch(r"t0\.seg_textcross_softmax\.range(\d)_(\d)", name).groups())
    shares = softmax_over_concepts(text_scores(recorded(case, "t0"))[first:end, 0])
    maps = shares.mean(0)[2].unflatten(-1, GRID).expand(4, -1, -1)
    compare(f"{case} seg textcross", maps, given[case][name], SHARES)


@every(r"t0\.seg_textcross_.*")
def test_the_extractor_of_prompt_tokens_gives_the_older_maps(recorded, given, case, name):
    """Its shares of the prompt's third token, from the same call of the host."""
    first, end = map(int, re.fullmatch(r"t0\.seg_textcross_softmax\.range(\d)_(\d)", name).groups())
    third = torch.zeros(1, 1, given[case]["in.txt"].shape[1])
    third[..., 2] = 1
    kind = CellKind("key_query_share", Normalize.NONE, Softmax.NONE, Fold.MEAN)
    maps = recorded(case, "t0").stacked(lambda a: prompt_scores(a, third, kind))[first:end, 0].mean(0)
    compare(f"{case} prompt extractor", maps.unflatten(-1, GRID).expand(4, -1, -1), given[case][name], SHARES)


@every(r"time_avg\..*")
def test_vectors_averaged_over_time_give_the_references_maps(recorded, given, case, name):
    """The released wrapper averages vectors over the steps before it scores them."""
    layers = tuple(map(int, name.rsplit("L", 1)[1]))
    runs = [recorded(case, run) for run in ("t0", "t1")]
    maps = []
    for layer in layers:
        concepts, image = (
            torch.stack([vector(run.blocks[layer])[0] for run in runs]).mean(0)
            for vector in (lambda a: a.concept_outputs, lambda a: a.image_outputs_beside_concepts())
        )
        maps.append(softmax_over_concepts(unit_length(concepts[1:]) @ image.T))
    compare(f"{case} time_avg", torch.stack(maps).mean(0).unflatten(-1, GRID), given[case][name], SHARES)


@pytest.mark.parametrize("case", CASES)
def test_the_concepts_leave_the_velocity_as_it_is(backbones, recorded, given, case):
    golden = given[case]
    prompts = Prompts(golden["in.txt"], golden["in.pooled"])
    plain = backbones[case].denoise(golden["in.latents"], golden["in.t"].double() / 1000, prompts)
    assert torch.equal(recorded(case, "batch2").velocity, plain)


@pytest.mark.parametrize("case", CASES)
def test_the_extractor_reads_the_references_maps_from_latents(backbones, given, case):
    class Given(ConceptAttention):
        def noised(self, latents, level, keys, draws):
            return latents, level

    golden = given[case]
    view = View("output_beside_concepts", (0, 1, 2), (golden["in.t"][0].item() / 1000,), normalize=Normalize.UNIT,
                softmax=Softmax.PER_CELL)  # fmt: skip
    cells = Given(backbones[case]).read_cells(
        golden["in.latents"][:1], Prompts(golden["in.txt"][:1], golden["in.pooled"][:1]), tokens_of(golden, slice(0, 1)),
        ["one"], [view],
    )  # fmt: skip
    compare(f"{case} extractor", cells.read(view, GRID)[0], golden["t0.heat_l2norm_softmax.L012"], SHARES)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_of_a_case_has_a_test(case):
    read = r"(velocity|concept_out|image_out|scores_cross_text|heat_.*|seg_concept_linnorm_.*|seg_textcross_.*)"
    left = [n for n in names(case) if not n.startswith("in.") and not re.fullmatch(rf"\w+\.{read}", n)]
    assert left == []
