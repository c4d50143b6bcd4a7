"""Drawn scenes as a data set: needs no file and no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.drawings import OBJECTS, TINTS
from conceptseg.data.images import present_labels, unknown_key
from conceptseg.data.scenes import DRAWING_VERSION, HARD_KINDS, PLACEMENTS, Layout, draw_hard_scene, draw_scene
from conceptseg.errors import ConfigError, did_you_mean, in_range
from conceptseg.types import BACKGROUND, VOID, Sample

SPLITS: tuple[str, ...] = ("train", "val", "unseen")
# A table shows the same scenes to every method, and drawing one takes as long as a lab model's forward pass.
kept_scene, kept_hard_scene = lru_cache(1024)(draw_scene), lru_cache(1024)(draw_hard_scene)
MEASURED = Layout(distractors=(5, 8), distractor_tints=3, placement="anywhere")
"""The scenes that methods are measured on hold more unnamed things than training scenes, and more conspicuous ones, so that who
is told no word and looks for odd colours finds them first; and nothing stands in the middle more often than elsewhere, so that a
guess at the middle is no better than others."""
SMALLEST = 16  # pixels; below, an object's rim is all that is left of it


def _check_numbers(seed: int, count: int, size: int) -> None:
    in_range("dataset.seed", seed, 0, 2**63 - 1)
    in_range("dataset.count", count, 1, 1_000_000)
    in_range("dataset.size", size, SMALLEST, 4096)


def _layout(distractors: Sequence[int], tints: int, placement: str) -> Layout:
    """Return the layout that these three settings describe. Raises ConfigError for values out of range."""
    if len(distractors) != 2 or not 0 <= distractors[0] <= distractors[1]:
        raise ConfigError(f"dataset.distractors is {list(distractors)}; wanted were the least and the greatest number, from 0.")
    if not 1 <= tints <= len(TINTS):
        raise ConfigError(f"dataset.distractor_tints is {tints}; 1 to {len(TINTS)} was wanted.")
    if placement not in PLACEMENTS:
        raise ConfigError(f'dataset.placement is "{placement}". {did_you_mean(placement, PLACEMENTS)}')
    return Layout((int(distractors[0]), int(distractors[1])), int(tints), placement)


class Scenes(SegmentationDataset):
    """`count` scenes of one split; classes are 1..12 in the order of `OBJECTS`, the rim of every object is void."""

    name = "scenes"

    def __init__(
        self,
        split: str = "val",
        seed: int = 0,
        count: int = 64,
        size: int = 64,
        objects: Sequence[int] = (1, 3),
        distractors: Sequence[int] = MEASURED.distractors,
        distractor_tints: int = MEASURED.distractor_tints,
        placement: str = MEASURED.placement,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f'dataset.split is "{split}". {did_you_mean(split, SPLITS)}')
        if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= 3:
            raise ConfigError(f"dataset.objects is {list(objects)}; the least and the greatest number of 1, 2, 3 were wanted.")
        _check_numbers(seed, count, size)
        self.split, self.seed, self.count, self.size = split, seed, count, size
        self.objects = (int(objects[0]), int(objects[1]))
        self.layout = _layout(distractors, distractor_tints, placement)
        self._places = {f"{self.name}/{split}/{seed}/{index:05d}": index for index in range(count)}

    def keys(self) -> Sequence[str]:
        return tuple(self._places)

    def read(self, key: str) -> Sample:
        if key not in self._places:
            raise unknown_key(key, self._places, self.name)
        scene = kept_scene(self.split, self.seed, self._places[key], self.size, self.objects, OBJECTS, self.layout)
        words = {label: OBJECTS[label - 1] for label in present_labels(scene.mask) if label not in (BACKGROUND, VOID)}
        about = {"ground": scene.ground, "tints": {placed.word: placed.tint for placed in scene.objects}}
        return Sample(key, scene.image, scene.mask, words, about, {word: label for label, word in enumerate(OBJECTS, 1)})

    def fingerprint(self) -> str:
        """Parameters, and the pixels of the first two scenes: another Pillow or NumPy may draw them differently."""
        parameters = (DRAWING_VERSION, self.split, self.seed, self.size, self.objects, self.layout)  # more scenes change no scene
        digest = hashlib.sha256(repr(parameters).encode())
        for index in range(2):
            scene = kept_scene(self.split, self.seed, index, self.size, self.objects, OBJECTS, self.layout)
            digest.update(scene.image.tobytes() + scene.mask.tobytes())
        return digest.hexdigest()[:16]

    def problems(self) -> list[str]:
        return []


class HardScenes(SegmentationDataset):
    """`count` scenes of look-alikes for studies of leakage between concepts; classes are roles, not kinds.

    Class 1 is what is meant; class 2 is what it may be taken for: the same thing in another tint ("tint"), a thing that differs
    in one part ("part"), or a word for something that is not there ("absent": class 2 is named but never in the mask).
    """

    name = "scenes_hard"

    def __init__(
        self,
        split: str = "val",
        seed: int = 0,
        count: int = 63,
        size: int = 64,
        kinds: Sequence[str] = HARD_KINDS,
        distractors: Sequence[int] = MEASURED.distractors,
        distractor_tints: int = MEASURED.distractor_tints,
        placement: str = MEASURED.placement,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f'dataset.split is "{split}". {did_you_mean(split, SPLITS)}')
        if wrong := [k for k in kinds if k not in HARD_KINDS]:
            raise ConfigError(f'dataset.kinds names "{wrong[0]}". {did_you_mean(wrong[0], HARD_KINDS)}')
        if not kinds:
            raise ConfigError(f"dataset.kinds is empty; wanted at least one of {', '.join(HARD_KINDS)}.")
        _check_numbers(seed, count, size)
        self.split, self.seed, self.count, self.size, self.kinds = split, seed, count, size, tuple(kinds)
        self.layout = _layout(distractors, distractor_tints, placement)
        self._places = {
            f"{self.name}/{split}/{seed}/{self.kinds[index % len(self.kinds)]}-{index:05d}": index for index in range(count)
        }

    def keys(self) -> Sequence[str]:
        return tuple(self._places)

    def read(self, key: str) -> Sample:
        if key not in self._places:
            raise unknown_key(key, self._places, self.name)
        index = self._places[key]
        hard = kept_hard_scene(self.split, self.seed, index, self.size, self.kinds[index % len(self.kinds)], self.layout)
        about = {"ground": hard.scene.ground, "kind": hard.kind, "objects": [[o.tint, o.word] for o in hard.scene.objects]}
        return Sample(key, hard.scene.image, hard.scene.mask, hard.names, about)

    def fingerprint(self) -> str:
        """Parameters, and the pixels of one scene of each kind."""
        digest = hashlib.sha256(repr((DRAWING_VERSION, self.split, self.seed, self.size, self.kinds, self.layout)).encode())
        for index, kind in enumerate(self.kinds):
            hard = kept_hard_scene(self.split, self.seed, index, self.size, kind, self.layout)
            digest.update(hard.scene.image.tobytes() + hard.scene.mask.tobytes())
        return digest.hexdigest()[:16]

    def problems(self) -> list[str]:
        return []
