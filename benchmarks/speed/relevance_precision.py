"""Time LRP in float32 and in float64, as its sheet has it: ViT-B/16 with random weights.

OMP_NUM_THREADS=1 python benchmarks/speed/relevance_precision.py

The two precisions take turns, in processor time, so that other work on the machine disturbs them alike.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time

import numpy as np
import timm
import torch

from conceptseg.extractors.lrp import LRP
from conceptseg.types import Batch, Concepts, Task


def batch(count: int) -> Batch:
    """Images of noise, 224 x 224."""
    drawn = np.random.default_rng(0).random((count, 224, 224, 3), np.float32)
    truth, words = np.zeros((224, 224), np.uint8), Concepts(("object", "background"), (1, 0))
    return Batch(tuple(Task(f"noise/{k}", image, truth, words, "", (0, 1)) for k, image in enumerate(drawn)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    said = parser.parse_args()
    shown = batch(said.batch)
    models = {
        dtype: timm.create_model("vit_base_patch16_224", pretrained=False).to(getattr(torch, dtype)).eval()
        for dtype in ("float32", "float64")
    }
    spent: dict[str, list[float]] = {dtype: [] for dtype in models}
    for _ in range(said.rounds):
        for dtype, model in models.items():
            started = time.process_time()
            LRP(model).saliency(shown)
            spent[dtype].append((time.process_time() - started) / said.batch)
    for dtype, found in spent.items():
        print(f"{dtype}: {statistics.median(found):.2f} s of processor time an image ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: float32 is warned of
    main()
