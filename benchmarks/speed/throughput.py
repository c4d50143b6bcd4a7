"""Where an image's time goes on an accelerator: stages, share of peak, memory, images a second, compiling, attention back-ends.

gpu_check.py runs it. Random weights. The model is the one that load=encode_only reads: the blocks up to the last one read,
modulations as constants. One noise draw a row: a batch of four images with one draw costs what one image with four draws costs,
but for autoencoder and text. A variant whose maps are not those of the plain model is reported as wrong, not as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from flux_geometry import Geometry, random_backbone, random_task
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
        self.checkpoint, self.device, self.dtype = backbone.checkpoint, backbone.device, backbone.dtype

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


def variants(backbone: Callable[[], FluxBackbone]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name, and what turns it on; what raises is not there. backbone: builds or returns the model when one is turned on."""

    def model() -> Any:
        found = backbone().cut.model
        assert found is not None, "maps are made before a variant is turned on"
        return found

    for name in BACKENDS:
        yield f"attention: {name}", lambda name=name: model().set_attention_backend(name)  # type: ignore[misc]
    yield "compiled block by block", lambda: (model().reset_attention_backend(), model().compile_repeated_blocks())


def batch_figures(bench: Bench, peak: float, device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of each stage, share of the measured peak, images a second, and on a GPU the most memory that was taken."""
    now, rows = clock(device), len(bench.batch.tasks)
    bench.text()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    found = bench.stages(now, repeats)
    found["share of peak"] = found["transformer TFLOP"] / found["transformer"] * 1000 / peak
    found["images a second"] = 1000 * rows / timed(bench.maps, now, repeats)
    if device != "cpu":
        found["peak gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def peak_gigabytes(bench: Bench) -> float:
    """The most GPU memory while maps are made of images whose words are known, so that no text encoder need be there."""
    encoder = bench.backbone.text_encoder
    bench.text()
    bench.backbone.release("text_encoder")
    kept = encoder.to("cpu")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    bench.maps()
    found = torch.cuda.max_memory_allocated() / 1e9
    bench.backbone.text_encoder = kept.to(bench.backbone.device)
    return found


def variant_figure(
    turn_on: Callable[[], Any], benches: Sequence[Bench], plain: Sequence[Tensor], device: str, repeats: int
) -> dict[int, float] | str:
    """Milliseconds a batch, by the rows of the bench; a text where the variant is not there or its maps are not the plain ones.

    plain: each bench's maps [B C h w], in 0..1, before the variant is turned on.
    """
    found = {}
    try:
        turn_on()
        for bench, wanted in zip(benches, plain, strict=True):
            found[len(bench.batch.tasks)] = timed(bench.maps, clock(device), repeats)
            difference = float((bench.maps() - wanted).abs().max())
            if not difference <= TOLERANCE[str(bench.backbone.dtype).removeprefix("torch.")]:
                return f"wrong: maps differ by {difference:.1e}"
    except Exception as error:  # whatever a back-end that is not there raises
        return f"not there: {str(error).splitlines()[0][:90] if str(error) else type(error).__name__}"
    return found
