"""Drawn scenes as a data set: needs no file and no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from conceptseg.data.images import present_labels, unknown_key
from conceptseg.data.scenes import DRAWING_VERSION, OBJECTS, draw_scene
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.types import BACKGROUND, VOID, Sample

SPLITS: tuple[str, ...] = ("train", "val", "unseen")
SMALLEST = 16  # pixels; below, an object's rim is all that is left of it


class Scenes:
    """`count` scenes of one split; classes are 1..12 in the order of `OBJECTS`, the rim of every object is void."""

    name = "scenes"

    def __init__(
        self, split: str = "val", seed: int = 0, count: int = 64, size: int = 64, objects: Sequence[int] = (1, 3)
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f'dataset.split is "{split}". {did_you_mean(split, SPLITS)}')
        if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= 3:
            raise ConfigError(f"dataset.objects is {list(objects)}; the least and the greatest number of 1, 2, 3 were wanted.")
        if size < SMALLEST:
            raise ConfigError(f"dataset.size is {size}; at least {SMALLEST} pixels were wanted.")
        if seed < 0:
            raise ConfigError(f"dataset.seed is {seed}; 0 or more was wanted.")
        if count < 1:
            raise ConfigError(f"dataset.count is {count}; at least 1 scene was wanted.")
        self.split, self.seed, self.count, self.size = split, seed, count, size
        self.objects = (int(objects[0]), int(objects[1]))
        self._places = {f"{self.name}/{split}/{seed}/{index:05d}": index for index in range(count)}

    def keys(self) -> Sequence[str]:
        return tuple(self._places)

    def read(self, key: str) -> Sample:
        if key not in self._places:
            raise unknown_key(key, self._places, self.name)
        scene = draw_scene(self.split, self.seed, self._places[key], self.size, self.objects)
        words = {label: OBJECTS[label - 1] for label in present_labels(scene.mask) if label not in (BACKGROUND, VOID)}
        about = {"ground": scene.ground, "tints": {placed.word: placed.tint for placed in scene.objects}}
        return Sample(key, scene.image, scene.mask, words, about)

    def fingerprint(self) -> str:
        """Parameters, and the pixels of the first two scenes: another Pillow or NumPy may draw them differently."""
        parameters = (DRAWING_VERSION, self.split, self.seed, self.size, self.objects)  # more scenes change no scene
        digest = hashlib.sha256(repr(parameters).encode())
        for index in range(2):
            scene = draw_scene(self.split, self.seed, index, self.size, self.objects)
            digest.update(scene.image.tobytes() + scene.mask.tobytes())
        return digest.hexdigest()[:16]

    def problems(self) -> list[str]:
        return []
