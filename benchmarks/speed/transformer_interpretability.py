"""TransInterp in batches of eight against the rule-by-rule oracle of the tests, one image at a time: ViT-B/16, random weights.

OMP_NUM_THREADS=1 python benchmarks/speed/transformer_interpretability.py --batch 8 --single 8
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from relevance_oracle import RuleByRule  # noqa: E402
from tiny_encoders import batch, write_vit  # noqa: E402

from conceptseg.backbones.vit import ViTBackbone  # noqa: E402
from conceptseg.extractors.transinterp import TransInterp  # noqa: E402

VIT_B = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--single", type=int, default=8, help="images that the oracle explains one by one")
    parser.add_argument("--depth", type=int, default=12)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        backbone = ViTBackbone(str(write_vit(Path(folder), **{**VIT_B, "depth": said.depth})), "class labels")
        method, shown = TransInterp(backbone), batch(said.batch, side=224)
        tower, images = backbone.tower, backbone.images(shown.tasks)
        with torch.no_grad():
            rows = backbone.predicted(backbone.model(images)).rows
        start = time.process_time()
        method.saliency(shown)
        ours = (time.process_time() - start) / said.batch
        start = time.process_time()
        for number in range(said.single):
            RuleByRule(tower, images[number : number + 1], rows[number]).transinterp(False, 1)
        oracle = (time.process_time() - start) / said.single
        print(f"threads {torch.get_num_threads()}, batch of {said.batch}: {ours:.2f} s of processor time an image")
        print(f"rule by rule, one by one: {oracle:.2f} s of processor time an image")
        print(f"share {ours / oracle:.3f} (wanted at most 0.2)")
