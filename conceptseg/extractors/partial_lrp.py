"""Relevance stopped at the last block's attention: "partial LRP" (Voita et al. 2019) as Chefer et al. 2021 evaluate it.

Source: hila-chefer/Transformer-Explainability at c3e578f, baselines/ViT/ViT_explanation_generator.py.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.activations import Activations
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.relevance import relevance_graph
from conceptseg.backbones.in_memory import Loaded
from conceptseg.extractors.relevance_method import RelevanceMethod


class PartialLRP(RelevanceMethod):
    """Mean over heads of the positive relevance of the class token's attention to each patch, last block.

    rules: "orig" is the published row's set; ConceptAttention's wrapper takes "new".
    """

    version = 1

    def __init__(self, backbone: ImageEncoder | Loaded, rules: str = "orig", explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class, first_layer=-1)
        self.rules = rules

    def relevance_map(
        self,
        images: Float[Tensor, "B 3 H W"],
        output: Float[Tensor, "B k"],
        activations: Activations,
        explained: Explained,
    ) -> Float[Tensor, "B h w"]:
        tower = self.backbone.tower
        graph = relevance_graph(tower, activations, explained.rows, self.rules)
        (relevance,) = graph.relevance_of(graph.attention[-1])
        return tower.maps(relevance.clamp(min=0).mean(1)[:, 0, tower.prefix :])
