"""Measure a sweep against one view: every layer x three spaces, read from the same forward pass.

    python benchmarks/speed/sweep.py [--rounds 15]

Two models: the shipped lab Flux, and one of its widths with the 19 double blocks of FLUX.1 (random weights). One view reads the
output space of the last layer, so both sides run the same blocks. Both sides alternate, the first of each pair changing; of every
pair the ratio of processor times is taken (one thread), which other work on the machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from diffusers import FluxTransformer2DModel

from conceptseg.backbones.transformers.concept_stream import ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Axes, Softmax, View, expand_views

SPACES = ["output", "cross", "value"]


def deep_flux() -> FluxBackbone:
    """The lab Flux's widths with 19 double blocks, random weights."""
    torch.manual_seed(0)
    backbone = FluxBackbone("lab:flux")
    config = {**backbone.config, "num_layers": 19}
    backbone.transformer, backbone.config = FluxTransformer2DModel.from_config(config).eval(), config
    return backbone


def seconds(extractor: ConceptAttention, views: list[View], rows: int, side: int) -> float:
    """Processor time of one batch of `rows` images with seven concepts."""
    config = extractor.backbone.config
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, config["in_channels"] // 4, 2 * side, 2 * side, generator=g)
    prompts = Prompts(torch.randn(rows, 16, config["joint_attention_dim"], generator=g))
    concepts = ConceptTokens(torch.randn(rows, 7, config["joint_attention_dim"], generator=g))
    started = time.process_time()
    extractor.read_cells(latents, prompts, concepts, [str(k) for k in range(rows)], views)
    return time.process_time() - started


def ratios(backbone: FluxBackbone, rounds: int, rows: int = 8, side: int = 16) -> tuple[list[float], int, int]:
    """(time of all cells over time of one view, pair by pair; number of cells; forward passes of one sweep)."""
    extractor = ConceptAttention(backbone)
    axes = Axes(backbone.spaces, backbone.layers, has_timesteps=True)
    setting = {"space": SPACES, "each": "layer", "timesteps": [0.5], "softmax": "per_cell"}
    sweep = list(expand_views({"all": setting}, axes).values())
    one = [View("output", (backbone.layers[-1],), (0.5,), softmax=Softmax.PER_CELL)]
    before = backbone.forward_passes
    seconds(extractor, sweep, rows, side)  # also warms up
    passes = backbone.forward_passes - before
    seconds(extractor, one, rows, side)
    found = []
    for round_ in range(rounds):
        sides = (sweep, one) if round_ % 2 == 0 else (one, sweep)
        times = {id(views): seconds(extractor, views, rows, side) for views in sides}
        found.append(times[id(sweep)] / times[id(one)])
    return found, len(sweep), passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for name, backbone in (("lab:flux", FluxBackbone("lab:flux")), ("lab width, 19 double blocks", deep_flux())):
        found, cells, passes = ratios(backbone, rounds)
        low, middle, high = min(found), median(found), max(found)
        print(
            f"{name}: {cells} cells in {passes} forward pass: {middle:.3f} x the time of one view "
            f"({low:.3f} to {high:.3f} over {rounds} pairs)"
        )


if __name__ == "__main__":
    main()
