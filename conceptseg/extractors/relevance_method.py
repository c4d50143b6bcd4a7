"""Base class of LRP, partial LRP and TransInterp: one recorded forward pass of the host, and relevance propagated through it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.activations import Activations, tap_activations
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.relevance import check_tower, full_precision
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.taps import TapSet
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.types import Batch

log = logging.getLogger(__name__)


class RelevanceMethod(ClassMethod):
    """Implement `relevance_map`. needs_gradients: whether the host's forward pass is kept for ordinary gradients too."""

    needs_gradients: ClassVar[bool] = False

    def __init__(self, backbone: ImageEncoder | Loaded, explained_class: str, first_layer: int) -> None:
        super().__init__(backbone, explained_class)
        self.first_layer = first_layer
        if self.backbone.dtype == torch.float32:
            log.warning(
                "extractor.backbone.dtype is float32: rounding decides the relevance maps of single images, so numbers differ "
                "between machines. Use float64, the default of this method's sheet."
            )

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower = self.backbone.tower
        check_tower(tower)
        images = self.backbone.images(batch.tasks)
        with full_precision():
            with torch.set_grad_enabled(self.needs_gradients), TapSet(self.backbone.model) as taps:
                gathered = tap_activations(taps, tower, range(len(tower.blocks))[self.first_layer])
                output = self.backbone.run(needs_gradient(images), taps)
                activations = gathered()
            return self.by_class(batch, output, partial(self.relevance_map, images, output, activations))

    @abstractmethod
    def relevance_map(
        self, images: Float[Tensor, "B 3 H W"], output: Float[Tensor, "B k"], activations: Activations, explained: Explained
    ) -> Float[Tensor, "B h w"]:
        """Return one map per image, of its explained class. Called with float32 products in full precision.

        images: normalised. output: the model's logits or cosines of k classes.
        """
