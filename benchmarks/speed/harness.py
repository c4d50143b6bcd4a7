"""Measure the cost of everything but the model: reading, resizing, metrics, pictures, rows, at FLUX's size and on the lab.

    OMP_NUM_THREADS=1 python benchmarks/speed/harness.py --write

At FLUX's size: photographs of 500 x 375 pixels under ImageNet-Segmentation's protocol, seven maps of 64 x 64 an image; processor
milliseconds an image of each stage. What it is a share of is given beside it: the processor seconds of an image of the cut-down
FLUX (from original_plan.py, same machine) and, computed and not measured, the time of a whole one on an H100 at half its peak.
There the device enlarges images, and what the model waits for is that they are handed over, for which a copy on the host stands.
On the lab: the run that the table makes, in this process, weights and words loaded before.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import FILE, record
from PIL import Image

from conceptseg.backbones.base import stack_images
from conceptseg.data.images import read_image, read_mask
from conceptseg.evaluation.loop import Answer, Scorer, Tally
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.types import Sample

H100_SECONDS = 0.224
"""One image of FLUX.1-schnell, five draws: 111 TFLOP (counted by original_plan.py) at 495 TFLOP/s. Computed, not measured."""

HANDED_OVER = "images handed over"
"""As they are: what an accelerator that enlarges them itself is given."""


def composed(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_module

    from conceptseg.config import plain, register

    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        return plain(compose("evaluate", overrides=list(overrides)))


class Meter:
    """Processor seconds by stage, of whichever thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        started = time.thread_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - started

    def around(self, owner: Any, method: str, name: str, gather: Callable[[Any], Any] = lambda found: found) -> None:
        """Time every call of an object's method."""
        inner = getattr(owner, method)

        def timed(*args: Any, **more: Any) -> Any:
            with self.of(name):
                return gather(inner(*args, **more))

        object.__setattr__(owner, method, timed)


def photographs(folder: Path, count: int) -> list[tuple[Path, Path]]:
    """JPEG images of 500 x 375 pixels with PNG masks: smooth noise, which compresses as photographs do."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        paths = folder / f"{number}.jpg", folder / f"{number}.png"
        small.resize((500, 375), Image.Resampling.BICUBIC).save(paths[0], quality=90)
        mask = Image.fromarray((rng.random((6, 8)) > 0.7).astype(np.uint8))
        mask.resize((500, 375), Image.Resampling.NEAREST).save(paths[1])
        found.append(paths)
    return found


def at_flux_size(count: int) -> dict[str, float]:
    """Processor milliseconds an image, by stage."""
    from conceptseg.targets import instantiate

    protocol = instantiate(composed("protocol=imagenet_released")["protocol"], "protocol")
    meter, rng = Meter(), np.random.default_rng(1)
    meter.around(protocol, "score", "metrics", list)
    with tempfile.TemporaryDirectory() as folder:
        paths, root = photographs(Path(folder), count), Path(folder) / "run"
        root.mkdir()
        keeper = MapKeeper(root / "maps", frozenset(["map"]))
        meter.around(keeper, "keep", "pictures")
        with RunStore(root) as store:
            meter.around(store, "append", "rows")
            scorer = Scorer(store, protocol, {s.key: s for s in protocol.segmenters}, keeper, Tally(), 1)
            for number, (picture, mask) in enumerate(paths):
                key = f"noise/{number}"
                with meter.of("reading"):
                    task = protocol.prepare(Sample(key, read_image(picture, key), read_mask(mask, key), {1: "bird"}))
                with meter.of("images to the model's size"):
                    stack_images([task.image], (1024, 1024), "nearest")
                with meter.of(HANDED_OVER):
                    stack_images([task.image], task.image.shape[:2], "nearest")
                scorer({key: task}, {key: Answer({"map": rng.random((len(task.concepts), 64, 64), np.float32)}, 0.0)})
    return {name: 1000 * spent / count for name, spent in meter.seconds.items()}


def on_the_lab(count: int) -> dict[str, float]:
    """Processor seconds of one run: all, and those of the model."""
    from conceptseg.evaluation.assemble import assemble
    from conceptseg.evaluation.carry_out import carry_out

    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = composed(
            "backbone@extractor.backbone=lab_flux", f"dataset.count={count}", f"runtime.runs={folder}", "runtime.progress=false"
        )
        evaluation = assemble(whole)
        meter = Meter()
        meter.around(evaluation.extractor, "stream", "model", list)
        carry_out(evaluation)  # loads weights, encodes words
        for file in evaluation.store.folder.glob("rows-*"):
            file.unlink()
        evaluation.store.refresh()
        meter.seconds.clear()
        started, wall = time.process_time(), time.perf_counter()
        tally = carry_out(evaluation)
        spent = {"all": time.process_time() - started, "model": meter.seconds["model"], "wall": time.perf_counter() - wall}
        spent |= {f"wall, {name}": seconds for name, seconds in tally.stages.items()}
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    said = parser.parse_args()
    torch.set_num_threads(1)
    stages = at_flux_size(said.images)
    print("FLUX's size, processor ms an image: " + ", ".join(f"{name} {ms:.1f}" for name, ms in stages.items()))
    in_line, ahead = stages[HANDED_OVER], stages["reading"]
    whole = sum(stages.values()) - in_line  # here nothing is handed over
    behind = stages["metrics"] + stages["pictures"] + stages["rows"]
    found: dict[str, Any] = {"stages_ms": stages}
    held = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if "original_plan cut" in held:
        cut = held["original_plan cut"]["seconds"]["ours, known words"]
        found["share_of_cut_percent"] = 100 * whole / (whole + 1000 * cut)
        print(f"all of it beside an image of the cut-down FLUX ({cut:.2f} processor s): {found['share_of_cut_percent']:.2f} %")
    found["share_of_h100_percent"] = 100 * in_line / (in_line + 1000 * H100_SECONDS)
    print(
        f"computed, not measured: beside {1000 * H100_SECONDS:.0f} ms on an H100, reading ahead ({ahead:.0f} ms) and writing "
        f"behind ({behind:.0f} ms) are hidden, images enlarged there; left in line: {found['share_of_h100_percent']:.1f} %"
    )
    lab = on_the_lab(said.images)
    found["lab_seconds"], found["lab_share_percent"] = lab, 100 * (1 - lab["model"] / lab["all"])
    print(
        f"lab, {said.images} images: {lab['all']:.2f} processor s, of them {lab['model']:.2f} in the model: "
        f"the harness takes {found['lab_share_percent']:.1f} %"
    )
    if said.write:
        record("harness", found)


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: loaders and the lab warn of random weights
    main()
