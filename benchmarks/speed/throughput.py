"""Where an image's time goes on an accelerator: stages, share of peak, memory, images a second, compiling, attention back-ends.

    python benchmarks/speed/throughput.py --device cuda --geometry full --write     # FLUX.1-schnell at 1024 x 1024, bfloat16
    python benchmarks/speed/throughput.py --geometry tiny                           # that it runs, anywhere

Random weights. The model is the one that load=encode_only reads: the blocks up to the last one read, modulations as constants.
One noise draw a row: a batch of four images with one draw costs what one image with four draws costs, but for autoencoder and
text. A variant whose maps are not those of the plain model is reported as wrong, not as fast.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from figures import record
from flux_geometry import GEOMETRIES, Geometry, random_backbone, random_task
from original_plan import LEVEL, TOLERANCE, clock
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from conceptseg.backbones.base import stack_images
from conceptseg.backbones.text_cache import TextCache
from conceptseg.backbones.transformers.concept_stream import ConceptStream
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import Normalize, Softmax, View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import Batch

BACKENDS = ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math", "flash", "flash_hub", "_flash_3",
            "_flash_3_hub", "sage", "xformers")  # fmt: skip
"""Names that diffusers knows; those that are not there are said to be so."""


class RandomFiles:
    """Stands for a checkpoint's files: a tensor of the right shape for every name."""

    def __init__(self, backbone: FluxBackbone) -> None:
        with torch.device("meta"):
            whole = FluxTransformer2DModel.from_config({**backbone.config, "num_single_layers": 0})
        self.shapes = {name: weight.shape for name, weight in whole.named_parameters()}
        self.device, self.dtype = backbone.device, backbone.dtype

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            shape = self.shapes[name]
            if len(shape) < 2:
                yield name, torch.full(shape, 1.0 if name.endswith("weight") else 0.0, device=self.device, dtype=self.dtype)
            else:
                yield name, torch.randn(shape, device=self.device, dtype=self.dtype) * shape[1:].numel() ** -0.5


def encode_only(geometry: Geometry, device: str, dtype: str) -> FluxBackbone:
    backbone = random_backbone(geometry, device, dtype, whole=False)
    backbone.load = "encode_only"
    backbone.cut.files = RandomFiles(backbone)  # type: ignore[assignment]
    return backbone


def timed(work: Callable[[], Any], now: Callable[[], float], repeats: int) -> float:
    """Median milliseconds, after one round that warms up."""
    spent = []
    for _ in range(repeats + 1):
        started = now()
        work()
        spent.append(1000 * (now() - started))
    return median(spent[1:])


def peak_tflops(device: str, dtype: torch.dtype, now: Callable[[], float]) -> float:
    """Measure the throughput of a large matrix product."""
    side = 8192 if device != "cpu" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / 1e9 / timed(lambda: a @ b, now, 9)


