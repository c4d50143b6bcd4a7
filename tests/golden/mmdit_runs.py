"""FLUX and SD3 on the golden weights: what one run yields for every golden tensor, and how far it may be from it.

Both families tell the time by sines of t·f, with t up to 1,000 and f = 10000^(-k/128) in float32. Processors' exponentials differ
by one unit in the last place of f, which is within their accuracy, and that alone moves FLUX's scores by 6e-5 and SD3's velocity
by 1.2e-5: more than all other rounding of a run together. So runs that are judged here are told the time with the frequencies
that the golden tensors were made with (`RecordedTimes`). What is left is the order of summation, a few units in the last place of
a tensor's largest value on any processor, and that is what is allowed (`Allowed`).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conceptseg.backbones.latents import unpack
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention, _vectors
from conceptseg.saliency.cells import CellStore, cell_scores
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View

GOLDEN = Path(__file__).parent / "concept_attention"
GRID = (8, 6)


def names(file):
    with safe_open(GOLDEN / f"{file}.safetensors", "pt") as opened:
        return list(opened.keys())


# ---------------------------------------------------------------- the time


class RecordedTimes(nn.Module):
    """Cosines and sines of a time in 0..1000 as the golden tensors' were, [R] -> [R 256]; in place of a stock `time_proj`.

    Frequencies are the correctly rounded exponentials but for number 13, 10000^(-13/128), whose upper neighbour (0.53 units away)
    was taken: a least-squares fit of all phases to SD3's tensors at t = 815 gives 1.01 units for this one and less than 0.3 for
    each of the 23 others whose phases move the tensors as much. The rest is float64 rounded once, the same on every processor.
    """

    frequencies = torch.exp((-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).double()).float()
    frequencies[13] = torch.nextafter(frequencies[13], torch.tensor(1.0))

    def forward(self, times):
        phases = (times.float()[:, None] * self.frequencies).double()
        return torch.cat([phases.cos(), phases.sin()], -1).float()


def told_recorded_times(backbone):
    """The same backbone, its stock transformer's sines replaced."""
    backbone.transformer.time_text_embed.time_proj = RecordedTimes()
    return backbone


# ---------------------------------------------------------------- the judgement


@dataclass(frozen=True)
class Allowed:
    """A float32 tensor's largest difference: `absolute`, and no more than `units` in the last place of its largest value.

    Calibrated: with the recorded times, the largest difference is 11 units on both kinds of kernel that .ci/run tries.
    """

    absolute: float
    units: float = math.inf

    def of(self, wanted):
        scale = wanted.double().abs().max().item()
        return self.absolute if math.isinf(self.units) else min(self.absolute, self.units * 2**-23 * scale)


VECTORS = Allowed(1e-5, units=24)
SCORES = Allowed(5e-5, units=24)  # dot products over up to 48 features, of magnitude 10 and more
SUMS = Allowed(2e-4, units=24)  # VOC maps: scores summed over layers and heads, of magnitude 100
QUOTIENTS = Allowed(2e-5)  # normalised by sums over concepts, some of which are small
SHARES = Allowed(1e-5)  # softmaxed maps lie in 0..1; their error is that of scores, whatever their own scale
EXACT = Allowed(0.0)  # inputs and decisions: the map nearest to its cut is 1.8e-5 away from it


def difference(got, wanted):
    assert got.shape == wanted.shape, f"{tuple(got.shape)} for {tuple(wanted.shape)}"
    return (got.double() - wanted.double()).abs().max().item()


def same_draws(got, wanted):
    """Whether bfloat16 noise is a recorded one, but for a value in a thousand whose last place a processor rounds otherwise.

    Generators make normal draws of cosines and logarithms in float32; two kinds of kernel differ in 41 of 400,000 values.
    """
    off = (got - wanted).abs()
    return bool((off <= 2**-7 * wanted.abs() + 2**-20).all()) and int((off > 0).sum()) <= wanted.numel() / 1000


class Judgement:
    """Compares tensors and keeps, by family, the comparison that came nearest to failing."""

    def __init__(self):
        self.nearest = {}

    def compare(self, family, got, wanted, allowed):
        found, limit = difference(got, wanted), allowed.of(wanted)
        self.nearest[family] = max(self.nearest.get(family, (0.0, 0.0, 0.0)), (found / limit if limit else found, found, limit))
        assert found <= limit, f"{family}: {found:.2e}, allowed {limit:.1e}"

    def __str__(self):
        rows = sorted(self.nearest.items())
        return "".join(f"\n{f:45} {found:.1e} of {limit:.1e} ({share:.2f})" for f, (share, found, limit) in rows)


