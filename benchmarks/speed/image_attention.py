"""Measure attention between tokens that is added up in the hooks against the plain forward pass and against keeping it all.

    OMP_NUM_THREADS=1 python benchmarks/speed/image_attention.py --write

Three geometries with random weights: the lab's Flux (its own weights), and one double block of FLUX.1's widths (24 heads of 128)
with 256 prompt tokens, at 256 and at 512 pixels. Processor seconds of one forward pass, the least of the rounds, and the most
bytes that tensors take at a time beside the weights; computed: what `mean_attention_bytes` says of the sum. "everything kept" is
what released codes do: scores and probabilities of every head and layer.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from daam_tracing import peak_bytes
from figures import record
from flux_geometry import Geometry, random_backbone

from conceptseg.backbones.attention_rows import MeanAttention, mean_attention_bytes
from conceptseg.backbones.transformers.concept_stream import ConceptStream, StreamActivations
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.prompts import Prompts

LEVEL = 0.5


def block_of_flux(side: int) -> FluxBackbone:
    """One double block and no single ones; a text encoder and an autoencoder as small as they get, since neither is used."""
    return random_backbone(Geometry(1, 0, 24, (16, 56, 56), 1, 4096, 1, 64, 256, side, (8, 8, 16, 16), (0,)))


def backbones() -> dict[str, FluxBackbone]:
    lab = FluxBackbone("lab:flux", image_size=32, text_tokens=16)
    return {"lab, 32 px": lab, "one block, 256 px": block_of_flux(256), "one block, 512 px": block_of_flux(512)}


def variant(backbone: FluxBackbone, name: str, noisy: torch.Tensor, prompts: Prompts) -> Any:
    """Run one forward pass to its end."""
    mean, kept = MeanAttention(), []

    def on_block(layer: int, found: StreamActivations) -> None:
        if name == "streamed":
            keys = found.joint_keys()
            mean.add(found.joint_queries(), keys, keys.shape[-1] ** -0.5)
        elif name == "everything kept":
            scores = found.joint_queries() @ found.joint_keys().mT
            kept.append((scores, (scores * found.joint_keys().shape[-1] ** -0.5).softmax(-1)))

    stream = None
    if name != "plain":
        pooled = backbone.concept_pooled(len(noisy))
        stream = ConceptStream(prompts.hidden[:, :1], pooled, on_block, max(backbone.layers), stop=False)
    with torch.inference_mode():
        backbone.denoise(noisy, LEVEL, prompts, stream)
        return mean.read() if name == "streamed" else kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    said = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for geometry, backbone in backbones().items():
        config = backbone.config
        noisy = torch.randn(1, *backbone.latent_shape(*backbone.size), generator=torch.Generator().manual_seed(0))
        hidden = torch.randn(1, backbone.text_tokens, int(config["joint_attention_dim"]))
        heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        tokens = backbone.grid(noisy)[0] * backbone.grid(noisy)[1] + backbone.text_tokens
        row: dict[str, Any] = {"tokens": tokens, "computed_mb": mean_attention_bytes(1, heads, tokens, tokens, width) / 1e6}
        work = {
            name: partial(variant, backbone, name, noisy, Prompts(hidden))
            for name in ("plain", "taps alone", "streamed", "everything kept")
        }
        work["plain"]()  # reads or fills the weights
        seconds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(said.rounds):
            for name, run in work.items():
                started = time.process_time()
                run()
                seconds[name].append(time.process_time() - started)
        for name, run in work.items():
            row[name] = {"seconds": min(seconds[name]), "peak_mb": peak_bytes(run) / 1e6}
        found[geometry] = row
        print(geometry, row, flush=True)
    if said.write:
        record("image_attention", found)


if __name__ == "__main__":
    main()
