"""Relevance stopped at the last block's attention: "partial LRP" (Voita et al. 2019) as Chefer et al. 2021 evaluate it.

Baselines note, section 4.2.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.relevance import check_tower, full_precision, relevance_graph
from conceptseg.extractors.image_model import ClassMethod
from conceptseg.types import Batch


class PartialLRP(ClassMethod):
    """Mean over heads of the positive relevance of the class token's attention to each patch, last block.

    rules: "orig" is the published row's set; ConceptAttention's wrapper takes "new".
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
        (relevance,) = graph.relevance_of(graph.attention[-1])
        return tower.maps(relevance.clamp(min=0).mean(1)[:, 0, tower.prefix :])
