"""Count the bytes of tensors that a trace holds: while a U-Net runs, and by arithmetic for the real models."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from conceptseg.backbones.unets.attention_maps import cross_attentions

PROMPT, TEXT, SIDE = 12, 77, 64  # start token, ten tokens and end token; all positions; side of the reference's maps
CHUNK = 2 * 2**20  # probabilities that are computed at a time; logits are as many
ROOM = 2 * CHUNK + 2**20  # and a head's queries in float32

spec = importlib.util.spec_from_file_location("daam_tracing", Path(__file__).parents[2] / "benchmarks/speed/daam_tracing.py")
tracing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tracing)

SD1 = {**tracing.FOUR, "attention_head_dim": 8}
REAL = {"SD 1": (SD1, 64, 120), "SD 2": (tracing.FOUR, 64, 175), "SDXL": (tracing.THREE, 128, 1100)}


@pytest.fixture(scope="module")
def unet():
    """One cross-attention of two heads at 64 x 64 and two more at 32 x 32."""
    return tracing.build(
        {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "mid_block_type": None, "block_out_channels": (8, 8), "attention_head_dim": 4, "layers_per_block": 1,
            "sample_size": SIDE,
        }
    )  # fmt: skip


def test_a_call_takes_no_more_than_the_maps_it_holds_and_one_chunk_of_heads(unet):
    said = tracing.inputs(SIDE)
    plain, traced, explicit = (
        tracing.peak_bytes(partial(tracing.run, unet, said, variant, 2))
        for variant in ("untraced", "traced, all pairs", "explicit, as the original")
    )
    held = held_by(unet.config, SIDE, PROMPT)
    assert traced - plain <= held + ROOM < explicit - plain


def held_by(config, latents, tokens):
    """Bytes of the raw maps of every (layer, head) of up and down blocks in float32."""
    layers = [one for one in cross_attentions(config) if not one.path.startswith("mid")]
    return sum(4 * tokens * one.heads * (latents >> one.level) ** 2 for one in layers)


@pytest.mark.parametrize("model", REAL)
def test_real_models_take_less_than_a_twentieth_of_the_original(model):
    """As daam/trace.py does: sums of all 77 tokens, then every pair's enlarged map, in a list and stacked."""
    config, latents, pairs = REAL[model]
    config = {"layers_per_block": 2, **config}
    original = held_by(config, latents, TEXT) + 2 * pairs * TEXT * 4 * SIDE**2
    share = (held_by(config, latents, PROMPT) + ROOM) / original
    print(f"{model}: {share:.1%}")
    assert share < 0.05
