"""Measure on one GPU, step by step into one JSON file; scripts/gpu_check.sh runs this on a bare machine.

    scripts/gpu_check.sh gpu_check.json
    python benchmarks/speed/gpu_check.py toy.json --device cpu --geometry tiny --batches 1 2 --pairs 1 --repeats 1

Random weights, drawn on the device. Steps:

    device           name and memory; TFLOP/s of a large matrix product, the peak that shares refer to
    ratio            time of the original's plan over ours at this geometry, over alternating pairs (original_plan.py)
    memory           the most GPU memory that one image takes, words known
    batch N          milliseconds of each stage, share of the peak, images a second, memory (throughput.py)
    attention: ...   milliseconds a batch of the smallest size with each attention back-end of diffusers
    compiled         milliseconds a batch of every size with the blocks compiled
    transinterp ...  images a second and memory of TransInterp on ViT-B/16, in float64 as its sheet has it and in float32

A step is written when it is done, so the same command continues a run that was cut. A step that raised is kept as failed; one
that was cut twice is passed over, so that the steps after it have their turn. Delete a step's entry to measure it again.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from figures import record, rounded
from flux_geometry import GEOMETRIES, random_task
from original_plan import DRAWS, TOLERANCE, clock, compare, spread
from throughput import Bench, batch_figures, encode_only, peak_gigabytes, peak_tflops, timed, variant_figure, variants

from conceptseg.extractors.transinterp import TransInterp
from conceptseg.files import write_atomically
from conceptseg.source import source_digests
from conceptseg.types import Batch

TRIES = 2
"""How often a step may be cut before it is passed over."""
BROKEN = 75
"""Exit status where an error has left the device unusable for this process: start another."""
VIT: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("vit_base_patch16_224", {}), "cut": ("vit_base_patch16_224", {"depth": 2}),
    "tiny": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 5}),
}  # fmt: skip
RELEVANCE = (1, 8, 32)
"""Images in a batch of TransInterp."""
METHODS = ("concept_attention.ConceptAttention", "transinterp.TransInterp")


class Check:
    """The steps on one device; models are built when a step first needs them."""

    def __init__(self, said: argparse.Namespace) -> None:
        self.name, self.geometry, self.device = said.geometry, GEOMETRIES[said.geometry], said.device
        self.dtype = said.dtype or ("float32" if said.device == "cpu" else "bfloat16")
        self.batches, self.pairs, self.repeats = sorted(said.batches), said.pairs, said.repeats

    def settings(self) -> dict[str, Any]:
        """Everything that decides the figures."""
        libraries = {name: str(__import__(name).__version__) for name in ("torch", "diffusers", "transformers", "timm")}
        return {
            "geometry": self.name, "device": self.device if self.device == "cpu" else torch.cuda.get_device_name(self.device),
            "dtype": self.dtype, "batches": self.batches, "pairs": self.pairs, "repeats": self.repeats, "draws": DRAWS,
            "libraries": libraries, "source": source_digests("conceptseg.extractors." + name for name in METHODS),
        }  # fmt: skip

    def steps(self) -> dict[str, Callable[[], Any]]:
        """Name -> work that returns its figures, in the order in which they run: compiling can't be undone."""
        found: dict[str, Callable[[], Any]] = {"device": self.about, "ratio": self.ratio}
        if self.device != "cpu":
            found["memory"] = lambda: {"peak gigabytes": peak_gigabytes(self.benches[0])}
        for number, rows in enumerate(self.batches):
            found[f"batch {rows}"] = partial(self.batch, number)
        found |= {name: partial(self.variant, name) for name in self.variants}
        for dtype in ("float64", "float32"):
            for rows in RELEVANCE:
                found[f"transinterp {dtype}, batch {rows}"] = partial(self.transinterp, dtype, rows)
        return found

    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = {"machine": platform.machine(), "peak TFLOP/s": self.peak}
        if self.device != "cpu":
            about = torch.cuda.get_device_properties(self.device)
            found |= {
                "gigabytes": about.total_memory / 1e9,
                "capability": f"{about.major}.{about.minor}",
                "cuda": torch.version.cuda,
            }
        return found

    def ratio(self) -> dict[str, Any]:
        found = compare(self.geometry, self.device, self.dtype, self.pairs, DRAWS, stop=False)
        original = found["seconds"]["original"]
        found["ratios"] = {
            name: spread([o / s for o, s in zip(original, spent, strict=True)]) for name, spent in found["seconds"].items()
        }
        return found

    def batch(self, number: int) -> dict[str, float]:
        return batch_figures(self.benches[number], self.peak, self.device, self.repeats)

    def variant(self, name: str) -> Any:
        compiled = name.startswith("compiled")
        benches, plain = (self.benches, self.plain) if compiled else (self.benches[:1], self.plain[:1])
        return variant_figure(self.variants[name], benches, plain, self.device, self.repeats)

    def transinterp(self, dtype: str, rows: int) -> dict[str, float]:
        name, sizes = VIT[self.name]
        model = timm.create_model(name, pretrained=False, **sizes).to(self.device, getattr(torch, dtype)).eval()
        method = TransInterp(model)
        batch = Batch(tuple(random_task(self.geometry, number) for number in range(rows)))
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        found = {"images a second": 1000 * rows / timed(lambda: method.saliency(batch), clock(self.device), self.repeats)}
        if self.device != "cpu":
            found["peak gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        return found

    @cached_property
    def peak(self) -> float:
        return peak_tflops(self.device, getattr(torch, self.dtype), clock(self.device))

    @cached_property
    def benches(self) -> list[Bench]:
        backbone = encode_only(self.geometry, self.device, self.dtype)
        return [Bench(backbone, self.geometry, rows) for rows in self.batches]

    @cached_property
    def plain(self) -> list[torch.Tensor]:
        """Maps of each batch before any variant is turned on."""
        return [bench.maps() for bench in self.benches]

    @cached_property
    def variants(self) -> dict[str, Callable[[], Any]]:
        return dict(variants(lambda: self.benches[0].backbone))


def measure(check: Check, file: Path) -> dict[str, Any]:
    """Run the steps that the file lacks, and return all steps. Raises SystemExit for a file of other settings or code."""
    held: dict[str, Any] = {"settings": check.settings(), "steps": {}}
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        if differing := [name for name, value in check.settings().items() if held["settings"].get(name) != value]:
            raise SystemExit(f"{file} was begun with another {', '.join(differing)}; name another file, or delete it.")
    steps = held["steps"]

    def keep(name: str, entry: dict[str, Any]) -> None:
        steps[name] = rounded(entry)
        write_atomically(file, (json.dumps(held, indent=1) + "\n").encode())
        print(f"{name}: {json.dumps(steps[name])}", flush=True)

    for name, work in check.steps().items():
        entry = steps.get(name, {"status": "cut", "times": 0})
        if entry["status"] != "cut" or entry["times"] >= TRIES:
            continue
        keep(name, {"status": "cut", "times": entry["times"] + 1})  # what a killed process leaves
        started = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            keep(name, {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        else:
            keep(name, {"status": "done", "seconds": time.perf_counter() - started, "found": found})
        if check.device != "cpu":
            gc.collect()
            try:
                torch.cuda.synchronize()
            except Exception:
                raise SystemExit(BROKEN) from None
            torch.cuda.empty_cache()
    return held


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and return what stands in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON that the figures are written to, and continued from")
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="float32 on a processor, else bfloat16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the figures in figures.json too")
    said = parser.parse_args(arguments)
    if said.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use here; --device cpu --geometry tiny tries the script itself.")
    held = measure(Check(said), said.file)
    open_steps = [name for name, entry in held["steps"].items() if entry["status"] != "done"]
    print(f"{said.file}: {len(held['steps'])} steps" + (f"; not done: {', '.join(open_steps)}" if open_steps else ", all done"))
    if said.write:
        record(f"gpu_check {said.geometry}", held, said.device)
    return held


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: loaders and the lab warn of random weights
    main()