def ratios(compared):
    """Difference over what is allowed, by name, of (name, got, wanted, allowed); what isn't finite is infinitely far."""
    off = {name: difference(got, wanted) / allowed.of(wanted) for name, got, wanted, allowed in compared}
    return {name: math.inf if math.isnan(value) else value for name, value in off.items()}


# ---------------------------------------------------------------- FLUX

SWITCHES = {"abl_cross": (True, False), "abl_self": (False, True), "abl_neither": (False, False)}
HEAT = {
    "output_raw": ("output", Normalize.NONE, Softmax.NONE),
    "output_softmax": ("output", Normalize.NONE, Softmax.PER_CELL),
    "output_softmax_of_mean": ("output", Normalize.NONE, Softmax.OF_MEAN),
    "output_linnorm_softmax": ("output", Normalize.LINEAR, Softmax.PER_CELL),
    "crossqq_softmax": ("cross_query_query", Normalize.NONE, Softmax.PER_CELL),
}


def by_head(x):
    return x.transpose(1, 2)


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
SCORED = {
    "scores_output": "output", "scores_crossqq": "cross_query_query", "scores_crossmix": "cross_mixed",
    "scores": "output_projected",
}  # fmt: skip


def scores_of(block, view, concepts):
    return cell_scores(*_vectors(block, view.cell, concepts), view.cell)


class Run:
    """One run of a host with its concept stream: the velocity, the activations of every block, and golden tensors' names."""

    kept: slice  # of two images the golden file holds the second

    def stacked(self, read):
        """Read off all three layers, [K B ...]."""
        return torch.stack([read(block)[self.kept] for block in self.blocks])

    def maps(self, view, concepts):
        """A view's maps of all images."""
        cells = CellStore()
        for layer in view.layers:
            cells.put(view.cell, layer, view.timesteps[0], 0, scores_of(self.blocks[layer], view, concepts))
        return cells.read(view, GRID)


class FluxRun(Run):
    """name: a run of flux_a.safetensors, which says what the model is told."""

    def __init__(self, backbone, golden, name):
        rows = slice(0, 2) if name == "batch2" else slice(0, 1)
        level = golden["in.timesteps"][1:] if name.endswith("_t1") else golden["in.timesteps"][rows]
        zeros = torch.zeros(len(level), 24)
        pooled = golden["in.y_pooled"][rows] if name in ("gen_t0", "batch2", "port.gen_t0") else zeros
        cross, own = SWITCHES.get(name, (True, True))
        self.blocks = []
        stream = ConceptStream(
            golden["in.concepts"][rows],
            # The reference's main code gives concepts a zero pooled vector, its diffusers port a real one.
            golden["port.in.pooled_concepts_gen"] if name == "port.gen_t0" else zeros,
            lambda layer, found: self.blocks.append(found),
            last_layer=2, cross_attention=cross, self_attention=own, stop=False,
        )  # fmt: skip
        noisy = unpack(golden["in.img"][rows], GRID)
        self.velocity = backbone.denoise(noisy, level, Prompts(golden["in.txt"][rows], pooled), stream)
        self.kept = slice(1, 2) if name == "batch2" else slice(None)

    def scores(self, space, softmax=Softmax.NONE, heads=Fold.MEAN):
        """Cells of all three layers, [K B C L], through the package's own spaces."""
        kind = CellKind(space, Normalize.NONE, softmax, heads)
        return self.stacked(lambda block: cell_scores(*SPACES[space][1](block), kind))

    def read(self, tensor):
        """(ours, what is allowed) for a golden tensor's name without its run's: velocity, vectors, scores, heat maps."""
        if tensor == "velocity":
            return self.velocity[self.kept], VECTORS
        if tensor in VECTOR_READERS:
            return self.stacked(VECTOR_READERS[tensor]), VECTORS
        if tensor in SCORED:
            return self.scores(SCORED[tensor]), SCORES
        heat, layers = re.fullmatch(r"heat_(\w+)\.L(\d+)", tensor).groups()
        space, normalize, softmax = HEAT[heat]
        view = View(space, tuple(map(int, layers)), (0.5,), normalize=normalize, softmax=softmax)
        maps = self.maps(view, ConceptTokens(torch.empty(0, 0, 0)))
        # The helper that takes the softmax of the mean drops the batch axis: it keeps the first image.
        maps = maps[0] if heat == "output_softmax_of_mean" else maps[self.kept]
        return maps, SCORES if heat == "output_raw" else SHARES

    def compared(self, golden, name):
        """Every golden tensor of this run, as `ratios` wants them."""
        for key in golden:
            tensor = key.removeprefix(f"{name}.")
            if tensor == "scores_cross":  # head by head in the file
                yield key, self.scores("cross"), golden[key].mean(2), SCORES
            elif key.startswith(f"{name}.") and not tensor.startswith("scores_util_"):
                got, allowed = self.read(tensor)
                yield key, got, golden[key], allowed


