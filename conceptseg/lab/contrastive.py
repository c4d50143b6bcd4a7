"""Contrastive learning of scenes and captions for the open_clip model (Radford et al. 2021, arXiv:2103.00020, Fig. 3)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.captions import describe
from conceptseg.lab.train import Trainer


class CLIPTrainer(Trainer):
    """CLIP in miniature: which caption belongs to which scene of the batch.

    By its pooled token as in the paper, and with `patch_weight` by its patches too: each caption is compared with the patches
    that look most like it (as in FILIP, Yao et al. 2021, arXiv:2111.07783, section 3.1, which takes the greatest similarity;
    here a softmax weighs them). Nothing says where an object is.
    """

    caveat: ClassVar[str] = (
        "Trained on drawn scenes with short captions out of 29 words, its patches by an auxiliary loss against the same "
        "captions: lab numbers rank code paths and settings, never the papers' claims."
    )
    sharpness: ClassVar[float] = 10.0
    """Factor of patch similarities, -1..1, before the softmax that weights them."""

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
        visual, kept = self.parts["model"].visual, []
        tap = visual.ln_post.register_forward_hook(lambda module, given, found: kept.append(found))
        try:
            image, text, scale = self.parts["model"](self.moved_images(scenes, rng), self.token_ids(captions))[:3]
        finally:
            tap.remove()
        # Equal captions describe each other's scenes: every one of them is right.
        same = torch.tensor([[float(a == b) for b in captions] for a in captions], device=self.device)
        same = same / same.sum(1, keepdim=True)
        pooled = self.contrast(scale * image @ text.T, same)
        patches = self.contrast(scale * self.by_patches(kept[0][:, 1:] @ visual.proj, text), same)
        return {"contrast": pooled, "patches": patches, "total": pooled + self.settings()["patch_weight"] * patches}

    @staticmethod
    def contrast(scores: Float[Tensor, "B B"], same: Float[Tensor, "B B"]) -> Tensor:
        """Cross-entropy of captions given scenes and of scenes given captions."""
        return 0.5 * (cross_entropy(scores, same) + cross_entropy(scores.T, same))

    def by_patches(self, patches: Float[Tensor, "B n k"], texts: Float[Tensor, "C k"]) -> Float[Tensor, "B C"]:
        """Similarity of every scene and caption, -1..1: that of the scene's patches, those most alike weighing most."""
        alike = torch.einsum("bnk,ck->bcn", normalize(patches, dim=-1), texts)
        return ((self.sharpness * alike).softmax(-1) * alike).sum(-1)

    def after_step(self) -> None:
        with torch.no_grad():
            self.parts["model"].logit_scale.clamp_(0, float(np.log(100)))
