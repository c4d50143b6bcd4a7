"""ConceptAttention on SD3 against the reference implementation (helblazer811/ConceptAttention, commit db30c4d), tensor by tensor.

sd3_a.safetensors holds what the reference's transformer returned; sd3_a_dual.safetensors the same with a second, image-only
attention in two blocks, DERIVED by the file's author since the reference itself can't run it. Every tensor is one test here.
"""

import re

import pytest
import torch
from mmdit_runs import (
    GOLDEN,
    GRID,
    QUOTIENTS,
    SHARES,
    VECTORS,
    Given,
    Judgement,
    SD3Run,
    difference,
    names,
    ratios,
    tokens_of,
    told_recorded_times,
)
from safetensors.torch import load_file

from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.extractors.cross_attention import prompt_scores
from conceptseg.saliency.normalize import softmax_over_concepts, unit_length
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View

CASES = ["sd3_a", "sd3_a_dual"]
JUDGEMENT = Judgement()
compare = JUDGEMENT.compare


@pytest.fixture(scope="module", autouse=True)
def printed_differences():
    yield
    print(JUDGEMENT, end="")


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    held = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        (folder / "transformer").symlink_to(GOLDEN / f"{case}_transformer")
        held[case] = SD3Backbone(str(folder))
    return held


@pytest.fixture(scope="module")
def backbones(stock):
    return {case: told_recorded_times(SD3Backbone(backbone.checkpoint.path)) for case, backbone in stock.items()}


@pytest.fixture(scope="module")
def given():
    return {case: load_file(GOLDEN / f"{case}.safetensors") for case in CASES}


@pytest.fixture(scope="module")
def recorded(backbones, given):
    held = {}

    def get(case, run):
        if (case, run) not in held:
            held[case, run] = SD3Run(backbones[case], given[case], run)
        return held[case, run]

    return get


def every(pattern):
    found = [(case, name) for case in CASES for name in names(case) if re.fullmatch(pattern, name)]
    assert found
    return pytest.mark.parametrize(("case", "name"), found)


def judged(recorded, given, case, name, family):
    run, tensor = name.split(".", 1)
    got, allowed = recorded(case, run).read(tensor)
    compare(f"{case} {family}", got, given[case][name], allowed)


@every(r"\w+\.velocity")
def test_the_velocity_is_the_references(recorded, given, case, name):
    judged(recorded, given, case, name, "velocity")


@every(r"\w+\.concept_out")
def test_concept_outputs_are_the_references_begin_of_text_included(recorded, given, case, name):
    judged(recorded, given, case, name, "concept_out")


@every(r"\w+\.image_out")
def test_image_outputs_are_those_of_attention_to_image_and_concepts(recorded, given, case, name):
    judged(recorded, given, case, name, "image_out")
    ordinary = recorded(case, name.split(".")[0]).stacked(lambda a: a.image_outputs)
    assert difference(ordinary, given[case][name]) > 1000 * VECTORS.of(given[case][name])


@every(r"\w+\.scores_cross_text")
def test_the_prompts_keys_against_image_queries_are_the_references(recorded, given, case, name):
    judged(recorded, given, case, name, "scores_cross_text")


@every(r"(t0|t1|batch2)\.heat_.*")
def test_every_heatmap_is_the_references(recorded, given, case, name):
    judged(recorded, given, case, name, f"heat {'raw' if '_raw' in name else 'softmax'}")


@every(r"t0\.seg_concept_linnorm_.*")
def test_the_older_segmentation_path_is_the_references(recorded, given, case, name):
    softmax, first, end = re.fullmatch(r"t0\.seg_concept_linnorm_(\w+)\.range(\d)_(\d)", name).groups()
    kind = Softmax.NONE if softmax == "raw" else Softmax.PER_CELL
    maps = recorded(case, "t0").heat(tuple(range(int(first), int(end))), Normalize.LINEAR, kind)
    compare(f"{case} seg {softmax}", maps[0], given[case][name], QUOTIENTS if softmax == "raw" else SHARES)


@every(r"t0\.seg_textcross_.*")
def test_the_older_text_cross_attention_is_the_references(recorded, given, case, name):
    first, end = map(int, re.fullmatch(r"t0\.seg_textcross_softmax\.range(\d)_(\d)", name).groups())
    shares = softmax_over_concepts(recorded(case, "t0").text_scores()[first:end, 0])
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


@pytest.mark.parametrize("run", ["t0", "t1", "batch2"])
@pytest.mark.parametrize("case", CASES)
def test_a_stock_models_sines_move_tensors_no_more_than_frequencies_can(stock, given, case, run):
    """One unit in the last place of some frequency is what may separate this processor's runs from the reference's."""
    for name, off in ratios(SD3Run(stock[case], given[case], run).compared(given[case], run)).items():
        assert off <= 4, f"{name}: {off:.2f} of what is allowed with the recorded frequencies"


@pytest.mark.parametrize("case", CASES)
def test_the_concepts_leave_the_velocity_as_it_is(backbones, recorded, given, case):
    golden = given[case]
    prompts = Prompts(golden["in.txt"], golden["in.pooled"])
    plain = backbones[case].denoise(golden["in.latents"], golden["in.t"].double() / 1000, prompts)
    assert torch.equal(recorded(case, "batch2").velocity, plain)


@pytest.mark.parametrize("case", CASES)
def test_the_extractor_reads_the_references_maps_from_latents(backbones, given, case):
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
