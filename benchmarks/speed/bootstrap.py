"""How long 10,000 bootstrap resamples of 20 methods on 4,276 images take, and the paired tests of all against one.

    python benchmarks/speed/bootstrap.py --threads 2

Times are of this machine; what the tables promise is less than a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--images", type=int, default=4276)
parser.add_argument("--methods", type=int, default=20)
parser.add_argument("--resamples", type=int, default=10_000)
parser.add_argument("--threads", type=int, default=2)
said = parser.parse_args()
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy is imported
    os.environ[name] = str(said.threads)

import numpy as np  # noqa: E402

from conceptseg.metrics.comparisons import compare  # noqa: E402
from conceptseg.metrics.definitions import DEFINITIONS, Rows  # noqa: E402
from conceptseg.metrics.intervals import bootstrap_all  # noqa: E402

METRICS = [DEFINITIONS[name] for name in ("accuracy", "miou_dataset", "miou_image", "foreground_iou", "ap_image")]


def method(seed: int) -> Rows:
    """Rows of one invented method: images of 224 x 224 pixels, 15 to 60 % foreground."""
    generator, pixels = np.random.default_rng(seed), 224 * 224
    foreground = np.random.default_rng(0).integers(int(0.15 * pixels), int(0.6 * pixels), said.images)
    hits = generator.binomial(foreground, 0.7 + 0.01 * seed)
    rejections = generator.binomial(pixels - foreground, 0.8)
    return Rows.from_records(
        {
            "sample": f"{i:05d}", "view": "v", "segmenter": "s", "status": "ok", "classes": [0, 1], "words": ["x"],
            "inter": [int(r), int(h)], "label": [pixels - int(f), int(f)],
            "pred": [int(r + f - h), int(h + pixels - f - r)], "pred_void": [0, 0], "valid": pixels, "correct": int(h + r),
            "void": 0, "ap": {"foreground": float(h / f)},
        }
        for i, (f, h, r) in enumerate(zip(foreground, hits, rejections, strict=True))
    )  # fmt: skip


rows = {f"method {seed}": method(seed) for seed in range(said.methods)}
start = time.perf_counter()
bootstrap_all([(metric, one) for one in rows.values() for metric in METRICS], said.resamples)
middle = time.perf_counter()
compare(METRICS, rows["method 0"], {name: one for name, one in rows.items() if name != "method 0"}, said.resamples)
end = time.perf_counter()
print(
    f"{said.resamples:,} resamples, {said.images:,} images, {said.methods} methods, {len(METRICS)} metrics, "
    f"{said.threads} threads: "
    f"intervals {middle - start:.1f} s, paired bootstrap and sign-flip tests {end - middle:.1f} s"
)
