"""Contrastive learning of scenes and captions for the open_clip model (Radford et al. 2021, arXiv:2103.00020, Fig. 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.captions import describe
from conceptseg.lab.train import Trainer


class CLIPTrainer(Trainer):
    """CLIP in miniature: which caption belongs to which scene of the batch."""

    caveat: ClassVar[str] = (
        "Trained on drawn scenes with short captions out of 29 words: lab numbers rank code paths and settings, never the "
        "papers' claims."
    )

    def build(self) -> dict[str, Any]:
        return models.build_clip(self.recipe["sizes"])

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.parts["model"]}

    def write(self, folder: Path) -> None:
        models.save_clip(self.parts, folder)

    def batch_size(self) -> int:
        return int(self.recipe["batch"])

    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        captions = [describe(scene, rng, self.recipe["lone_captions"], tint=0.3).text for scene in scenes]
        tokens = self.parts["tokenizer"](
            captions, padding="max_length", truncation=True, max_length=self.recipe["sizes"]["text_tokens"], return_tensors="pt"
        )
        image, text, scale = self.parts["model"](self.images(scenes), tokens.input_ids.to(self.device))[:3]
        scores = scale * image @ text.T
        # Equal captions describe each other's scenes: every one of them is right.
        same = torch.tensor([[float(a == b) for b in captions] for a in captions], device=self.device)
        same = same / same.sum(1, keepdim=True)
        loss = 0.5 * (cross_entropy(scores, same) + cross_entropy(scores.T, same))
        return {"contrast": loss, "total": loss}

    def after_step(self) -> None:
        with torch.no_grad():
            self.parts["model"].logit_scale.clamp_(0, float(np.log(100)))
