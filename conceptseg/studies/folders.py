"""Generations on disk, in the layout of the original's: one folder each, with image, prompt, seed, maps and masks.

    <root>/<id>/output.png, prompt.txt, seed.txt, <word>.heat_map.png, <word>.gt.png, <word>.<name>.pred.png, maps.safetensors

Masks are RGBA pictures whose opacity is the mask. Instead of the original's pickle, maps are safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image
from safetensors.torch import load_file, save_file

from conceptseg.data.images import read_image, read_opacity
from conceptseg.errors import DataError
from conceptseg.reading import read_text
from conceptseg.studies.generator import Generated
from conceptseg.trace import WordMap


@dataclass(frozen=True)
class Generation:
    """One folder of the layout."""

    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def prompt(self) -> str:
        return self._text("prompt.txt")

    @property
    def seed(self) -> int:
        text = self._text("seed.txt")
        if not text.isdecimal():
            raise DataError(f'{self._file("seed.txt")} holds "{text[:40]}"; a whole number was wanted.')
        return int(text)

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(read_image(self._file("output.png"), f"the generation {self.id}"))

    def maps(self) -> dict[str, WordMap]:
        """Word maps by word, in the order of the prompt; none if they were not kept."""
        file = self.folder / "maps.safetensors"
        held = load_file(file) if file.exists() else {}
        said = self.prompt.lower()
        return {word: WordMap(word, held[word]) for word in sorted(held, key=lambda word: said.find(word.lower()))}

    def truths(self) -> dict[str, Bool[np.ndarray, "H W"]]:
        """Truth masks by word."""
        return {word_of(f.name.removesuffix(".gt.png")): read_mask(f) for f in sorted(self.folder.glob("*.gt.png"))}

    def predictions(self, name: str) -> dict[str, Bool[np.ndarray, "H W"]]:
        """Predicted masks of one method by word."""
        tail = f".{name}.pred.png"
        return {word_of(f.name.removesuffix(tail)): read_mask(f) for f in sorted(self.folder.glob(f"*{tail}"))}

    def _file(self, name: str) -> Path:
        file = self.folder / name
        if not file.exists():
            raise DataError(f"reading the generation {self.folder}: wanted {name}, which is not there. Is it such a folder?")
        return file

    def _text(self, name: str) -> str:
        return read_text(self._file(name)).strip()


def file_of(word: str) -> str:
    """A file name for a word; raises DataError for a word that is no plain text."""
    if not re.fullmatch(r"[\w' \-]+", word):
        raise DataError(f'the word "{word}" can\'t name a file: wanted letters, digits, spaces, hyphens and apostrophes.')
    return word.replace(" ", "_")


def word_of(file: str) -> str:
    """The word behind a file name."""
    return file.replace("_", " ")


def generations(root: Path) -> list[Generation]:
    """Every generation under a folder, by id. Raises DataError if there is none."""
    found = [Generation(f.parent) for f in sorted(root.glob("*/prompt.txt"))]
    if not found:
        raise DataError(
            f"reading generations from {root}: no folder in it has a prompt.txt. Make some with: conceptseg-study generate"
        )
    return found


def write_generation(root: Path, name: str, made: Generated, words: Mapping[str, WordMap]) -> Generation:
    """Write one generation with the maps of some words."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    made.image.save(folder / "output.png")
    (folder / "prompt.txt").write_text(made.prompt + "\n", encoding="utf-8")
    (folder / "seed.txt").write_text(f"{made.seed}\n", encoding="utf-8")
    if words:
        save_file({word: one.values.contiguous().cpu() for word, one in words.items()}, folder / "maps.safetensors")
    for word, one in words.items():
        one.overlay(made.image).save(folder / f"{file_of(word)}.heat_map.png")
    return Generation(folder)


def write_mask(file: Path, mask: Bool[np.ndarray, "H W"]) -> None:
    """A mask as RGBA: opaque black where it is set."""
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[..., 3] = 255 * mask
    Image.fromarray(rgba).save(file)


def read_mask(file: Path) -> Bool[np.ndarray, "H W"]:
    """Opacity above 0. Raises DataError for a picture without opacity, or in a lossy format."""
    return read_opacity(file, file.parent.name)


def predict(one: Generation, threshold: float, name: str) -> list[str]:
    """Write DAAM masks (at least threshold · greatest value, the paper's rule) of every word whose map was kept."""
    size = one.image.size[1], one.image.size[0]
    words = []
    for word, held in one.maps().items():
        write_mask(one.folder / f"{file_of(word)}.{name}.pred.png", held.mask(size, threshold).numpy() > 0)
        words.append(word)
    return words
