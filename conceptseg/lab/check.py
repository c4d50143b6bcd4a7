"""Measure a lab model: `conceptseg-lab check`. Each model has one simple test with chance and ground truth as bounds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from conceptseg.backbones.base import stack_images
from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS
from conceptseg.data.scenes import Scene, draw_scene, is_held_out
from conceptseg.errors import ConfigError
from conceptseg.lab.cards import GENERATING
from conceptseg.lab.generation import generate, load_trained
from conceptseg.lab.train import Trainer

COUNT = 96
"""Scenes or captions a check looks at."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One number of a check, in 0..1, with what guessing gives and, where there is one, what drawn scenes give."""

    what: str
    value: float
    chance: float
    drawn: float | None = None
    n: int = COUNT

    def __str__(self) -> str:
        ceiling = "" if self.drawn is None else f", drawn scenes {100 * self.drawn:.1f} %"
        return f"{self.what}: {100 * self.value:.1f} % (chance {100 * self.chance:.1f} %{ceiling}; n={self.n})"

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def check(card: dict[str, Any], folder: Path, clip: tuple[dict[str, Any], Path], pictures: Path | None = None) -> list[Finding]:
    """Measure a written model. `clip` is the lab's CLIP, the judge of generated scenes; `pictures` takes a sample sheet."""
    trainer = load_trained(card, folder)
    kind = card["recipe"]["kind"]
    if kind == "vit":
        return _classes(trainer)
    if kind == "dino":
        return [_neighbours(trainer)]
    if kind == "clip":
        return _matching(trainer)
    if kind not in GENERATING:
        raise ConfigError(f'conceptseg-lab check: no check for a model of kind "{kind}".')
    return _generation(trainer, load_trained(*clip), pictures)


NEW_GROUND = "on a ground it never stood on"


def one_object_scenes(count: int = COUNT, seed: int = 5, split: str = "val") -> list[Scene]:
    """Held-out scenes with one object, littered as training scenes are."""
    scenes = (draw_scene(split, seed, index, objects=(1, 1)) for index in range(count))
    return [scene for scene in scenes if scene.objects]


def prompts(count: int = COUNT) -> list[tuple[str, str, str, str]]:
    """(caption, tint, word, ground) of captions that take words in turn; pairs that training never shows among them."""
    rng = np.random.default_rng(9)
    found = []
    for index in range(count):
        word, tint, ground = OBJECTS[index % len(OBJECTS)], str(rng.choice(list(TINTS))), str(rng.choice(GROUNDS))
        found.append((f"a {tint} {word} on {ground}", tint, word, ground))
    return found


def _shown(trainer: Trainer, images: list[UInt8[np.ndarray, "H W 3"]]) -> Tensor:
    side = trainer.recipe["image_size"]
    return stack_images([image / np.float32(255) for image in images], (side, side), "bicubic") * 2 - 1


@torch.inference_mode()
def _classes(trainer: Trainer) -> list[Finding]:
    found = []
    for split, what in (("val", "of a held-out scene"), ("unseen", NEW_GROUND)):
        scenes = one_object_scenes(split=split)
        said = trainer.parts["model"](_shown(trainer, [s.image for s in scenes])).argmax(1).tolist()
        right = [OBJECTS[k] == s.objects[0].word for k, s in zip(said, scenes, strict=True)]
        found.append(Finding(f"names the object {what}", float(np.mean(right)), 1 / len(OBJECTS), n=len(scenes)))
    return found


@torch.inference_mode()
def _neighbours(trainer: Trainer) -> Finding:
    """Leave-one-out: the class of the nearest other scene by the class token's cosine."""
    scenes = one_object_scenes(8 * COUNT)
    features = trainer.parts["model"](_shown(trainer, [s.image for s in scenes]))
    features = torch.nn.functional.normalize(features, dim=-1)
    near = features @ features.T
    near.fill_diagonal_(-2)
    words = [s.objects[0].word for s in scenes]
    right = [words[int(k)] == word for k, word in zip(near.argmax(1), words, strict=True)]
    share = float(np.mean([np.mean([w == word for w in words]) for word in words]))
    return Finding("nearest other scene shows the same kind of object", float(np.mean(right)), share, n=len(scenes))


