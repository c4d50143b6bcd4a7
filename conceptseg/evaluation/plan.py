"""Estimate an evaluation before anything is fetched or computed: downloads, memory, time, disk, and finished rows.

Sizes are those of the sheets; what is not measured is marked as an estimate. Nothing is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.casting import fast_dtype
from conceptseg.backbones.hub import has_token, page_of
from conceptseg.backbones.repositories import missing_files, repository_of, unread_of
from conceptseg.backbones.settings import device_of, dtype_of
from conceptseg.errors import ConfigError, DataError
from conceptseg.evaluation.assemble import MAPS_KEPT_FOR_VIEWS, build_parts, identity_of
from conceptseg.evaluation.weights import checkpoints
from conceptseg.extractors.base import Extractor
from conceptseg.keys import run_id
from conceptseg.store.cost import read_cost
from conceptseg.store.run import RunStore
from conceptseg.windows import Windows

PIXEL, PIXEL_OF_LATENTS = 1_000, 2_600
"""Bytes of activations in float32 for each pixel that is shown at once, to an encoder or detector and to an autoencoder; from
rehearsals (docs/rehearsal.md), as are the next three."""
WORKSPACE = 150_000_000
"""Bytes of activations at any size of image."""
PROCESS = 700_000_000
"""Bytes of Python and its libraries, where weights lie in the same memory."""
BLOCK, BLOCK_OF_UNET = 1 / 16, 0.4
"""Share of a model's weights in its largest block and outside of blocks: what is in memory where blocks are cast one by one."""
OF_THE_PEAK = 0.4
"""Share of the measured matrix speed that a whole model reaches: a guess."""
PATCH = 16
"""Pixels a side of a token, of most models here."""
ROW_BYTES, MAP_BYTES = 600, 6_000
"""Of a row, and of the 8-bit maps and prediction of one image under one view."""
NOMINAL = {"ImageNetSegmentation": 4276, "PascalVOC": 1449}
"""Class of a data set -> its images, for where it is not on this machine."""
DATA = "data: "
"""Begins a reason that data is not there."""
SCRIPTS = {"ImageNetSegmentation": "scripts/fetch_imagenet_segmentation.py", "PascalVOC": "scripts/fetch_voc.py"}


@dataclass(frozen=True, slots=True)
class Model:
    """Weights that an evaluation reads."""

    path: str
    revision: str | None
    licence: str | None
    gated: bool | None
    download: float | None
    """GB to fetch; 0 where nothing is lacking, None where it is not known."""
    size_from: str
    weights: int | None
    """Bytes held in memory at once; None where it is not known."""
    operations: float | None
    """Of one forward pass over one image, roughly; None where it is not known."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One evaluation."""

    name: str
    run_id: str | None
    images: int
    done: int
    models: tuple[Model, ...]
    memory: int | None
    """Bytes at the peak; None where it is not known."""
    memory_measured: bool
    seconds: float | None
    """For the images that are not done; None where it can't be told."""
    seconds_measured: bool
    disk: int
    lacks: tuple[str, ...]
    """Requirements that are missing even if weights may be downloaded."""

    @property
    def download(self) -> float:
        """GB to fetch, as far as it is known."""
        return 0.0 if self.is_done else sum(model.download or 0 for model in self.models)

    @property
    def to_fetch(self) -> tuple[Model, ...]:
        return () if self.is_done else tuple(model for model in self.models if model.download != 0)

    @property
    def is_done(self) -> bool:
        return self.images > 0 and self.done >= self.images

    @property
    def lacks_data_alone(self) -> bool:
        """Whether it could run if its data were here."""
        return all(reason.startswith(DATA) for reason in self.lacks)

    def is_too_large(self, device_bytes: int) -> bool:
        """Whether a device with so many bytes can't hold it. Weights that are not known count as fitting."""
        return self.memory is not None and self.memory > device_bytes


