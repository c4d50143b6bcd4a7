"""The vision-transformer baselines against what the reference codes returned on tiny random networks (vit_baselines).

Chefer's family: Transformer-Explainability c3e578f and ConceptAttention's wrappers at db30c4d. Tolerances are the judge's own
(tolerances.json): wide in float32 for relevance, which divides by signed activations, and 1e-9 in float64.
"""

import json
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import activations, task, write_vit

from conceptseg.backbones.encoders.relevance import relevance_graph, token_relevance
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.extractors.attention_gradcam import AttentionGradCAM
from conceptseg.extractors.lrp import LRP
from conceptseg.extractors.partial_lrp import PartialLRP
from conceptseg.extractors.rollout import Rollout
from conceptseg.extractors.self_attention import SelfAttention
from conceptseg.extractors.transinterp import TransInterp
from conceptseg.segment.resize import bilinear, nearest_floor
from conceptseg.segment.threshold import above_mean
from conceptseg.types import Batch

ROOT = Path(__file__).parent / "vit_baselines"
TOLERANCES = json.loads((ROOT / "tolerances.json").read_text())
CASES = ("chefer_img32_p8", "chefer_img48_p8", "chefer_wrapper_224")
NAMES = [f"c{number}" for number in range(10)]

# (the judge's tensor, the method, its settings); relevance networks of the reference have another epsilon in their last norm.
METHODS = {
    "CheferLRP": (LRP, {"rules": "orig"}),
    "CheferFullLRP": (LRP, {"rules": "new"}),
    "CheferLastLayerLRP": (PartialLRP, {"rules": "new"}),
    "upstream_lrp_last_layer": (PartialLRP, {"rules": "orig"}),
    "CheferTransformerAttribution": (TransInterp, {"start_layer": 1}),
    "transformer_attribution_start0": (TransInterp, {"start_layer": 0}),
    "CheferLastLayerAttention": (SelfAttention, {}),
    "CheferRollout": (Rollout, {"start_layer": 1}),
    "rollout_start0": (Rollout, {"start_layer": 0}),
    "CheferAttentionGradCAM": (AttentionGradCAM, {}),
}
# Full LRP of 224 pixels is 0.2 or 0.4 MB a map: each rule set is kept in one precision there.
NOT_KEPT = {("chefer_wrapper_224", "float32"): "CheferLRP", ("chefer_wrapper_224", "float64"): "CheferFullLRP"}
RELEVANCE = (LRP, PartialLRP, TransInterp)
CLASSLESS = (SelfAttention, Rollout)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Name of the case, its tensors, its image as a task, and a maker of backbones."""
    folder = ROOT / request.param
    about = json.loads((folder / "config.json").read_text())
    sizes = {k: v for k, v in about["model"].items() if k not in ("kind", "num_classes", "class_token", "global_pool")}
    saved = write_vit(
        tmp_path_factory.mktemp(request.param), load_file(folder / "weights.safetensors"), classes=10, labels=NAMES, **sizes
    )
    image = load_file(folder / "inputs.safetensors")["image_u8"].permute(1, 2, 0).numpy()
    predicted, given = about["class_predicted"], about["class_given"]

    @cache
    def loaded(dtype, relevance):
        made = ViTBackbone(str(saved), "class labels", dtype=dtype)
        if relevance:
            made.model.norm.eps = about["layernorm_eps"]["final norm in ViT_LRP / ViT_orig_LRP"]
        return made

    def backbone(dtype, kind):
        return loaded(dtype, kind in RELEVANCE)

    return request.param, folder, image, {"pred": predicted, "given": given}, backbone


def relative(got, wanted):
    got, wanted = got.double().flatten(), wanted.double().flatten()
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def minmaxed(maps):
    return (maps - maps.min()) / (maps.max() - maps.min())


def computed(case, name, which, dtype):
    """One map, [h w], as the reference returns it, in the backbone's own precision."""
    _, _, image, classes, backbone = case
    kind, settings = METHODS[name]
    if kind in CLASSLESS:
        method, word = kind(backbone(dtype, kind), **settings), NAMES[0]
    elif which == "pred":
        method, word = kind(backbone(dtype, kind), **settings), NAMES[(classes["pred"] + 1) % 10]  # what is asked for is ignored
    else:
        method, word = kind(backbone(dtype, kind), **settings, explained_class="given"), NAMES[classes["given"]]
    maps = method.saliency(Batch((task(image, (word, "grass"), (1, 0)),)))[0, 0]
    return minmaxed(maps) if name == "CheferAttentionGradCAM" else maps


