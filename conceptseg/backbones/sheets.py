"""Backbones by the name of their checkpoint: what `conf/backbone` says of it, or what its own files say."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module, metadata, resources
from typing import Any

import yaml

from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.errors import ConfigError, did_you_mean

FAMILIES = {
    "FluxTransformer2DModel": "conceptseg.backbones.transformers.flux.FluxBackbone",
    "SD3Transformer2DModel": "conceptseg.backbones.transformers.sd3.SD3Backbone",
    "Flux2Transformer2DModel": "conceptseg.backbones.transformers.flux2.Flux2Backbone",
    "CogVideoXTransformer3DModel": "conceptseg.backbones.transformers.cogvideox.CogVideoXBackbone",
    "QwenImageTransformer2DModel": "conceptseg.backbones.transformers.qwen_image.QwenImageBackbone",
    "ZImageTransformer2DModel": "conceptseg.backbones.transformers.z_image.ZImageBackbone",
}
"""The stock transformer's class -> the backbone that knows it. tests/formulas/test_concept_families.py compares each with stock
blocks, and fails for one that it does not build."""
GROUP = "conceptseg.backbones"
"""Entry point group of families that installed packages add: the stock transformer's class -> module:class."""


def families() -> dict[str, str]:
    """`FAMILIES` and those of installed packages."""
    added = {point.name: point.value.replace(":", ".") for point in metadata.entry_points(group=GROUP)}
    return {**added, **FAMILIES}


def sheets() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every sheet of conf/backbone that describes a multi-modal transformer."""
    folder = resources.files("conceptseg.conf").joinpath("backbone")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(settings, dict) and settings.get("_target_") in FAMILIES.values():
                yield file.name.removesuffix(".yaml"), settings


def backbone_of(path: str, revision: str | None = None, device: str = "cpu", **settings: Any) -> MultiModalBackbone:
    """The backbone of a hub repository, a folder in diffusers layout, "lab:<name>", or the name of a sheet.

    A checkpoint that a sheet of conf/backbone names gets that sheet's settings (revision, text length, ...), under those given
    here. Raises ConfigError for a checkpoint of no known family, or a hub repository without a revision.
    """
    known = dict(sheets())
    sheet = known.get(path) or next((s for s in known.values() if s["path"] == path), None)
    if sheet is None:
        sheet = {"_target_": _family(path, revision), "path": path}
    given = {**sheet, "device": device, **settings, **({"revision": revision} if revision else {})}
    module, _, name = given.pop("_target_").rpartition(".")
    backbone: MultiModalBackbone = getattr(import_module(module), name)(**given)
    return backbone


def _family(path: str, revision: str | None) -> str:
    from diffusers import FluxTransformer2DModel

    checkpoint = Checkpoint(path, revision)
    with checkpoint.loading("transformer/config.json"):
        kind = FluxTransformer2DModel.load_config(subfolder="transformer", **checkpoint.source())["_class_name"]
    known = families()
    if kind not in known:
        raise ConfigError(f'"{path}": its transformer is a {kind}. {did_you_mean(kind, known)}')
    return known[kind]
