"""Hold what a checkpoint's config would build against the weights that its files have, before memory is taken for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conceptseg.announcing import announced
from conceptseg.backbones.base import DENOISERS, Checkpoint, cached_commit
from conceptseg.backbones.hub import lacking_files, repository_folder
from conceptseg.backbones.random_weights import blocks_of
from conceptseg.errors import ConfigError
from conceptseg.reading import open_regular, read_json

SLACK = 1 << 24
"""Values that a model may hold beyond twice those of its files: resized position tables, constants."""
ADVICE = "Take config and weights from one source."
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_COUNTED = ("layer", "depth", "num_blocks")
"""Parts of the names of settings that count a model's blocks, each of which has weights of its own."""
_FREE = ("theta", "token", "_id", "max_length")
"""Parts of the names of settings that are no sizes."""


def stored_shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """Name -> shape of every tensor of safetensors files, from their headers alone. Raises ValueError for a file without one."""
    found: dict[str, list[int]] = {}
    for file in files:
        with open_regular(file) as opened:
            size = int.from_bytes(opened.read(8), "little")
            if not 0 < size <= LARGEST_HEADER:
                raise ValueError(f"{file} is no safetensors file, or cut short")
            header = json.loads(opened.read(size))
        found |= {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    return found


def check_plan(where: str, config: Mapping[str, Any], shapes: Sequence[Sequence[int]], build: Callable[[], Any]) -> None:
    """Raise ConfigError for a config that plans more blocks or values than the weights have, or negative numbers of them.

    where: names the config in messages. shapes: of the stored tensors. build: makes the model; it is called on the meta device,
    which takes no memory for weights, and only once no setting is out of all proportion.
    """
    values = sum(math.prod(shape) for shape in shapes)
    for name, number in _whole_numbers(config):
        counted = any(part in name for part in _COUNTED) and "channels" not in name
        most = len(shapes) if counted else max(values, SLACK)
        if number > most or (counted and number < 0):
            held = f"{len(shapes):,} tensors of {values:,} values together"
            raise ConfigError(
                f"{where}: {name} is {number}, but its weights are {held}. Take config and weights from one source."
            )
    with torch.device("meta"):
        model = build()
    planned = sum(weight.numel() for weight in model.parameters()) if isinstance(model, nn.Module) else 0
    if planned > 2 * values + SLACK:
        raise ConfigError(
            f"{where}: it describes a {type(model).__name__} of {planned:,} values, but its files hold {values:,}. {ADVICE}"
        )


def check_drawn(checkpoint: Checkpoint) -> None:
    """Raise ConfigError for a block to draw from that the weights lack, as far as their files are on this machine."""
    if checkpoint.random is None or checkpoint.random.from_block is None:
        return
    folder = checkpoint.folder()
    if folder is None:
        commit = cached_commit(checkpoint.path, checkpoint.revision)
        folder = repository_folder(checkpoint.path) / "snapshots" / (commit or "none")
    places = [folder / name for name in DENOISERS if (folder / name).is_dir()] or [folder]
    names = [*stored_shapes([file for place in places for file in sorted(place.glob("*.safetensors"))])]
    if blocks_of(names):  # in another layout blocks have other names
        checkpoint.random.places(names, checkpoint.path)


def load_part(checkpoint: Checkpoint, name: str, loader: Any, subfolder: str = "", **options: Any) -> Any:
    """A tokenizer, scheduler or model of a checkpoint, as its class of diffusers or transformers reads it.

    name: of the part, for messages. Raises ConfigError for what can't be read; of a model, also for a config that does not fit
    the weights (`check_plan`, for local folders), for weights that are absent, which the library would draw at random, and for
    weights of blocks that the config leaves out.
    """
    place = {"subfolder": subfolder} if subfolder else {}
    short = checkpoint.path.startswith("lab:") or name.startswith(("tokenizer", "scheduler"))
    with checkpoint.loading(name), announced(f"reading {name} of {checkpoint.path}", short):
        if not issubclass(loader, nn.Module):
            return loader.from_pretrained(**place, **checkpoint.source(), **options)
        folder = checkpoint.folder()
        if folder is not None:
            _check_local(folder / subfolder, loader)
        elif subfolder and not lacking_files(checkpoint.path, checkpoint.commit(), (subfolder,)):
            options["local_files_only"] = True  # diffusers asks the hub for the list of shards even if all are here
        model, found = loader.from_pretrained(**place, **checkpoint.source(), **options, output_loading_info=True)
    where = f'extractor.backbone.path "{checkpoint.path}": its {name}'
    if absent := sorted(found["missing_keys"]):
        raise ConfigError(f"{where} lacks {len(absent)} weights that its config describes (first: {absent[0]}). {ADVICE}")
    if beyond := sorted(key for key in found["unexpected_keys"] if _is_of_further_block(model, key)):
        raise ConfigError(
            f"{where} has {len(beyond)} weights of blocks that its config leaves out (first: {beyond[0]}). {ADVICE}"
        )
    return model


def _is_of_further_block(model: nn.Module, key: str) -> bool:
    """Whether a weight's name goes on a list of blocks that the model has.

    Other weights that a model does not take are common: text encoders are read from checkpoints that hold more.
    """
    parts = key.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            try:
                blocks = model.get_submodule(".".join(parts[:place]))
            except AttributeError:
                return False
            return isinstance(blocks, nn.ModuleList) and int(part) >= len(blocks)
    return False


def _check_local(folder: Path, loader: Any) -> None:
    """`check_plan` of a folder with config.json and safetensors; a folder without either is left to its loader."""
    files, file = sorted(folder.glob("*.safetensors")), folder / "config.json"
    if not files or not file.is_file():
        return
    config = read_json(file)
    if "quantization_config" in config:  # several values are packed into one
        return

    build = partial(_without_weights, loader, json.dumps(config, sort_keys=True))
    check_plan(str(file), config, [*stored_shapes(files).values()], build)


@lru_cache(maxsize=16)  # a table reads the same few models again for every row
def _without_weights(loader: Any, config: str) -> Any:
    """The model that a config.json describes. To be called on the meta device, where weights take no memory."""
    described = json.loads(config)
    if hasattr(loader, "load_config"):
        return loader.from_config(described)
    return loader(loader.config_class.from_dict(described))


def _whole_numbers(held: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """(name, value) of every whole number of a config that may be a size."""
    if isinstance(held, Mapping):
        for key, value in held.items():
            yield from _whole_numbers(value, str(key))
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _whole_numbers(value, name)
    elif isinstance(held, int) and not isinstance(held, bool) and not any(part in name for part in _FREE):
        yield name, held
