"""Layer-wise relevance propagation down to the pixels, as Chefer et al. 2021 (arXiv:2012.09838) evaluate it as "LRP".

Baselines note, sections 3.2 and 4.1.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.relevance import check_tower, full_precision, patch_relevance, relevance_graph
from conceptseg.extractors.image_model import ClassMethod
from conceptseg.types import Batch


class LRP(ClassMethod):
    """Signed relevance of every pixel, summed over colours; neither clamped nor resized.

    rules: "orig" is the published row's set; "new" is TransInterp's, which ConceptAttention's CheferFullLRP takes.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, rules: str = "orig", explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class)
        self.rules = rules

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        images = self.backbone.images(batch.tasks)
        check_tower(self.backbone.tower)
        with torch.no_grad(), full_precision():
            output = self.backbone.run(images)
        return self.by_class(batch, output, partial(self._explain, images))

    def _explain(self, images: Tensor, explained: Explained) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        graph = relevance_graph(tower, images, explained.rows, self.rules)
        (relevance,) = graph.relevance_of(graph.tokens)
        with full_precision():
            return patch_relevance(images, relevance[:, tower.prefix :], tower.patch, tower.grid)