def plan_run(name: str, config: Mapping[str, Any]) -> RunPlan:
    """Plan one composed, plain configuration. Raises ConfigError for settings that a run would refuse as well."""
    lacks: list[str] = []
    dataset, protocol, extractor = build_parts(config)
    models = tuple(_model(key, settings, lacks) for key, settings in checkpoints(config["extractor"]))
    identity, found = None, None
    images = _nominal(config["dataset"])
    try:
        images = len(dataset.keys())
        identity = identity_of(config, dataset, protocol, extractor)
        found = Path(config["runtime"]["runs"]) / run_id(identity)
    except DataError as error:
        kind = _class_of(config["dataset"])
        how = f"; {SCRIPTS[kind]} fetches it" if kind in SCRIPTS else ""
        lacks.append(f"{DATA}{str(error).splitlines()[0].rstrip('.')}{how}")
    except ConfigError:  # a local folder, or a branch, that can't be read: a model says so above
        pass
    held = RunStore(found).rows().values() if found is not None and found.is_dir() else ()
    done = len({row["sample"] for row in held if row["status"] in ("ok", "excluded")})
    cost = read_cost(found) if found is not None and found.is_dir() else None
    classes = str(config["extractor"]["_target_"]), [(m.path, m.revision) for m in models]
    cost = cost if cost is not None and cost.images else _like(Path(config["runtime"]["runs"]), json.dumps(classes))
    estimated = peak_bytes(config, extractor, images, [model.weights for model in models])
    each = cost.seconds / cost.images if cost is not None and cost.images else _estimated_seconds(config, models)
    views = max(1, len(config["views"]))
    pictured = (views if views <= MAPS_KEPT_FOR_VIEWS else 1) if config["runtime"]["keep_maps"] else 0
    left = max(0, images - done)
    return RunPlan(
        name, found.name if found is not None else None, images, done, models,
        cost.peak_bytes if cost is not None and cost.images else estimated,
        cost is not None and cost.images > 0, None if each is None else each * left, cost is not None and cost.images > 0,
        left * (ROW_BYTES * views * len(protocol.segmenters) + MAP_BYTES * pictured), tuple(dict.fromkeys(lacks)),
    )  # fmt: skip


def peak_bytes(config: Mapping[str, Any], extractor: Extractor, images: int, held: Sequence[int | None]) -> int | None:
    """Bytes at the peak, estimated: weights, activations and, on a CPU, the process itself. None where weights are not known.

    images: that there are, of which a batch is shown at once. held: bytes of the weights of each model, in the order of
    `checkpoints`; those that a sheet describes are counted by what is in memory together.
    """
    parts = dict(checkpoints(config["extractor"]))
    weights = [
        known if (one := resident_bytes(settings)) is None else one for settings, known in zip(parts.values(), held, strict=True)
    ]
    if any(one is None for one in weights):
        return None
    batch = max(1, min(int(config["runtime"]["batch_size"]), images))
    words = 1 + len(config["protocol"].get("background") or ()) if extractor.shown_by_word else 1
    shown = [_bytes_of_image(one) * (words if key == "extractor.backbone" else 1) for key, one in parts.items()]
    activations = WORKSPACE + batch * max(shown) if shown else 0
    process = PROCESS if device_of(str(config["runtime"]["device"])).type == "cpu" else 0
    return round(sum(one or 0 for one in weights) + activations + process) + extractor.held_bytes(batch, _views(config))


def _bytes_of_image(settings: Mapping[str, Any]) -> float:
    """Of activations of one image that a model is shown."""
    if "vae_dtype" in settings:
        return PIXEL_OF_LATENTS * _pixels(settings) * dtype_of(settings["vae_dtype"], "vae_dtype").itemsize / 4
    return PIXEL * _pixels(settings) * dtype_of(settings.get("dtype", "float32"), "dtype").itemsize / 4


def _pixels(settings: Mapping[str, Any]) -> int:
    side = settings.get("image_size") or 224
    return side**2 if isinstance(side, int) else prod(side)


def _class_of(settings: Mapping[str, Any]) -> str:
    return str(settings["_target_"]).rpartition(".")[2]


def _nominal(settings: Mapping[str, Any]) -> int:
    count = NOMINAL.get(_class_of(settings), 0)
    return min(count, settings.get("limit") or count)


def _model(key: str, settings: Mapping[str, Any], lacks: list[str]) -> Model:
    path, revision = str(settings["path"]), settings.get("revision")
    repository, checkpoint = repository_of(settings), Checkpoint(path, revision)
    try:
        folder = checkpoint.folder()
    except ConfigError as error:
        lacks.append(f"weights: {str(error).splitlines()[0]}")
        return Model(path, None, settings.get("licence"), None, 0, "", None, None)
    if folder is not None:
        held = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        return Model(path, None, settings.get("licence"), None, 0, "", held, _operations(settings, held / 4))
    if not revision:
        lacks.append(f"weights: {key}.revision is empty; set it to a commit, or to main, which is resolved to one")
    lacking = missing_files(checkpoint, repository.files, unread_of(settings))
    if lacking and repository.gated and not has_token():
        lacks.append(f"token: accept the licence on {page_of(path)}, then: hf auth login")
    main = sum(billions for part, billions in repository.parameters.items() if part not in ("text", "vae"))
    return Model(
        path, revision, settings.get("licence"), repository.gated, repository.download if lacking else 0, repository.size_from,
        weight_bytes(settings), _operations(settings, main * 1e9) if main else None,
    )  # fmt: skip


def weight_bytes(settings: Mapping[str, Any]) -> int | None:
    """Bytes of weights that a backbone's sheet holds in memory at once, by its parameter counts; None where it has none."""
    return _together(settings, 1.0, 1.0)