def recorded_noise(evaluation):
    """Return a `shared_noise` that yields the draws of the reference, since other processors round some of them differently."""
    held = {seed: evaluation[f"in.noise_bf16_as_f32.seed{seed}"] for seed in (4, 5, 6)}
    held[0] = load_file(GOLDEN / "pieces.safetensors")["noise.seed0.bf16_as_f32"]
    return lambda shape, seed, draw, device, dtype: held[seed + draw].to(dtype).view(1, *shape)


def evaluation_maps(backbone, evaluation, view, seed, switches=(True, True), background_first=False):
    """The package's way from clean latents to maps."""
    concepts = evaluation["in.concepts_embedded"]
    extractor = ConceptAttention(backbone, *switches, noise="shared", seed=seed)
    cells = extractor.read_cells(
        evaluation["in.latents"], Prompts(evaluation["in.t5_caption"]),
        ConceptTokens(concepts.roll(-1, 1) if background_first else concepts), ["one"], [view],
    )  # fmt: skip
    return cells.read(view, GRID)[0]


class Given(ConceptAttention):
    """Shows the model the very latents it is given, whatever the level."""

    def noised(self, latents, level, keys, draws):
        return latents, level


# ---------------------------------------------------------------- SD3

SD3_ROWS = {"t0": slice(0, 1), "t1": slice(0, 1), "batch2": slice(0, 2)}


def tokens_of(golden, rows):
    """The reference's concept tokens: begin-of-text, which travels along and is not scored, then a token a concept."""
    tokens = golden["in.concepts"][rows]
    words = torch.cat([torch.zeros(4, 1), torch.eye(4)], 1).expand(len(tokens), -1, -1)
    return ConceptTokens(tokens, words)


class SD3Run(Run):
    """name: a run of sd3_a.safetensors or sd3_a_dual.safetensors."""

    def __init__(self, backbone, golden, name):
        rows = SD3_ROWS[name]
        level = golden["in.t"][1:] if name == "t1" else golden["in.t"][rows]
        self.concepts, self.blocks = tokens_of(golden, rows), []
        stream = ConceptStream(self.concepts.tokens, None, lambda layer, found: self.blocks.append(found), 2, stop=False)
        prompts = Prompts(golden["in.txt"][rows], golden["in.pooled"][rows])
        self.velocity = backbone.denoise(golden["in.latents"][rows], level.double() / 1000, prompts, stream)
        self.kept = slice(1, 2) if name == "batch2" else slice(None)

    def text_scores(self):
        """The prompt's keys against the image's queries, [K B N L]."""
        kind = CellKind("none of the spaces", Normalize.NONE, Softmax.NONE, Fold.MEAN)
        return self.stacked(lambda a: cell_scores(by_head(a.text_keys), by_head(a.image_queries), kind))

    def heat(self, layers, normalize, softmax):
        view = View("output_beside_concepts", layers, (0.5,), normalize=normalize, softmax=softmax)
        return self.maps(view, self.concepts)

    def read(self, tensor):
        """(ours, what is allowed) for a golden tensor's name without its run's: velocity, outputs, scores, heat maps."""
        if tensor == "velocity":
            return self.velocity[self.kept], VECTORS
        if tensor == "concept_out":
            return self.stacked(lambda a: a.concept_outputs), VECTORS
        if tensor == "image_out":
            return self.stacked(lambda a: a.image_outputs_beside_concepts()), VECTORS
        if tensor == "scores_cross_text":
            return self.text_scores(), SCORES
        softmax, layers = re.fullmatch(r"heat_l2norm_(\w+)\.L(\d+)", tensor).groups()
        kind = Softmax.NONE if softmax == "raw" else Softmax.PER_CELL
        maps = self.heat(tuple(map(int, layers)), Normalize.UNIT, kind)
        return maps[0], VECTORS if softmax == "raw" else SHARES  # its heat maps drop the batch: the first image

    def compared(self, golden, name):
        """Every golden tensor of this run but the older segmentation paths', as `ratios` wants them."""
        for key in golden:
            tensor = key.removeprefix(f"{name}.")
            if key.startswith(f"{name}.") and not tensor.startswith("seg_"):
                got, allowed = self.read(tensor)
                yield key, got, golden[key], allowed
