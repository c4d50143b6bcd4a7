"""Layer-wise relevance propagation down to the pixels, as Chefer et al. 2021 (arXiv:2012.09838) evaluate it as "LRP".

Source: hila-chefer/Transformer-Explainability at c3e578f, baselines/ViT/ViT_orig_LRP.py.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.activations import Activations
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.relevance import patch_relevance, relevance_graph, token_relevance
from conceptseg.backbones.in_memory import Loaded
from conceptseg.extractors.relevance_method import RelevanceMethod


class LRP(RelevanceMethod):
    """Signed relevance of every pixel, summed over colours; neither clamped nor resized.

    rules: "orig" is the published row's set; "new" is TransInterp's, which ConceptAttention's CheferFullLRP takes.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder | Loaded, rules: str = "orig", explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class, first_layer=0)
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
        (relevance,) = graph.relevance_of(graph.inputs[0])
        of_tokens = token_relevance(tower, images, relevance, self.rules)
        return patch_relevance(images, of_tokens[:, tower.prefix :], tower.patch, tower.grid)
