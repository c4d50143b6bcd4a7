"""How time and memory grow with rows in the store, concepts, layers read and the image's side; written as a plot.

    OMP_NUM_THREADS=1 python benchmarks/speed/growth.py --write

Times are processor seconds of this process. The model has FLUX.1's 19 double blocks at a tiny width, random weights: at that
width what grows is attention over tokens and what reading adds, not matrix products.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from figures import record
from flux_geometry import GEOMETRIES, random_backbone

from conceptseg.backbones.transformers.concept_stream import ConceptTokens
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.metrics.summary import summarise
from conceptseg.saliency.views import Normalize, Softmax, View
from conceptseg.store.run import RunStore

PLOT = Path(__file__).parents[2] / "docs" / "growth.svg"
ROWS = (100, 1_000, 10_000, 100_000)
CONCEPTS = (1, 2, 4, 8, 16, 32, 64)
LAYERS = (1, 2, 5, 10, 19)
SIDES = (128, 256, 384, 512, 768)
GEOMETRY = replace(GEOMETRIES["tiny"], double_blocks=19, single_blocks=0)


def row(number: int) -> dict[str, Any]:
    """A row as single-class protocols write it, about 400 bytes."""
    hit = 20_000 + number % 1_000
    return {
        "sample": f"imagenet_segmentation/{number:06d}", "view": "output/L14-17/t0.5/n5/linear/softmax/mean", "status": "ok",
        "segmenter": "mean@grid/nearest", "words": ["bird"], "classes": [0, 1], "inter": [15_000, hit], "pred": [21_000, 29_176],
        "label": [50_176 - hit - 5_000, hit + 5_000], "pred_void": [0, 0], "valid": 50_176, "correct": 15_000 + hit, "void": 0,
        "ap": {"foreground": 0.9, "two_channel": 0.8, "two_channel_minmax": 0.85}, "seconds": 0.2,
    }  # fmt: skip


def of_store(count: int) -> dict[str, float]:
    """Seconds of writing eight rows at a time, of reading a store again, of asking what is missing, and of summing up."""
    found = {}
    rows = [row(number) for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        with RunStore(Path(folder)) as store:
            started = time.process_time()
            for start in range(0, count, 8):
                store.append(rows[start : start + 8])
            found["write"] = time.process_time() - started
        started = time.process_time()
        again = RunStore(Path(folder))
        held = again.rows()
        found["read"] = time.process_time() - started
        started = time.process_time()
        missing = [again.missing(one["sample"], [one["view"]], [one["segmenter"]]) for one in rows]
        found["ask"] = time.process_time() - started
        assert not any(missing)
        started = time.process_time()
        summarise(list(held.values()), ["accuracy", "miou_dataset", "ap_image"], 100, 0.95)
        found["sum up"] = time.process_time() - started
        del again, held
        gc.collect()
        tracemalloc.start()
        RunStore(Path(folder)).rows()
        found["MB"] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    return found


def of_model(concepts: int = 8, layers: int = 19, side: int = 256, repeats: int = 3) -> float:
    """Seconds of one image's forward pass with its maps, median of some."""
    backbone = random_backbone(replace(GEOMETRY, side=side))
    extractor, width = ConceptAttention(backbone), GEOMETRY.text_width
    view = View("output", tuple(range(19 - layers, 19)), (0.5,), 1, Normalize.LINEAR, Softmax.PER_CELL)
    prompts = Prompts(torch.randn(1, GEOMETRY.text_tokens, width))
    tokens = ConceptTokens(torch.randn(1, concepts, width))
    latents = torch.randn(1, 16, side // 8, side // 8)
    seconds = []
    for _ in range(repeats + 1):  # the first warms up
        started = time.process_time()
        extractor.read_cells(latents, prompts, tokens, ["noise"], [view]).read(view, backbone.grid(latents))
        seconds.append(time.process_time() - started)
    return median(seconds[1:])


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, axes = plt.subplots(1, 4, figsize=(13, 3), layout="constrained")
    for name in ("write", "read", "ask", "sum up"):
        axes[0].loglog(found["rows"]["x"], [one[name] for one in found["rows"]["y"]], "o-", label=name)
    axes[0].legend(frameon=False)
    for axis, name in zip(axes, ("rows", "concepts", "layers", "side"), strict=True):
        if name != "rows":
            axis.plot(found[name]["x"], found[name]["y"], "o-", color="black")
            axis.set_ylim(bottom=0)
        axis.set_title({"rows": "rows in the store", "side": "image side, pixels", "layers": "layers read"}.get(name, name))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("seconds")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the figures and the plot")
    parser.add_argument("--rows", type=int, default=ROWS[-1], help="most rows in the store")
    said = parser.parse_args()
    found: dict[str, Any] = {"rows": {"x": [n for n in ROWS if n <= said.rows]}}
    found["rows"]["y"] = [of_store(count) for count in found["rows"]["x"]]
    for count, one in zip(found["rows"]["x"], found["rows"]["y"], strict=True):
        print(f"{count:7,} rows: " + ", ".join(f"{name} {value:.3g}" for name, value in one.items()), flush=True)
    for name, values in (("concepts", CONCEPTS), ("layers", LAYERS), ("side", SIDES)):
        found[name] = {"x": list(values), "y": [of_model(**{name: value}) for value in values]}
        print(
            f"{name}: " + ", ".join(f"{x}: {y:.3f} s" for x, y in zip(found[name]["x"], found[name]["y"], strict=True)),
            flush=True,
        )
    if said.write:
        record("growth", found)
        draw(found, PLOT)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: loaders and the lab warn of random weights
    main()
