"""Sensitivity of the golden tests: faults, put into the package one at a time, against the allowed difference.

Every row perturbs the package's own code (or the view, where the rule is one) and names the golden tensors that must notice. Each
of them must be off by more than `WIDE` times what is allowed. `pytest -s` prints the table; docs/golden.md holds it.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdit_runs import (
    GOLDEN,
    SHARES,
    Allowed,
    FluxRun,
    SD3Run,
    evaluation_maps,
    ratios,
    recorded_noise,
    told_recorded_times,
)
from safetensors.torch import load_file
from test_concept_attention import tolerance_of, view_of
from test_daam import CASES, MODULE_TENSORS, OneAttention, held

import conceptseg.backbones.transformers.concept_stream as concept_stream
import conceptseg.backbones.unets.attention_maps as cross_attention
import conceptseg.saliency.cells as cells
import conceptseg.trace.sums as sums
from conceptseg.backbones.encoders.tower import resized_positions
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.transformers.concept_stream import ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone, FluxCarrier
from conceptseg.backbones.transformers.sd3 import SD3Backbone
from conceptseg.backbones.unets.attention_maps import CrossAttention, CrossAttentionTap, kept_heads, kept_rows
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.normalize import softmax_over_tokens
from conceptseg.saliency.views import Fold, Softmax, View

sys.path.insert(0, str(Path(__file__).parents[1] / "formulas"))
import flux_oracle
from test_concept_attention_block import expected, maps_of
from test_concept_attention_block import view_of as view_of_oracle

WIDE = 1000


# ---------------------------------------------------------------- judges: difference over what is allowed, by golden tensor


class Judges:
    def __init__(self, folder):
        for case in ("flux_a", "sd3_a", "sd3_a_dual"):
            (folder / case).mkdir()
            (folder / case / "transformer").symlink_to(GOLDEN / f"{case}_transformer")
        self.flux_backbone = told_recorded_times(FluxBackbone(str(folder / "flux_a")))
        self.sd3_backbones = {c: told_recorded_times(SD3Backbone(str(folder / c))) for c in ("sd3_a", "sd3_a_dual")}
        self.golden = {c: load_file(GOLDEN / f"{c}.safetensors") for c in ("flux_a", "sd3_a", "sd3_a_dual")}
        self.evaluation = load_file(GOLDEN / "flux_a_segmentation.safetensors")

    def flux(self, run, change=lambda run: None):
        found = FluxRun(self.flux_backbone, self.golden["flux_a"], run)
        change(found)
        return ratios(found.compared(self.golden["flux_a"], run))

    def sd3(self, case, run, change=lambda run: None):
        found = SD3Run(self.sd3_backbones[case], self.golden[case], run)
        change(found)
        return {f"{case}.{name}": value for name, value in ratios(found.compared(self.golden[case], run)).items()}

    def maps(self, change=lambda view, *rest: (view, *rest), named=""):
        """Some maps of the released evaluation, with views, seeds, switches and orders changed."""
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("conceptseg.extractors.concept_attention.shared_noise", recorded_noise(self.evaluation))
            names = [n for n in EVALUATED if fnmatch(n, named or "*")]
            return ratios(
                (n, evaluation_maps(self.flux_backbone, self.evaluation, *change(*view_of(n, self.evaluation))),
                 self.evaluation[n], tolerance_of(n)) for n in names
            )  # fmt: skip

    def softmax_of_mean_in_place_of_mean_of_softmaxes(self):
        golden, run = self.golden["flux_a"], FluxRun(self.flux_backbone, self.golden["flux_a"], "gen_t0")
        none = ConceptTokens(torch.empty(0, 0, 0))
        return ratios(
            (name, run.maps(View("output", layers, (0.5,), softmax=Softmax.OF_MEAN), none), golden[name], SHARES)
            for layers, name in (((0, 1, 2), "gen_t0.heat_output_softmax.L012"), ((1, 2), "gen_t0.heat_output_softmax.L12"))
        )

    def guided_oracle(self):
        """A model told the strength of guidance, of which there is no golden run: against the written-out formula."""
        model, given = flux_oracle.random_flux(guidance=True), flux_oracle.inputs(rows=1)
        extractor = ConceptAttention(flux_oracle.wrapped(model), guidance=3.5)
        (got,) = maps_of(extractor, given, [view_of_oracle()])
        wanted = expected(model, extractor, given, view_of_oracle(), flux_oracle.BOTH, 3.5)
        return relative({"guided formula": (got, wanted)}, **flux_oracle.CLOSE)

    def daam_aggregation(self):
        case, tensors = held("aggregation")
        found, size = sums.RunningSums(), (case["side"],) * 2
        places = {}
        for name, maps in tensors.items():
            if name.startswith("in"):
                _, _, layer, head = name.split(".")
                places.setdefault((int(layer[5:]), int(head[4:])), []).append(maps)
        heads = {layer: 1 + max(h for other, h in places if other == layer) for layer, _ in places}
        for (layer, head), updates in places.items():
            for maps in updates:
                found.add(layer, maps[None, None], slice(head, head + 1), heads[layer])
        got = found.mean(size, 0, factors=cross_attention.RELEASED_FACTORS)[: len(case["tokens"]) + 2, ::3, ::3]
        return relative({"aggregation": (got, tensors["global.default"])}, 1e-5, 1e-5)

    def daam_module(self, name, heads_of=kept_heads, rows_of=kept_rows):
        """The maps of one attention module, in one call or two."""
        case = CASES[name]
        tensors = {k.split("/", 1)[1]: v for k, v in MODULE_TENSORS.items() if k.startswith(f"{name}/")}
        host = OneAttention(case)
        attention = host.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        attention.load_state_dict({k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")})
        layer = CrossAttention(3, "down_blocks.0.attentions.0.transformer_blocks.0.attn2", case["heads"], 0)
        guided, collected, side = case["batch"] == 2, [], int(case["n_query"] ** 0.5)
        chosen = range(case["heads"]) if guided else heads_of(case["heads"], "legacy_half_of_heads")

        def on_layer(attended):
            rows = rows_of(case["batch"], guided, "conditional")
            kept = attended.probabilities(rows, slice(chosen.start, chosen.stop))[0]
            collected.append(kept.unflatten(1, (side, side)).permute(0, 3, 1, 2))

        with TapSet(host) as taps, torch.inference_mode():
            CrossAttentionTap([layer], on_layer).attach(taps)
            for call in range(case["calls"]):
                host(tensors[f"call{call}.hidden_states"], tensors[f"call{call}.encoder_hidden_states"], (side, side))
        got, wanted = torch.stack(collected).sum(0)[:, ::3], tensors["maps"]
        return relative({f"{name}.maps": (got.mean(0), wanted.mean(0))}, 1e-5, 1e-5)  # over heads, however many

    def dino_positions(self, rule):
        folder = Path(__file__).parent / "vit_baselines" / "dino_p8"
        positions, wanted = load_file(folder / "weights.safetensors")["pos_embed"], load_file(folder / "outputs.safetensors")
        shown = load_file(folder / "inputs.safetensors")
        side = round((positions.shape[1] - 1) ** 0.5)
        grids = {case: tuple(n // 8 for n in shown[f"{case}.model_input"].shape[-2:]) for case in ("wide", "crop")}
        got = {case: resized_positions(positions[0], 1, (side, side), grid, rule)[None] for case, grid in grids.items()}
        return ratios((f"dino {case}", got[case], wanted[f"{case}.pos_embed"], Allowed(1e-5)) for case in got)


def relative(pairs, atol, rtol):
    return {n: float(((a.double() - b.double()).abs() / (atol + rtol * b.double().abs())).max()) for n, (a, b) in pairs.items()}


EVALUATED = (
    "output.norm0.softmax1.blur0.n1.k2.L012.map", "output.norm1.softmax1.blur1.n3.k2.L12.map",
    "output.keep_head_dim.norm0.softmax1.n1.k2.L012.map", "voc.output.norm1.blur1.L012.map",
    "voc.cross_attention.norm0.blur0.L12.map",
)  # fmt: skip


# ---------------------------------------------------------------- perturbations


@contextmanager
def kept(patched, change):
    """Change what a block keeps for scoring."""
    original = concept_stream.StreamActivations
    patched.setattr(concept_stream, "StreamActivations", lambda **found: original(**{**found, **change(found)}))
    yield


@contextmanager
def attention(patched, change):
    """Change the attention of concepts (and of the image beside them)."""
    original = concept_stream._attention
    patched.setattr(concept_stream, "_attention", lambda queries, seen: change(original, queries, seen))
    yield


@contextmanager
def replaced(patched, place, name, value):
    patched.setattr(place, name, value)
    yield


def without_last_head(original, queries, seen):
    outputs = original(queries, seen).clone()
    outputs[:, :, -1] = 0
    return outputs


def heads_folded_first(concepts, image, kind, *background, **settings):
    scores = torch.matmul(concepts.float(), image.float().transpose(-1, -2))
    if scores.ndim == 4:
        scores = scores.sum(1) if kind.heads is Fold.SUM else scores.mean(1)
    return cells.softmax_over_concepts(scores) if kind.softmax is Softmax.PER_CELL else scores


def last_head_of_scores_dropped(concepts, image, kind, *background, **settings):
    if concepts.ndim == 4:
        concepts, image = concepts[:, :-1], image[:, :-1]
    return SCORES_OF_CELLS(concepts, image, kind, *background, **settings)


SCORES_OF_CELLS = cells.cell_scores


def told_the_captions_vector(self, module, args, kwargs, output):
    self.state["temb"] = output[self.stream.rows]


def told_no_guidance(self, module, args, kwargs, output):
    time, guidance, _ = (a[self.stream.rows] for a in args)
    self.state["temb"] = module.forward(time, torch.zeros_like(guidance), self.stream.pooled.to(output.dtype))


def shift_and_scale_swapped(self, block):
    shift, scale, *others = MODULATION(self, block)
    return scale, shift, *others


MODULATION = FluxCarrier.modulation


def one_layer_on(run):
    run.blocks = run.blocks[1:] + run.blocks[:1]


def zeros_for_the_image(self, noisy, level, prompts, stream=None, guidance=0.0):
    return DENOISE(self, noisy, level, replace(prompts, pooled=None), stream, guidance)


def a_thousandth_later(self, noisy, level, *others, **named):
    return DENOISE(self, noisy, level + 1e-3, *others, **named)


DENOISE = FluxBackbone.denoise


def all_concepts_scored(run):
    """Begin-of-text stands for the first word, and every word for the next."""
    run.concepts = replace(run.concepts, words=run.concepts.words.roll(-1, -1))


@dataclass(frozen=True)
class Row:
    name: str
    judge: Any
    """Judges -> ratios."""
    notice: str
    """Golden tensors that must notice, separated by blanks; * stands for any."""
    perturb: Any = None
    """(monkeypatch) -> context, in which the package is wrong; None where the judge itself asks for something wrong."""


def flux(run="gen_t0", change=lambda run: None):
    return lambda judges: judges.flux(run, change)


def sd3(case="sd3_a_dual", run="t1", change=lambda run: None):
    return lambda judges: judges.sd3(case, run, change)


def maps(named="", **change):
    return lambda judges: judges.maps(lambda view, *rest: (replace(view, **change), *rest), named)


CONCEPTS = "*.concept_out *.concept_q *.concept_k *.concept_v *.scores_output *.heat_output_raw*"
ROWS = [
    Row("image keys kept after rotation", flux(), "*.image_k",
        lambda m: kept(m, lambda f: {"image_keys": f["rotated_image_keys"]})),
    Row("concepts attend to unrotated keys", flux(), CONCEPTS,
        lambda m: replaced(m, FluxCarrier, "rotate_image", lambda self, x: x)),
    Row("keys read for queries, of concepts", flux(), "*.concept_q *.scores_crossqq *.scores_crossmix *.heat_crossqq*",
        lambda m: kept(m, lambda f: {"concept_queries": f["concept_keys"]})),
    Row("keys read for queries, of the image", flux(), "*.image_q *.scores_crossqq *.scores_cross *.heat_crossqq*",
        lambda m: kept(m, lambda f: {"image_queries": f["image_keys"]})),
    Row("values read for outputs", flux(), "*.concept_out *.scores_output *.heat_output*",
        lambda m: kept(m, lambda f: {"concept_outputs": f["concept_values"].flatten(2)})),
    Row("a head of the concepts' attention dropped", flux(), CONCEPTS, lambda m: attention(m, without_last_head)),
    Row("a head left out of per-head scores", flux(), "*.scores_cross",
        lambda m: replaced(m, sys.modules["mmdit_runs"], "cell_scores", last_head_of_scores_dropped)),
    Row("logits not divided by sqrt(d)", flux(), CONCEPTS,
        lambda m: attention(m, lambda original, q, seen: original(q * q.shape[-1] ** 0.5, seen))),
    Row("concepts do not see each other", flux(), CONCEPTS,
        lambda m: attention(m, lambda original, q, seen: original(q, seen[1:]))),
    Row("concepts modulated by the caption's pooled vector", flux(), CONCEPTS,
        lambda m: replaced(m, FluxCarrier, "_condition", told_the_captions_vector)),
    Row("concepts of the port modulated by zeros", lambda j: j.flux("port.gen_t0"), "*.concept_out_proj *.scores",
        lambda m: replaced(m, FluxCarrier, "_condition", lambda self, module, args, kwargs, output: self.state.update(
            temb=module.forward(*args[:-1], torch.zeros_like(args[-1]))))),
    Row("image modulated by a zero pooled vector", flux(), "*.velocity *.image_* *.scores_output",
        lambda m: replaced(m, FluxBackbone, "denoise", zeros_for_the_image)),
    Row("guidance left out for concepts", lambda j: j.guided_oracle(), "guided*",
        lambda m: replaced(m, FluxCarrier, "_condition", told_no_guidance)),
    Row("shift and scale swapped", flux(), CONCEPTS, lambda m: replaced(m, FluxCarrier, "modulation", shift_and_scale_swapped)),
    Row("time off by 1 of 1,000", flux(), "*.velocity *.image_v *.concept_v *.scores_output",
        lambda m: replaced(m, FluxBackbone, "denoise", a_thousandth_later)),
    Row("one layer off", flux(change=one_layer_on), "*.concept_* *.image_* *.scores_* *.heat_*.L2 *.heat_*.L12"),
    Row("softmax over image tokens, not over concepts", flux(), "*.heat_output_softmax.L* *.heat_crossqq*",
        lambda m: replaced(m, cells, "softmax_over_concepts", softmax_over_tokens)),
    Row("softmax of the mean, not mean of softmaxes", lambda j: j.softmax_of_mean_in_place_of_mean_of_softmaxes(), "*"),
    Row("heads folded before the softmax", maps("output.keep_head_dim*"), "*",
        lambda m: replaced(m, sys.modules["conceptseg.extractors.concept_attention"], "cell_scores", heads_folded_first)),
    Row("layers and heads averaged, not summed (VOC)", maps("voc.*", fold=Fold.MEAN), "*"),
    Row("no linear normalisation", maps("*norm1*", normalize=View("output").normalize), "*"),
    Row("no blur", maps("*blur1*", blur=0.0), "*"),
    Row("a draw too few", maps("*n3*", draws=2), "*"),
    Row("unshifted noise level (VOC)", maps("voc.*", timesteps=(0.25,)), "*"),
    Row("another draw of noise", lambda j: j.maps(lambda view, seed, *rest: (view, seed + 1, *rest), "output.*n1*"), "*"),
    Row("background last (VOC)", lambda j: j.maps(lambda view, seed, switches, _: (view, seed, switches, False), "voc.*"), "*"),
    Row("SD3: image reads the prompt, not the concepts", sd3(), "*.image_out *.heat_*",
        lambda m: kept(m, lambda f: {"image_outputs_beside_concepts": lambda: f["image_outputs"]})),
    Row("SD3: a head of the attention dropped", sd3(), "*.concept_out *.image_out *.heat_*",
        lambda m: attention(m, without_last_head)),
    Row("SD3: begin-of-text scored as a word", sd3(change=all_concepts_scored), "*.heat_*"),
    Row("SD3: one layer off", sd3(change=one_layer_on), "*.concept_out *.image_out *.scores_cross_text"),
    Row("SD3: keys read for queries, of the image", sd3(), "*.scores_cross_text",
        lambda m: kept(m, lambda f: {"image_queries": f["image_keys"]})),
    Row("DAAM: a factor too few (4)", lambda j: j.daam_aggregation(), "*",
        lambda m: replaced(m, cross_attention, "RELEASED_FACTORS", (0, 1, 2, 8, 16, 32, 64))),
    Row("DAAM: a factor too many (5)", lambda j: j.daam_aggregation(), "*",
        lambda m: replaced(m, cross_attention, "RELEASED_FACTORS", (0, 1, 2, 4, 5, 8, 16, 32, 64))),
    Row("DAAM: bilinear upsampling", lambda j: j.daam_aggregation(), "*",
        lambda m: replaced(m, sums, "upsample", lambda maps, size, how: cross_attention.upsample(maps, size, "bilinear"))),
    Row("DAAM: the smaller half of 5 heads",
        lambda j: j.daam_module("nocfg_h5_n16", lambda n, rule: range((n + 1) // 2, n)), "*"),
    Row("DAAM: the first half of 5 heads", lambda j: j.daam_module("nocfg_h5_n16", lambda n, rule: range(n - n // 2)), "*"),
    Row("DAAM: rows without the prompt",
        lambda j: j.daam_module("cfg_h5_n16_two_calls", rows_of=lambda n, *_: slice(0, n // 2)), "*"),
    Row("DAAM: softmax over positions", lambda j: j.daam_module("cfg_h5_n16_two_calls"), "*",
        lambda m: replaced(m, cross_attention.Attended, "probabilities", lambda self, rows, heads, *_: torch.einsum(
            "rand,ratd->rant", self.queries[rows, heads] * self.scale, self.keys[rows, heads]).softmax(-2))),
    Row("DINO: timm's resampling of positions", lambda j: j.dino_positions("timm"), "*"),
]  # fmt: skip


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    return Judges(tmp_path_factory.mktemp("golden"))


RIGHT = {
    "flux": flux(), "flux port": flux("port.gen_t0"), "sd3": sd3("sd3_a"), "sd3 dual": sd3(), "evaluation": maps(),
    "guided formula": lambda j: j.guided_oracle(), "daam aggregation": lambda j: j.daam_aggregation(),
    "daam half of heads": lambda j: j.daam_module("nocfg_h5_n16"),
    "daam guided": lambda j: j.daam_module("cfg_h5_n16_two_calls"), "dino": lambda j: j.dino_positions("dino"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_within_what_is_allowed(judges, name):
    found = RIGHT[name](judges)
    print(f"\n| {name}, unperturbed | {max(found.values()):.2f} |", end="")
    assert found and max(found.values()) <= 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_is_wrong_is_far_outside(judges, row, monkeypatch):
    if row.perturb is None:
        found = row.judge(judges)
    else:
        with row.perturb(monkeypatch):
            found = row.judge(judges)
    for pattern in row.notice.split():
        assert any(fnmatch(name, pattern) for name in found), f"no golden tensor is named {pattern}"
    noticing = {n: v for n, v in found.items() if any(fnmatch(n, pattern) for pattern in row.notice.split())}
    least = min(noticing, key=noticing.get)
    print(f"\n| {row.name} | {noticing[least]:,.0f} ({least}) |", end="")
    assert noticing[least] > WIDE


def test_the_documented_table_is_of_these_perturbations():
    written = (Path(__file__).parents[2] / "docs" / "golden.md").read_text().split("## Sensitivity of the golden tests")[1]
    named = [line.split(" | ")[0].removeprefix("| ") for line in written.splitlines() if line.startswith("| ")]
    assert [n for n in named if n not in ("fault", "tensors")] == [*(row.name for row in ROWS), *RIGHT]
