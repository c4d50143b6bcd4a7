"""How far rounding moves the relevance methods on the lab: relative noise in every matrix product, against none in float64.

    python benchmarks/lab/relevance_noise.py              # all levels; `... float32 3e-8` runs one

Noise stands for another processor, which sums the terms of a product in another order. Printed is the largest difference, in
points, over the draws, on the first block of the lab's table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conceptseg.config import plain, register
from conceptseg.metrics.summary import summarise
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import expand_views
from conceptseg.targets import instantiate
from conceptseg.types import Batch, Task

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.convolution}
METHODS = {"lrp": "accuracy", "lrp_clip": "accuracy", "transinterp": "ap_image", "partial_lrp": "ap_image"}
"""Sheet -> the metric that is printed."""
LEVELS = (
    ("float64", 1e-13, 3),
    ("float64", 1e-10, 3),
    ("float32", 3e-8, 6),
    ("float64", 1e-6, 3),
    ("float64", 1e-4, 3),
    ("float64", 1e-3, 3),
)
"""(dtype, relative noise, draws)."""
SEGMENTER = "mean@mask/bilinear"


class Noise(TorchDispatchMode):
    def __init__(self, size: float, seed: int) -> None:
        super().__init__()
        self.size, self.drawn = size, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket not in PRODUCTS:
            return found
        return found * (1 + self.size * torch.randn(found.shape, generator=self.drawn, dtype=found.dtype))


@contextmanager
def composed(*overrides: str) -> Iterator[dict[str, Any]]:
    from hydra import compose, initialize_config_module

    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        yield plain(compose("evaluate", overrides=list(overrides)))


def measured(sheet: str, dtype: str, around: Any) -> float:
    """The method's number on the block, in points."""
    chosen = [f"extractor={sheet}", "dataset=scenes", "dataset.objects=[1,1]", "dataset.count=64", "protocol=scenes_single"]
    with composed(*chosen, f"extractor.backbone.dtype={dtype}") as config:
        data, extractor = instantiate(config["dataset"], "dataset"), instantiate(config["extractor"], "extractor")
        protocol: SegmentationProtocol = instantiate(config["protocol"], "protocol")
        views = list(expand_views(config["views"], extractor.axes()).values())
    tasks = [task for key in tuple(data.keys()) if isinstance(task := protocol.prepare(data.read(key)), Task)]
    records: list[dict[str, Any]] = []
    cut = [segmenter for segmenter in protocol.segmenters if segmenter.key == SEGMENTER]
    for start in range(0, len(tasks), 8):
        batch = Batch(tuple(tasks[start : start + 8]))
        with around:
            (maps,) = extractor.stream(batch, views)
        for task, scores in zip(batch.tasks, maps.scores.detach().float().numpy(), strict=True):
            ((_, record, _),) = protocol.score(task, scores, cut)
            about = {"sample": task.key, "view": "map", "segmenter": SEGMENTER, "status": "ok", "words": [task.concepts.names[0]]}
            records.append({**about, **record})
    metric = METHODS[sheet]
    return 100 * summarise(records, [metric], 1, 0.95)[metric].value


def main() -> None:
    torch.set_num_threads(1)
    asked = [level for level in LEVELS if len(sys.argv) < 3 or (level[0], level[1]) == (sys.argv[1], float(sys.argv[2]))]
    for sheet, metric in METHODS.items():
        exact = measured(sheet, "float64", nullcontext())
        print(f"{sheet}, {metric}: {exact:.3f} without noise", flush=True)
        for dtype, size, draws in asked:
            moved = [abs(measured(sheet, dtype, Noise(size, seed)) - exact) for seed in range(draws)]
            print(f"  {dtype}, noise {size:g}: at most {max(moved):.3f} points over {draws} draws", flush=True)


if __name__ == "__main__":
    main()
