"""CLIPSeg (Lüddecke & Ecker 2022, arXiv:2112.10003): text to mask, trained on masks. A supervised bound, not zero-shot."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from conceptseg.extractors.text_segmenter import TextSegmenter
from conceptseg.types import Batch


class CLIPSeg(TextSegmenter):
    """Probability of each pixel for each word, the words of an image asked one by one."""

    version = 1
    shown_by_word = True
    architecture = "CLIPSegForImageSegmentation"

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        count = len(batch.concepts[0])
        ids, mask = self.backbone.token_ids([name for concepts in batch.concepts for name in concepts.names])
        images = self.backbone.images(batch.tasks).repeat_interleave(count, dim=0)
        found = self.backbone.run(input_ids=ids, attention_mask=mask, pixel_values=images)
        return rearrange(torch.sigmoid(found.logits), "(B C) h w -> B C h w", C=count)
