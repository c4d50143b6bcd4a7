"""Backbones by the name of their checkpoint: what `conf/backbone` says of it, or what its own files say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import import_module
from inspect import signature
from typing import Any

from conceptseg.backbones.base import Backbone, Checkpoint
from conceptseg.backbones.sheet_files import sheet_of
from conceptseg.entry_points import BACKBONES, entry_points
from conceptseg.errors import ConfigError, did_you_mean

FAMILIES = {
    "FluxTransformer2DModel": "conceptseg.backbones.transformers.flux.FluxBackbone",
    "SD3Transformer2DModel": "conceptseg.backbones.transformers.sd3.SD3Backbone",
    "Flux2Transformer2DModel": "conceptseg.backbones.transformers.flux2.Flux2Backbone",
    "Flux2KleinPipeline": "conceptseg.backbones.transformers.flux2.Flux2KleinBackbone",
    "ChromaTransformer2DModel": "conceptseg.backbones.transformers.chroma.ChromaBackbone",
    "LongCatImageTransformer2DModel": "conceptseg.backbones.transformers.flux_relatives.LongCatImageBackbone",
    "OvisImageTransformer2DModel": "conceptseg.backbones.transformers.flux_relatives.OvisImageBackbone",
    "CogVideoXTransformer3DModel": "conceptseg.backbones.transformers.cogvideox.CogVideoXBackbone",
    "QwenImageTransformer2DModel": "conceptseg.backbones.transformers.qwen_image.QwenImageBackbone",
    "ZImageTransformer2DModel": "conceptseg.backbones.transformers.z_image.ZImageBackbone",
}
"""The stock transformer's class, or its pipeline's where several share a transformer -> the backbone that knows it.
tests/formulas/test_concept_families.py compares each with stock blocks, and fails for one that it does not build."""


def families() -> dict[str, str]:
    """`FAMILIES` and those of installed packages."""
    added = {point.name: point.value.replace(":", ".") for point in entry_points(BACKBONES)}
    return {**added, **FAMILIES}


UNET = "conceptseg.backbones.unets.unet.UNetBackbone"
CLIP = "conceptseg.backbones.encoders.clip.CLIPBackbone"
SIGLIP = "conceptseg.backbones.encoders.siglip.SigLIPBackbone"
VIT = "conceptseg.backbones.encoders.vit.ViTBackbone"


def backbone_of(
    path: str,
    revision: str | None = None,
    device: str = "cpu",
    family: str | None = None,
    of_method: Iterable[str] = (),
    **settings: Any,
) -> Backbone:
    """The backbone of a hub repository, a local folder, "lab:<name>", or the name of a sheet of conf/backbone.

    A checkpoint that a sheet names gets that sheet's settings (revision, text length, ...), under those given here. family: the
    class of a hub repository that no sheet names, where its files can't tell. of_method: settings of the method that reads the
    backbone, to be named where one is misspelt. Raises ConfigError for a checkpoint of no known
    family, or a hub repository without a revision.
    """
    sheet = sheet_of(path)
    if sheet is None:
        sheet = {**_described(path, revision, family), "path": path}
    given = {**sheet, "device": device, **settings, **({"revision": revision} if revision else {})}
    module, _, name = given.pop("_target_").rpartition(".")
    kind = getattr(import_module(module), name)
    known = {key for base in kind.__mro__[:-1] if "__init__" in vars(base) for key in signature(base.__init__).parameters}
    if unknown := sorted(settings.keys() - known):
        offered = {*known, *of_method} - {"self"}
        raise ConfigError(f"extractor.backbone.{unknown[0]}: no such setting. {did_you_mean(unknown[0], offered)}")
    backbone: Backbone = kind(**given)
    return backbone


def _described(path: str, revision: str | None, family: str | None) -> dict[str, Any]:
    """Class, and what it must be told, of a checkpoint that no sheet names."""
    folder = Checkpoint(path, revision).folder()
    if folder is not None and not (folder / "transformer" / "config.json").exists():
        if (folder / "unet" / "config.json").exists():
            return {"_target_": UNET}
        if (folder / "open_clip_config.json").exists():
            return {"_target_": CLIP, "trained_on": "images and captions"}
        if (folder / "config.json").exists():
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if "architecture" in config or config.get("model_type") == "vit":  # timm's layout, and that of transformers
                classifies = any("ImageClassification" in name for name in config.get("architectures") or ())
                trained_on = "class labels" if classifies or config.get("num_classes") else "images"
                return {"_target_": VIT, "trained_on": trained_on}
            if config.get("model_type") in ("siglip", "siglip2"):
                return {"_target_": SIGLIP, "trained_on": "images and captions"}
            raise ConfigError(
                f'"{path}": its config.json is of {" ".join(config.get("architectures") or ["an unknown model"])}, which does '
                f"not say how images are prepared. Name the sheet and the folder: backbone=<sheet of conf/backbone>, "
                f"path=<folder>."
            )
    if folder is None and family is not None and family not in families().values():
        return {"_target_": family, **({} if family == UNET else {"trained_on": "images and captions"})}
    return {"_target_": _family(path, revision)}


def _family(path: str, revision: str | None) -> str:
    from diffusers import DiffusionPipeline, FluxTransformer2DModel

    checkpoint = Checkpoint(path, revision)
    with checkpoint.loading("transformer/config.json"):
        kind = FluxTransformer2DModel.load_config(subfolder="transformer", **checkpoint.source())["_class_name"]
    known = families()
    if kind == "Flux2Transformer2DModel":  # FLUX.2 dev and klein share it
        with checkpoint.loading("model_index.json"):
            pipeline = DiffusionPipeline.load_config(**checkpoint.source())["_class_name"]
        kind = pipeline if pipeline in known else kind
    if kind not in known:
        raise ConfigError(f'"{path}": its transformer is a {kind}. {did_you_mean(kind, known)}')
    return known[kind]