def resident_bytes(settings: Mapping[str, Any]) -> int | None:
    """Bytes of `weight_bytes` that are resident at once: where a CPU casts block by block, one block in both dtypes.

    Weights that are rounded to eight bits are resident as a whole: they are not pages of a file.
    """
    device, stored = device_of(str(settings.get("device", "cpu"))), dtype_of(settings.get("dtype", "float32"), "dtype")
    chosen = settings.get("compute_dtype")
    computing = fast_dtype(stored, device) if chosen is None else dtype_of(chosen, "compute_dtype")
    if device.type != "cpu" or "vae_dtype" not in settings or computing == stored:
        return weight_bytes(settings)
    both = 1 + computing.itemsize / stored.itemsize
    block = BLOCK_OF_UNET if "unet" in repository_of(settings).parameters else BLOCK
    return _together(settings, BLOCK * both, 1.0 if settings.get("weights") == "int8" else min(1.0, block * both))


def _together(settings: Mapping[str, Any], text_share: float, main_share: float) -> int | None:
    """Bytes of weights that are in memory together, counting these shares of text encoders and of the model itself."""
    parameters = dict(repository_of(settings).parameters)
    if not parameters:
        return None
    size = dtype_of(settings.get("dtype", "float32"), "dtype").itemsize
    text = parameters.pop("text", 0.0) * 1e9 * size
    vae = parameters.pop("vae", 0.0) * 1e9 * dtype_of(settings.get("vae_dtype", "float32"), "vae_dtype").itemsize
    main = sum(parameters.values()) * 1e9 * size
    if settings.get("load") == "encode_only":
        main = float(_encode_only_bytes(settings["dtype"], settings.get("weights", "full")))
    elif settings.get("weights") == "int8":
        main /= size
    text, main = text * text_share, main * main_share
    together = (
        max(text, main + vae) if settings.get("text_encoders") == "release" else text + main + vae
    )  # released encoders and the transformer are never in memory together
    return round(together)


@cache
def _encode_only_bytes(dtype: str, weights: str) -> int:
    """Of FLUX.1 with every double block: the most that a view may ask for."""
    import torch
    from diffusers import FluxTransformer2DModel

    from conceptseg.backbones.transformers.encode_only import planned_bytes

    with torch.device("meta"):
        config = dict(FluxTransformer2DModel(num_layers=1, num_single_layers=0).config)
    return planned_bytes({**config, "num_layers": 19}, 18, dtype_of(dtype, "dtype"), weights=weights)


def _operations(settings: Mapping[str, Any], parameters: float) -> float:
    """Two for each parameter and token; U-Nets, which work at several sizes, come out too high by about two."""
    return 2 * parameters * (_pixels(settings) / PATCH**2 + (settings.get("text_tokens") or 0))


def _estimated_seconds(config: Mapping[str, Any], models: Sequence[Model]) -> float | None:
    """Of one image; None for a method without a model, and where the size of one is not known."""
    if not models or any(model.operations is None for model in models):
        return None
    passes = max((int(view.get("draws") or 1) * max(1, len(view.get("timesteps") or ())) for view in _views(config)), default=1)
    speed = matrix_speed(str(config["runtime"]["device"]))
    protocol = config["protocol"]
    if protocol.get("window") and protocol.get("image_size"):  # as many as a square image has
        windows = Windows(protocol["window"], protocol["window_stride"] or protocol["window"])
        passes *= len(windows.spans(protocol["image_size"])) ** 2
    return passes * sum(model.operations or 0 for model in models) / (OF_THE_PEAK * speed)


def _views(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [view for view in config["views"].values() if isinstance(view, Mapping)]


@cache
def matrix_speed(device: str) -> float:
    """Operations a second of a matrix product on a device, measured in a tenth of a second: float32 on a CPU, else bfloat16."""
    import torch

    place = device_of(device)
    side, dtype = (512, torch.float32) if place.type == "cpu" else (4096, torch.bfloat16)
    one = torch.ones(side, side, device=place, dtype=dtype)
    best, ends = float("inf"), time.perf_counter() + 0.1
    while best == float("inf") or time.perf_counter() < ends:  # the fastest: others may be using the device
        started = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def device_bytes(device: str) -> tuple[str, int]:
    """(name, bytes of memory) of a device. Raises ConfigError for one that is not there."""
    import os

    import torch

    place = device_of(device)
    if place.type == "cuda":
        found = torch.cuda.get_device_properties(place)
        return found.name, int(found.total_memory)
    return f"{place.type}, {os.cpu_count()} cores", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def _costs(runs: Path) -> dict[str, Any]:
    """Costs of the runs in a folder, by method and weights: the last one that was measured."""
    found = {}
    for path in sorted(runs.glob("*/manifest.json")):
        try:
            held = json.loads(path.read_bytes())
            method = held["config"]["extractor"]
            models = [(str(part["path"]), part.get("revision")) for _, part in checkpoints(method)]
            key = json.dumps((str(method["_target_"]), models))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if (cost := read_cost(path.parent)) is not None and cost.images:
            found[key] = cost
    return found


def _like(runs: Path, key: str) -> Any:
    """Return the cost of another run of the same method on the same weights; None if there is none."""
    return _costs(runs).get(key)