class Bench:
    """One batch size."""

    def __init__(self, backbone: FluxBackbone, geometry: Geometry, rows: int) -> None:
        self.backbone, self.geometry = backbone, geometry
        self.batch = Batch(tuple(random_task(geometry, number) for number in range(rows)))
        self.extractor = ConceptAttention(backbone)
        self.view = View("output", geometry.layers_read, (LEVEL,), 1, Normalize.LINEAR, Softmax.PER_CELL)

    def text(self) -> Any:
        self.backbone.texts = TextCache(None, dict)
        return self.extractor.encoded(self.batch)

    def latents(self) -> Tensor:
        images = [task.image for task in self.batch.tasks]
        return self.backbone.latents(stack_images(images, self.backbone.size, self.backbone.resize, self.backbone.device))

    def stages(self, now: Callable[[], float], repeats: int) -> dict[str, float]:
        """Milliseconds a batch."""
        backbone, keys = self.backbone, self.batch.keys
        prompts, concepts = self.text()
        latents = self.latents()
        noisy, level = self.extractor.noised(latents, LEVEL, keys, 1)
        silent = ConceptStream(
            concepts.tokens, backbone.concept_pooled(len(keys)), lambda layer, found: None, last_layer=max(self.view.layers)
        )
        read = lambda: self.extractor.read_cells(latents, prompts, concepts, keys, [self.view])  # noqa: E731
        maps = read().read(self.view, backbone.grid(latents)).float().cpu().numpy()
        protocol = SegmentationProtocol("noise", 1, "single", [], [Segmenter("mean", "grid", "nearest")])
        found = {
            "autoencoder": timed(self.latents, now, repeats),
            "text, eight strings": timed(self.text, now, 1),
            "transformer": timed(lambda: backbone.denoise(noisy, level, prompts, silent), now, repeats),
        }
        found["maps"] = timed(read, now, repeats) - found["transformer"]
        found["metrics"] = timed(
            lambda: [list(protocol.score(t, m)) for t, m in zip(self.batch.tasks, maps, strict=True)], now, repeats
        )
        with FlopCounterMode(display=False) as counter:
            backbone.denoise(noisy, level, prompts, silent)
        found["transformer TFLOP"] = counter.get_total_flops() / 1e12
        return found

    def maps(self) -> Tensor:
        (found,) = self.extractor.stream(self.batch, [self.view])
        return found.scores.cpu()


def variants(backbone: FluxBackbone) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name, and what turns it on; what raises is not there."""
    model = backbone.cut.model
    assert model is not None
    for name in BACKENDS:
        yield f"attention: {name}", lambda name=name: model.set_attention_backend(name)  # type: ignore[misc, operator]
    yield "compiled block by block", lambda: (model.reset_attention_backend(), model.compile_repeated_blocks())  # type: ignore[operator]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the results by their printed names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="full")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the figures")
    said = parser.parse_args(arguments)
    geometry, dtype = GEOMETRIES[said.geometry], said.dtype or ("float32" if said.device == "cpu" else "bfloat16")
    now, backbone = clock(said.device), encode_only(geometry, said.device, dtype)
    found: dict[str, Any] = {"peak_tflops": peak_tflops(said.device, backbone.dtype, now), "batches": {}, "variants": {}}
    print(f"a large {dtype} matrix product: {found['peak_tflops']:.3g} TFLOP/s")
    for rows in said.batches:
        bench = Bench(backbone, geometry, rows)
        bench.text()
        if rows == said.batches[0]:
            backbone.release("text_encoder")  # words are known from here on: it need not be in memory
            if said.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            plain = bench.maps()
            if said.device != "cpu":
                found["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
                print(f"peak memory at batch {rows}, words known: {found['peak_gigabytes']:.1f} GB")
            backbone.text_encoder = random_backbone(geometry, said.device, dtype, whole=False).text_encoder
        stages = bench.stages(now, said.repeats)
        stages["share of peak"] = stages["transformer TFLOP"] / stages["transformer"] * 1000 / found["peak_tflops"]
        stages["images a second"] = 1000 * rows / timed(bench.maps, now, said.repeats)
        found["batches"][rows] = stages
        print(f"batch {rows}: " + ", ".join(f"{name} {value:.3g}" for name, value in stages.items()), flush=True)
    first = Bench(backbone, geometry, said.batches[0])
    for name, turn_on in variants(backbone):
        try:
            turn_on()
            milliseconds, made = timed(first.maps, now, said.repeats), first.maps()
        except Exception as error:  # whatever a back-end that is not there raises
            found["variants"][name] = f"not there: {str(error).splitlines()[0][:90] if str(error) else type(error).__name__}"
        else:
            difference = float((made - plain).abs().max())
            right = difference <= TOLERANCE[dtype]
            found["variants"][name] = milliseconds if right else f"wrong: maps differ by {difference:.1e}"
        print(f"{name}: {found['variants'][name]}", flush=True)
    if said.write:
        record(f"throughput {said.geometry}", found, said.device)
    return found


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of this process alone: loaders and the lab warn of random weights
    main()