def asked(case, dtype):
    given = [n for n in METHODS if METHODS[n][0] not in CLASSLESS] if case[3]["given"] else []
    return [(n, w) for w, names in (("pred", METHODS), ("given", given)) for n in names if n != NOT_KEPT.get((case[0], dtype))]


def test_maps_in_float64_are_the_references(case):
    wanted = load_file(case[1] / "maps_float64.safetensors")
    off = {f"{w}.{n}": relative(computed(case, n, w, "float64"), wanted[f"{w}.{n}.raw"]) for n, w in asked(case, "float64")}
    print(case[0], {k: f"{v:.0e}" for k, v in off.items()})
    assert {k: v for k, v in off.items() if v > 1e-9} == {}


def test_maps_in_float32_are_the_references_within_its_own_band(case):
    wanted, allowed = load_file(case[1] / "maps.safetensors"), TOLERANCES[case[0]]
    off = {}
    for name, which in asked(case, "float32"):
        key = f"{which}.{name}.raw"
        kind, tolerance = allowed[key]
        assert kind == "rel"
        off[key] = relative(computed(case, name, which, "float32"), wanted[key]) / tolerance
    print(case[0], {k: f"{v:.2f} of the band" for k, v in off.items()})
    assert {k: v for k, v in off.items() if v > 1} == {}


def test_masks_cut_at_the_mean_are_the_wrappers_and_upstreams(case):
    """The wrapper enlarges by the nearest rule and cuts the raw map; upstream enlarges bilinearly and cuts the min-maxed map."""
    wanted = {**load_file(case[1] / "maps.safetensors"), **load_file(case[1] / "maps_float64.safetensors")}
    size = case[2].shape[:2]
    for name in ("CheferLastLayerAttention", "CheferRollout", "CheferAttentionGradCAM", "CheferTransformerAttribution"):
        maps = computed(case, name, "pred", "float64").numpy()
        wrapper = above_mean(nearest_floor(maps, size))
        assert np.array_equal(wrapper, np.unpackbits(wanted[f"pred.{name}.mask"].numpy(), axis=-1)), name
        if f"pred.{name}.upstream_mask" in wanted:
            upstream = above_mean(minmaxed(bilinear(maps[None].astype(np.float32), size)[0]))
            assert np.array_equal(upstream, np.unpackbits(wanted[f"pred.{name}.upstream_mask"].numpy(), axis=-1)), name


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_every_class_can_be_given(case):
    wanted = load_file(case[1] / "maps_float64.safetensors")
    _, _, image, _, backbone = case
    for kind, settings, key in (
        (AttentionGradCAM, {}, "all_classes.gradcam_prenorm"),
        (TransInterp, {}, "all_classes.CheferTransformerAttribution"),
        (PartialLRP, {"rules": "orig"}, "all_classes.upstream_lrp_last_layer"),
        (PartialLRP, {"rules": "new"}, "all_classes.CheferLastLayerLRP"),
    ):
        method = kind(backbone("float64", kind), **settings, explained_class="given")
        shown = Batch((task(image, NAMES, range(1, 11)),))
        for number, maps in enumerate(method.saliency(shown)[0]):
            if wanted[key][number].any():
                assert relative(maps, wanted[key][number]) <= 1e-9, (key, number)
            else:
                assert not maps.any()


@pytest.mark.parametrize("case", CASES[:2], indirect=True)
def test_relevance_of_every_block_is_the_references(case):
    wanted, sums = load_file(case[1] / "intermediates.safetensors"), load_file(case[1] / "maps_float64.safetensors")
    backbone = case[4]("float64", LRP)
    images = backbone.images([task(case[2])])
    for (which, index), (rules, letter) in product(case[3].items(), (("new", "A"), ("orig", "B"))):
        if f"{which}.{letter}.R_blocks" in wanted:
            graph = relevance_graph(backbone.tower, activations(backbone, images), backbone.model.head.weight[index][None], rules)
            found = graph.relevance_of(*reversed(graph.inputs), keep=True)
            # float64 against a float32 record: the record's own distance from float64 is its tolerance.
            for block, (got, held) in enumerate(zip(found, wanted[f"{which}.{letter}.R_blocks"], strict=False)):
                if block:  # at the final norm the reference's record stands behind the norm, where relevance is the same
                    assert relative(got[0], held) <= TOLERANCES[case[0]][f"{which}.{letter}.R_blocks"][1] * 10
            of_tokens = token_relevance(backbone.tower, images, found[-1], rules)
            totals = torch.stack([r.sum() for r in (*found, of_tokens)])
            torch.testing.assert_close(totals, sums[f"{which}.{letter}.relevance_sums"][2 : 2 + len(totals)], rtol=1e-8, atol=0)
