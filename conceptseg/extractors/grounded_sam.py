"""Grounding DINO and SAM 2 (Liu et al. 2023, arXiv:2303.05499; Ravi et al. 2024, arXiv:2408.00714): word to boxes to masks.

Trained on boxes and masks: an upper bound, not zero-shot. A box score times a mask probability ranks pixels, which a bare mask
could not.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.transformers_model import TransformersBackbone
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.errors import ConfigError
from conceptseg.extractors.text_segmenter import TextSegmenter, needs_architecture
from conceptseg.types import Batch


class GroundedSAM(TextSegmenter):
    """The greatest, over a word's boxes, of box score times SAM's mask probability; 0 where no box was found.

    boxes: how many of the best boxes are segmented; threshold: a box below it counts for nothing.
    """

    version = 1
    shown_by_word = True
    architecture = "GroundingDinoForObjectDetection"

    def __init__(
        self,
        backbone: TransformersBackbone | Loaded,
        masks: TransformersBackbone | Loaded,
        boxes: int = 8,
        threshold: float = 0.25,
    ) -> None:
        super().__init__(backbone)
        masks = backbone_from(masks)
        needs_architecture(masks, "Sam2Model", "masks")
        if boxes < 1:
            raise ConfigError(f"extractor.boxes is {boxes}: at least one is needed.")
        self.masks, self.boxes, self.threshold = masks, boxes, threshold

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        scores, boxes = self._found(batch)
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], dim=-1)
        found = self.masks.run(
            pixel_values=self.masks.images(batch.tasks), multimask_output=False,
            input_boxes=rearrange(corners * self.masks.image_size, "B C n k -> B (C n) k").to(self.masks.dtype),
        )  # fmt: skip
        inside = rearrange(torch.sigmoid(found.pred_masks), "B (C n) 1 h w -> B C n h w", C=scores.shape[1])
        counted = torch.where(scores >= self.threshold, scores, torch.zeros_like(scores))
        return (counted[..., None, None] * inside).amax(2)

    def _found(self, batch: Batch) -> tuple[Float[Tensor, "B C n"], Float[Tensor, "B C n 4"]]:
        """Scores and boxes (centre and size, in shares of the image), the best first, words asked one by one."""
        count = len(batch.concepts[0])
        ids, mask = self.backbone.token_ids([name for concepts in batch.concepts for name in concepts.names])
        images = self.backbone.images(batch.tasks).repeat_interleave(count, dim=0)
        found = self.backbone.run(pixel_values=images, input_ids=ids, attention_mask=mask)
        # Logits of padding are -inf. Ranked before the sigmoid: float32 scores of sure boxes all round to 1.
        best, index = found.logits.float().amax(-1).topk(min(self.boxes, found.logits.shape[1]), dim=1)
        boxes = found.pred_boxes.float().gather(1, index[..., None].expand(-1, -1, 4))
        scores = rearrange(torch.sigmoid(best), "(B C) n -> B C n", C=count)
        return scores, rearrange(boxes, "(B C) n k -> B C n k", C=count)
