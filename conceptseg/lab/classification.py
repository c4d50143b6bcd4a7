"""Supervised classes for the ViT that the relevance methods explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conceptseg.data.drawings import OBJECTS
from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.train import Trainer


class ViTTrainer(Trainer):
    """A ViT trained on which kinds of object a scene holds, never where; of several, each is equally correct."""

    caveat: ClassVar[str] = (
        "Trained with class labels of drawn scenes: lab numbers rank code paths and settings, never the papers' claims."
    )

    def build(self) -> dict[str, Any]:
        return models.build_vit(self.recipe["sizes"], classes=len(OBJECTS))

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.parts["model"]}

    def write(self, folder: Path) -> None:
        models.save_vit(self.parts, folder)

    def batch_size(self) -> int:
        return int(self.recipe["batch"])

    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        truth = torch.zeros(len(scenes), len(OBJECTS))
        for row, scene in enumerate(scenes):
            for placed in scene.objects:
                truth[row, OBJECTS.index(placed.word)] = 1
        truth = (truth / truth.sum(1, keepdim=True)).to(self.device)
        scores = self.parts["model"](self.moved_images(scenes, rng))
        loss = cross_entropy(scores, truth)
        right = truth.gather(1, scores.argmax(1, keepdim=True)).gt(0).float().mean()
        return {"classes": loss, "right": right, "total": loss}
