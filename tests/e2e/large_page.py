"""A page of a data set of any size from invented runs of many methods: rows, maps, photographs and masks, without a model.

To see how a page of ImageNet-Segmentation's size looks and weighs:

    python tests/e2e/large_page.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptseg import targets
from conceptseg.data.base import SegmentationDataset
from conceptseg.keys import run_id
from conceptseg.protocols import SegmentationProtocol
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results
from conceptseg.store.maps import MapKeeper
from conceptseg.tables.page import write_html
from conceptseg.types import Concepts, Prediction, Sample, Task

IMAGES, METHODS, WORDS, KEEPING = 4276, 17, 445, 2
"""As many as ImageNet-Segmentation and the table of the paper have; KEEPING methods kept their maps."""
VIEW, SEGMENTER = "output/L14-17", "mean@mask/bilinear"


class Photographs(SegmentationDataset):
    """Coarse noise enlarged: three of VOC's photographs at a thumbnail's size take 1.8 kB, these as much or more."""

    name = "photographs"

    def __init__(self, count: int) -> None:
        self.count = count

    def keys(self) -> tuple[str, ...]:
        return tuple(f"made/{place:05}" for place in range(self.count))

    def fingerprint(self) -> str:
        return "made"

    def problems(self) -> list[str]:
        return []

    def read(self, key: str) -> Sample:
        place = int(key.rpartition("/")[2])
        return Sample(key, *_drawn(place % 50), {1: f"word {place % WORDS}"})


class AsItIs(SegmentationProtocol):
    """Asks for the one word of an image."""

    def __init__(self) -> None:
        """No setting."""

    def prepare(self, sample: Sample) -> Task:
        return Task(sample.key, np.float32(sample.image) / 255, sample.mask, Concepts((sample.words[1],), (1,), 0), "", (0, 1))


@cache
def _drawn(place: int) -> tuple[np.ndarray, np.ndarray]:
    """A photograph and its mask."""
    random = np.random.default_rng(place)
    shape = (188, 250) if place % 3 else (250, 167)
    grid = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(grid).resize(shape[::-1], Image.Resampling.BICUBIC))
    return image, _inside(random, shape).astype(np.uint8)


def _inside(random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """A lump in the middle of noise, like an object's mask."""
    low = random.random((8, 8)) + np.hanning(8)[:, None] + np.hanning(8)
    return np.asarray(Image.fromarray(np.float32(low)).resize(shape[::-1], Image.Resampling.BICUBIC)) > 1.6


def _row(sample: str, place: int, skill: float, random: np.random.Generator) -> dict[str, Any]:
    right = np.clip(random.normal(skill, 0.1, 2), 0.05, 0.99)
    label = [40000, 10176]
    inter = [int(right[0] * label[0]), int(right[1] * label[1])]
    pred = [inter[0] + label[1] - inter[1], inter[1] + label[0] - inter[0]]
    return {
        "sample": sample, "view": VIEW, "segmenter": SEGMENTER, "status": "ok", "words": [f"word {place % WORDS}"],
        "classes": [0, 1], "inter": inter, "pred": pred, "label": label, "pred_void": [0, 0], "valid": sum(label),
        "correct": sum(inter), "void": 0, "ap": {"foreground": float(right.mean())}, "seconds": 0.1,
    }  # fmt: skip


def _run(folder: Path, data: Photographs, method: int, keeping: bool) -> float:
    """Writes one run folder; its mean accuracy."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(method)
    rows = [_row(key, place, 0.9 - 0.02 * method, random) for place, key in enumerate(data.keys())]
    (folder / "rows-0of1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = __name__ if __name__ != "__main__" else Path(__file__).stem
    config = {
        "dataset": {"_target_": f"{module}.Photographs", "count": data.count}, "protocol": {"_target_": f"{module}.AsItIs"}
    }  # fmt: skip
    manifest = {
        "schema": 1, "run_id": folder.name, "identity": {"method": method}, "config": config, "provenance": "lab", "source": {},
        "versions": {"conceptseg": "0"}, "machine": {"system": "made up"}, "git": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    maps = MapKeeper(folder / "maps", frozenset([VIEW]))
    for key in data.keys() if keeping else ():
        task = AsItIs().prepare(data.read(key))
        coarse = np.float32(random.random((16, 16)) / 4 + np.outer(np.hanning(16), np.hanning(16)))
        scores = np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))[None]
        maps.keep(task, VIEW, SEGMENTER, scores, Prediction(np.roll(task.truth, 9), np.zeros((1, *task.truth.shape), np.float32)))
    return float(np.mean([row["correct"] / row["valid"] for row in rows]))


def make(folder: Path, images: int, methods: int = METHODS) -> Path:
    """The page, under folder/page; its runs lie beside it."""
    data = Photographs(images)
    rows = []
    for method in range(methods):
        name = run_id({"method": method})
        share = _run(folder / "runs" / name, data, method, method < KEEPING)
        computed = Value(share, share - 0.01, share + 0.01, images)
        values = {f"{kind}/{m}": computed for kind in ("released", "standard") for m in METRICS}
        values["quoted/miou"] = Value(share - 0.1, None, None, None, "\u2020")
        rows.append(
            TableRow(
                f"Method number {method}", "methods", "Made", "lab:flux", "lab", name, VIEW, SEGMENTER, images, 0, 0,
                values, "ok", "", "name and prompt" if method % 2 else "nothing", "images and captions", "yes",
            )
        )  # fmt: skip
    columns = [Column("quoted/miou", "mIoU", True, "As printed.", "Table 1", "quoted", 2)]
    for kind in ("released", "standard"):
        columns += [Column(f"{kind}/{m}", m, True, "Made up.", "", kind) for m in METRICS]  # type: ignore[arg-type]
    block = Block("Made up", f"{images} images", "as it is v1", "One word an image.", tuple(rows))
    table = Results("made", "A large table", "python large_page.py", "0", tuple(columns), (block,), interval="made up")
    module = __name__ if __name__ != "__main__" else Path(__file__).stem
    known = targets.packages
    targets.packages = lambda: [module]  # as if this module were an installed package of the entry point group
    try:
        return write_html(table, folder / "runs", folder / "page")
    finally:
        targets.packages = known


METRICS: Sequence[str] = ("accuracy", "miou", "ap")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    made = make(Path(sys.argv[1]), IMAGES)
    sizes = [path.stat().st_size for path in made.parent.rglob("*") if path.is_file()]
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB, in all {sum(sizes) / 1e6:.1f} MB in {len(sizes)} files")
