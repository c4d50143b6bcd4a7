"""Base class of methods that ask a model of transformers for the mask of a word."""

from __future__ import annotations

from typing import ClassVar

from conceptseg.backbones.encoders.transformers_model import TransformersBackbone
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.errors import ConfigError
from conceptseg.extractors.image_model import ModelMethod


class TextSegmenter(ModelMethod):
    """A method on one model of transformers, which must be of the class that the method reads."""

    told = "true name"
    windowed = True
    architecture: ClassVar[str]
    backbone: TransformersBackbone

    def __init__(self, backbone: TransformersBackbone | Loaded) -> None:
        backbone = backbone_from(backbone)
        needs_architecture(backbone, self.architecture, "backbone")
        super().__init__(backbone)


def needs_architecture(backbone: object, wanted: str, key: str) -> None:
    """Raises ConfigError for a model of another class."""
    if getattr(backbone, "architecture", None) != wanted:
        got = getattr(backbone, "architecture", type(backbone).__name__)
        raise ConfigError(f"extractor.{key} is a {got}, but this method reads a {wanted}. Choose its sheet of conf/backbone.")
