"""What tracing costs: time a call of the U-Net and peak memory, against the untraced U-Net and explicit probabilities.

The U-Net has Stable Diffusion 1's grids, layers and heads (64 x 64 latents, 15 layers, 120 pairs), so maps are as large as there,
but a tenth of its channels, so its own time is far smaller and tracing's share of it is an upper bound. "explicit" computes
every cross-attention's probabilities in a processor of its own, sums all 77 tokens' maps and stacks the enlarged maps at the end,
as the original tracer does. Every variant runs in a process of its own; memory is the peak resident size above "untraced".

    python benchmarks/speed/daam_tracing.py
"""

import json
import resource
import subprocess
import sys
import time

CALLS = 2
TOKENS = 12  # start token, ten tokens of a prompt, end token
VARIANTS = ("untraced", "traced, one map", "traced, all pairs", "explicit, as the original")


def build():
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 128, 128), layers_per_block=2, attention_head_dim=8, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).eval()  # fmt: skip


class Explicit:
    """The original's way: probabilities in the open, sums of every token's map."""

    def __init__(self, sums):
        self.sums = sums

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        import torch

        parts = (attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in parts)
        probabilities = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        side = round(probabilities.shape[2] ** 0.5)
        maps = probabilities[1].transpose(1, 2).unflatten(-1, (side, side)).float()
        self.sums[id(attn)] = self.sums[id(attn)] + maps if id(attn) in self.sums else maps
        return attn.to_out[0](torch.matmul(probabilities, v).transpose(1, 2).flatten(2))


def measure(variant):
    import torch

    from conceptseg.backbones.cross_attention import upsample
    from conceptseg.trace import Call, Trace

    unet = build()
    sample, text = torch.randn(2, 4, 64, 64), torch.randn(2, 77, 64)

    class Pipe:  # what a trace needs of a pipeline; the prompt is given by hand
        vae_scale_factor = 8

        def __init__(self):
            self.unet, self.tokenizer = unet, "none is needed"

        def encode_prompt(self):
            raise NotImplementedError

    tracer, sums = None, {}
    if variant.startswith("traced"):
        tracer = Trace(Pipe(), keep="map" if "one map" in variant else "pairs")
        tracer._tokens = lambda encoded: TOKENS
        tracer.attach()
        tracer._start(Call(None, 1, True))
    elif variant.startswith("explicit"):
        stock = unet.attn_processors
        chosen = {n: Explicit(sums) if "attn2" in n and not n.startswith("mid") else p for n, p in stock.items()}
        unet.set_attn_processor(chosen)
    started = time.perf_counter()
    with torch.inference_mode():
        for _ in range(CALLS):
            unet(sample, 500, encoder_hidden_states=text)
        called = time.perf_counter()
        if tracer is not None:
            tracer.prompt_maps()
        elif sums:
            torch.stack([upsample(one, (64, 64), "bicubic_clamped") for maps in sums.values() for one in maps]).mean(0)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"a call": (called - started) / CALLS, "the map": ended - called, "peak": peak}))


def main():
    found = {}
    for variant in VARIANTS:
        done = subprocess.run([sys.executable, __file__, variant], check=True, capture_output=True, text=True)
        found[variant] = json.loads(done.stdout.strip().splitlines()[-1])
    plain = found["untraced"]
    print(f"{'':28}{'s a call':>10}{'s the map':>11}{'MB above':>10}")
    for variant, one in found.items():
        print(f"{variant:28}{one['a call']:10.2f}{one['the map']:11.2f}{one['peak'] - plain['peak']:10.0f}")


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
