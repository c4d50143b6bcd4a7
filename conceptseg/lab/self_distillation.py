"""Self-distillation without labels for the DINO ViT (Caron et al. 2021, arXiv:2104.14294, Algorithm 1)."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from conceptseg.data.scenes import Scene
from conceptseg.lab import models
from conceptseg.lab.train import Trainer


class _Head(nn.Module):
    """Projection to the prototypes that student and teacher must agree on: an MLP, unit length, a weight-normalised layer."""

    def __init__(self, width: int, hidden: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 64)
        )
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, x: Float[Tensor, "B d"]) -> Float[Tensor, "B p"]:
        return normalize(self.layers(x), dim=-1) @ normalize(self.prototypes, dim=-1).T


class DINOTrainer(Trainer):
    """The student sees large and small crops, the teacher (its moving average) large ones; both must name the same prototype."""

    caveat: ClassVar[str] = (
        "Self-distilled on drawn scenes without labels: lab numbers rank code paths and settings, never the papers' claims."
    )

    def __init__(self, recipe: dict[str, Any], device: str = "cpu") -> None:
        super().__init__(recipe, device)
        self.trained.register_buffer("centre", torch.zeros(recipe["prototypes"], device=device))
        self.averaged["centre"] = self.trained.get_buffer("centre").clone()

    def build(self) -> dict[str, Any]:
        return models.build_vit(self.recipe["sizes"], classes=0)

    def modules(self) -> dict[str, nn.Module]:
        head = _Head(self.recipe["sizes"]["width"], self.recipe["hidden"], self.recipe["prototypes"])
        teacher = nn.ModuleDict({"model": deepcopy(self.parts["model"]), "head": deepcopy(head)}).requires_grad_(False)
        return {"model": self.parts["model"], "head": head, "teacher": teacher}

    def write(self, folder: Path) -> None:
        self.parts["model"].load_state_dict(self.trained.get_submodule("teacher.model").state_dict())  # DINO keeps its teacher
        models.save_vit(self.parts, folder)

    def batch_size(self) -> int:
        return int(self.recipe["batch"])

    def crops(
        self, images: Float[Tensor, "B 3 H W"], rng: np.random.Generator, share: tuple[float, float], size: int
    ) -> Float[Tensor, "B 3 s s"]:
        """A random square of `share` of each image's area, flipped at random, with jittered brightness and channels."""
        side = images.shape[-1]
        found = []
        for image in images:
            wide = max(8, round(side * math.sqrt(rng.uniform(*share))))
            left, top = (int(v) for v in rng.integers(0, side - wide + 1, 2))
            piece = image[None, :, top : top + wide, left : left + wide]
            piece = interpolate(piece, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
            if rng.random() < 0.5:
                piece = piece.flip(-1)
            if rng.random() < 0.8:
                gain = torch.from_numpy(rng.uniform(0.6, 1.4, (1, 3, 1, 1)).astype(np.float32)).to(image.device)
                piece = (piece * gain + float(rng.uniform(-0.2, 0.2))).clamp(-1, 1)
            if rng.random() < 0.2:
                piece = piece.mean(1, keepdim=True).expand_as(piece)
            found.append(piece[0])
        return torch.stack(found)

    def losses(self, scenes: list[Scene], rng: np.random.Generator, noise: torch.Generator) -> dict[str, Tensor]:
        recipe = self.recipe
        images, size = self.images(scenes), recipe["sizes"]["image_size"]
        large = [self.crops(images, rng, tuple(recipe["large_crops"]), size) for _ in range(2)]
        few, tiny = tuple(recipe["small_crops"]), recipe["small_size"]
        small = [self.crops(images, rng, few, tiny) for _ in range(recipe["small_count"])]
        count = len(scenes)
        teacher = self.trained.get_submodule("teacher")
        centre = self.trained.get_buffer("centre")
        with torch.no_grad():
            seen = teacher.get_submodule("head")(teacher.get_submodule("model")(torch.cat(large)))
            warm = min(1.0, self.step / max(1, recipe["teacher_warmup"]))
            sharpness = recipe["teacher_temperature"][0] + warm * (
                recipe["teacher_temperature"][1] - recipe["teacher_temperature"][0]
            )
            wanted = ((seen - centre) / sharpness).softmax(-1).split(count)
            centre.lerp_(seen.mean(0), 1 - recipe["centre_momentum"])
        model, head = self.trained["model"], self.trained["head"]
        said = [*head(model(torch.cat(large))).split(count), *head(model(torch.cat(small))).split(count)]
        terms = [
            -(want * (say / recipe["student_temperature"]).log_softmax(-1)).sum(-1).mean()
            for i, want in enumerate(wanted)
            for j, say in enumerate(said)
            if i != j
        ]
        loss = torch.stack(terms).mean()
        mean = torch.cat(list(wanted)).mean(0)
        spread = -(mean * (mean + 1e-9).log()).sum() / math.log(recipe["prototypes"])  # 1: all prototypes in use; 0: collapse
        return {"agreement": loss, "spread": spread, "total": loss}

    def after_step(self) -> None:
        done = min(1.0, self.step / self.recipe["horizon"])
        keep = 1 - (1 - self.recipe["teacher_momentum"]) * (math.cos(math.pi * done) + 1) / 2
        with torch.no_grad():
            for name in ("model", "head"):
                teacher = self.trained.get_submodule(f"teacher.{name}")
                for kept, new in zip(teacher.parameters(), self.trained[name].parameters(), strict=True):
                    kept.lerp_(new, 1 - keep)
