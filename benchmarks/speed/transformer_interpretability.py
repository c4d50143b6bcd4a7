"""TransInterp in batches of eight against the rule-by-rule oracle of the tests, one image at a time: ViT-B/16, random weights.

Both in turn, round after round, in processor time, so that other work on the machine disturbs them alike.

OMP_NUM_THREADS=1 python benchmarks/speed/transformer_interpretability.py --batch 8 --single 2 --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from relevance_oracle import RuleByRule  # noqa: E402
from tiny_encoders import batch, write_vit  # noqa: E402

from conceptseg.backbones.encoders.vit import ViTBackbone  # noqa: E402
from conceptseg.extractors.transinterp import TransInterp  # noqa: E402

VIT_B = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def spread(values: list[float]) -> str:
    return f"min {min(values):.3f}, median {statistics.median(values):.3f}, max {max(values):.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--single", type=int, default=2, help="images that the oracle explains one by one in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=12)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbone = ViTBackbone(str(write_vit(Path(folder), **{**VIT_B, "depth": said.depth})), "class labels")
        method, shown = TransInterp(backbone), batch(said.batch, side=224)
        tower, images = backbone.tower, backbone.images(shown.tasks)
        with torch.no_grad():
            rows = backbone.predicted(backbone.model(images)).rows

        def one_by_one() -> None:
            for number in range(said.single):
                RuleByRule(tower, images[number : number + 1], rows[number]).transinterp(False, 1)

        ours, oracle = [], []
        for number in range(said.rounds):
            ours.append(seconds(lambda: method.saliency(shown)) / said.batch)
            oracle.append(seconds(one_by_one) / said.single)
            print(
                f"round {number}: {ours[-1]:.3f} s, rule by rule {oracle[-1]:.3f} s, share {ours[-1] / oracle[-1]:.3f}",
                flush=True,
            )
        print(f"{torch.get_num_threads()} threads, seconds of processor time an image")
        print(f"batch of {said.batch}: {spread(ours)}")
        print(f"rule by rule, one by one: {spread(oracle)}")
        print(f"share: {spread([a / b for a, b in zip(ours, oracle, strict=True)])} (wanted at most 0.2)")
