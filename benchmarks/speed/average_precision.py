"""Seconds for the average precisions of 4,276 maps of 224 x 224: python benchmarks/speed/average_precision.py [maps]"""

from __future__ import annotations

import sys
import time

import numpy as np

from conceptseg.metrics.average_precision import average_precision, two_channel_average_precision
from conceptseg.segment.resize import nearest_floor

ALL = 4276


def main(count: int) -> None:
    rng = np.random.default_rng(0)
    spent = {"foreground": 0.0, "two-channel, min-max": 0.0}
    for _ in range(count):
        scores = nearest_floor(rng.random((64, 64), np.float32), (224, 224))
        truth = (nearest_floor(rng.random((16, 16)), (224, 224)) > 0.7).astype(np.uint8)
        start = time.perf_counter()
        average_precision(scores.ravel(), truth.ravel() == 1)
        spent["foreground"] += time.perf_counter() - start
        start = time.perf_counter()
        two_channel_average_precision(scores, truth, minmax=True)
        spent["two-channel, min-max"] += time.perf_counter() - start
    for name, seconds in spent.items():
        print(f"{name}: {seconds:.1f} s for {count} maps, {seconds / count * ALL:.1f} s for {ALL:,}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else ALL)
