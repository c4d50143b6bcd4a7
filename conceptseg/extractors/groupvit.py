"""GroupViT (Xu et al. 2022, arXiv:2202.11094): group tokens that learnt to segment from captions alone."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.text_segmenter import TextSegmenter
from conceptseg.types import Batch


class GroupViT(TextSegmenter):
    """The model's own segmentation logits: similarity of words with groups, spread by the groups' soft assignment."""

    version = 1
    architecture = "GroupViTModel"

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        names = list(dict.fromkeys(name for concepts in batch.concepts for name in concepts.names))
        ids, mask = self.backbone.token_ids(names)
        found = self.backbone.run(
            input_ids=ids, attention_mask=mask, pixel_values=self.backbone.images(batch.tasks), output_segmentation=True
        )
        index = torch.tensor([[names.index(name) for name in concepts.names] for concepts in batch.concepts])
        return torch.stack([maps[chosen] for maps, chosen in zip(found.segmentation_logits, index, strict=True)])
