"""Measure tracing: processor time of a U-Net call and peak memory, against an untraced U-Net and explicit probabilities.

The U-Nets have Stable Diffusion 2's grids, layers and heads at 512 pixels (15 layers, 175 pairs) and SDXL's at 512 pixels
(60 layers, 1,100 pairs), so maps are as large as there; heads are 8 wide instead of 64, so the U-Net's own time is far smaller
and tracing's share of it an upper bound. "explicit" computes every cross-attention's probabilities in a processor of its own,
sums all 77 tokens' maps, and lists and stacks the enlarged maps at the end, as the original tracer does. All variants run in one
process, one call after the other, round by round, on images of 256 pixels; a ratio is that of one round. Memory is the peak of
what tensors take at 512 pixels, by the allocator's own records, less that of the untraced calls.

    python benchmarks/speed/daam_tracing.py [rounds]
"""

import sys
import time
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from diffusers import UNet2DConditionModel

from conceptseg.backbones.unets.attention_maps import cross_attentions, upsample
from conceptseg.trace import Trace
from conceptseg.trace.calls import Call

PROMPT = 12  # start token, ten tokens of a prompt, end token
TEXT = 77
STEPS = 2  # calls that memory is measured over
TIMED, MEASURED = 32, 64  # sides of latents
FOUR = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": (5, 10, 20, 20), "block_out_channels": (40, 80, 160, 160), "sample_size": 64,
}  # fmt: skip
THREE = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20), "block_out_channels": (40, 80, 160), "sample_size": 128,
}  # fmt: skip
MODELS = {"SD 2": FOUR, "SDXL": THREE}


class Pipe:
    """Minimal pipeline for a trace; the prompt is given by hand."""

    vae_scale_factor, tokenizer = 8, "none is needed"

    def __init__(self, unet):
        self.unet = unet

    def encode_prompt(self):
        raise AssertionError("a trace reads the prompt that Pipe was given by hand")


class Explicit:
    """The original's way: probabilities in the open, sums of every token's map."""

    def __init__(self, sums):
        self.sums = sums

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        parts = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        side = round(probabilities.shape[2] ** 0.5)
        maps = probabilities[1].transpose(1, 2).unflatten(-1, (side, side)).float()
        self.sums[id(attn)] = self.sums[id(attn)] + maps if id(attn) in self.sums else maps.clone()
        return attn.to_out[0](torch.matmul(probabilities, v).transpose(1, 2).flatten(2))


@contextmanager
def untraced(unet):
    yield lambda: None


@contextmanager
def traced(unet, keep):
    tracer = Trace(Pipe(unet), keep=keep, exclude_factor=None)
    with tracer:
        tracer._start(Call(None, 1, True, PROMPT))
        yield lambda: tracer.prompt_maps()


@contextmanager
def explicit(unet):
    sums, stock = {}, unet.attn_processors
    wanted = {f"{one.path}.processor" for one in cross_attentions(unet.config) if not one.path.startswith("mid")}
    unet.set_attn_processor({name: Explicit(sums) if name in wanted else one for name, one in stock.items()})
    try:
        yield lambda: torch.stack([upsample(one, (64, 64), "bicubic_clamped") for maps in sums.values() for one in maps]).mean(0)
    finally:
        unet.set_attn_processor(stock)


VARIANTS = {
    "untraced": untraced,
    "traced, one map": lambda unet: traced(unet, "map"),
    "traced, all pairs": lambda unet: traced(unet, "pairs"),
    "explicit, as the original": explicit,
}


def peak_bytes(work):
    """The most that tensors took at a time while the work ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profiled:
        work()
    now = most = 0
    changes = [one for one in profiled.profiler.kineto_results.events() if one.name() == "[memory]"]
    for change in sorted(changes, key=lambda one: one.start_ns()):
        now += change.nbytes()
        most = max(most, now)
    return most


def run(unet, said, variant, calls):
    """Processor seconds of the calls and of the map at the end; other work on the machine counts less than in wall seconds."""
    with VARIANTS[variant](unet) as finish, torch.inference_mode():
        started = time.process_time()
        for _ in range(calls):
            unet(**said, return_dict=False)
        called = time.process_time()
        finish()
        return called - started, time.process_time() - called


def build(settings):
    torch.manual_seed(0)
    settings = {"layers_per_block": 2, "cross_attention_dim": 64, "norm_num_groups": 8, "use_linear_projection": True, **settings}
    unet = UNet2DConditionModel(**settings).eval().requires_grad_(False)
    return unet


def inputs(side):
    """A guided call for one image: rows without and with the prompt."""
    return {"sample": torch.randn(2, 4, side, side), "timestep": 500, "encoder_hidden_states": torch.randn(2, TEXT, 64)}


def report(model, seconds, peaks):
    """Lines of one model: seconds and peak bytes by variant."""
    above = {variant: (peak - peaks["untraced"]) / 2**20 for variant, peak in peaks.items()}
    print(f"\n{model:27}{'s a call':>9}{'over untraced: min':>20}{'median':>8}{'max':>8}{'s the map':>11}", end="")
    print(f"{'MB above':>10}{'of explicit':>13}")
    for variant, found in seconds.items():
        over = sorted(call / plain for (call, _), (plain, _) in zip(found, seconds["untraced"], strict=True))
        print(f"{variant:27}{median(call for call, _ in found):9.2f}{over[0]:20.3f}{median(over):8.3f}{over[-1]:8.3f}", end="")
        share = above[variant] / above["explicit, as the original"]
        print(f"{median(last for _, last in found):11.2f}{above[variant]:10.1f}{share:13.1%}")


def main(rounds):
    print(f"{rounds} rounds after one that is not counted; {torch.get_num_threads()} threads, torch {torch.__version__}")
    for model, settings in MODELS.items():
        unet, timed, measured = build(settings), inputs(TIMED), inputs(MEASURED)
        seconds = {variant: [] for variant in VARIANTS}
        for variant in VARIANTS:
            run(unet, timed, variant, 1)
        for _ in range(rounds):
            for variant, found in seconds.items():
                found.append(run(unet, timed, variant, 1))
        peaks = {variant: peak_bytes(partial(run, unet, measured, variant, STEPS)) for variant in VARIANTS}
        report(model, seconds, peaks)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