def _embed(clip: Trainer, images: list[UInt8[np.ndarray, "H W 3"]], texts: list[str]) -> Tensor:
    """Cosines [images, texts] by the lab's CLIP."""
    model = clip.parts["model"]
    return model.encode_image(_shown(clip, images), normalize=True) @ model.encode_text(clip.token_ids(texts), normalize=True).T


@torch.inference_mode()
def _matching(clip: Trainer) -> list[Finding]:
    scenes = one_object_scenes()
    images = [s.image for s in scenes]
    captions = [f"a {s.objects[0].tint} {s.objects[0].word} on {s.ground}" for s in scenes]
    words, grounds = [s.objects[0].word for s in scenes], [s.ground for s in scenes]
    new = one_object_scenes(split="unseen")
    there = _on_new_grounds(clip, [s.image for s in new], [s.objects[0].word for s in new])
    return [*_by_word(clip, images, words, grounds), _retrieval(clip, images, captions), there]


def _on_new_grounds(clip: Trainer, images: list[np.ndarray], words: list[str]) -> Finding:
    named, _ = _by_word(clip, images, words, [""] * len(images))
    return replace(named, what=f"{named.what} {NEW_GROUND}")


def _by_word(clip: Trainer, images: list[np.ndarray], words: list[str], grounds: list[str]) -> list[Finding]:
    found = []
    for what, choices, truth in (("object", OBJECTS, words), ("ground", GROUNDS, grounds)):
        said = _embed(clip, images, [f"a {w}" if what == "object" else w for w in choices]).argmax(1).tolist()
        right = [choices[k] == word for k, word in zip(said, truth, strict=True)]
        found.append(Finding(f"CLIP names the {what}", float(np.mean(right)), 1 / len(choices), n=len(images)))
    return found


def _retrieval(clip: Trainer, images: list[np.ndarray], captions: list[str]) -> Finding:
    scores = _embed(clip, images, captions)
    best = scores.argmax(1).tolist()
    right = [captions[k] == caption for k, caption in zip(best, captions, strict=True)]
    return Finding("CLIP finds the caption among all", float(np.mean(right)), 1 / len(captions), n=len(captions))


@torch.inference_mode()
def _generation(trainer: Trainer, clip: Trainer, pictures: Path | None) -> list[Finding]:
    asked = prompts()
    captions = [a[0] for a in asked]
    images: list[np.ndarray] = []
    for start in range(0, len(captions), 32):
        images += list(generate(trainer, captions[start : start + 32], seed=start))
    if pictures is not None:
        sample_sheet([(caption, image) for caption, image in zip(captions[:24], images[:24], strict=True)], pictures)
    made = [*_by_word(clip, images, [a[2] for a in asked], [a[3] for a in asked]), _retrieval(clip, images, captions)]
    new = [i for i, a in enumerate(asked) if is_held_out(a[2], a[3])]
    made.append(_on_new_grounds(clip, [images[i] for i in new], [asked[i][2] for i in new]))
    ceiling = {finding.what: finding.value for finding in _matching(clip)}
    return [Finding(f.what, f.value, f.chance, ceiling.get(f.what), f.n) for f in made]


def sample_sheet(made: list[tuple[str, UInt8[np.ndarray, "H W 3"]]], path: Path, columns: int = 8) -> None:
    """Generated images with their captions, as one PNG."""
    shown = made[0][1].shape[0]
    side = shown * -(-96 // shown)  # wide enough for a caption
    rows = -(-len(made) // columns)
    sheet = Image.new("RGB", (columns * (side + 6) + 6, rows * (side + 30) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (caption, image) in enumerate(made):
        x, y = 6 + index % columns * (side + 6), 6 + index // columns * (side + 30)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        first, second = caption.rsplit(" on ", 1)
        draw.text((x, y + side), first.removeprefix("a "), fill="black")
        draw.text((x, y + side + 11), f"on {second}", fill="black")
    sheet.save(path, optimize=True)
