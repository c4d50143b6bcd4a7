"""Drawn scenes with exact masks: the data set that ships as code.

A scene is one of six textured grounds with one to three objects out of twelve, each with a characteristic look (a tree has
a trunk, a kite has a tail) and everything else free: place, size, tilt, flip and tint. Unnamed distractors lie about, and
the rim of every object is void, as in PascalVOC. The same `(split, seed, index)` always draws the same scene.

`draw_hard_scene` sets what a single word can't settle: two of a kind in different tints, two kinds that share all but one
part, and words for what is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS, draw_distractor, draw_ground, draw_object, jitter, standing_out

VOID = 255
DRAWING_VERSION = 4  # raised whenever a scene of the same seed looks different, or its mask is another

_SPANS = {1: (0.34, 0.66), 2: (0.28, 0.5), 3: (0.25, 0.42)}  # an object's side as a share of the scene's, by object count
_LITTER = ((0.3, 0.5), (0.3, 0.5), (0.18, 0.34))  # the same for the first two distractors and for each of the others
_SPLITS = {"train": 0, "val": 1, "unseen": 2}
_HARD = 1_000  # keeps the hard scenes' random streams apart from the others'

PLACEMENTS: tuple[str, ...] = ("inside", "anywhere")


@dataclass(frozen=True)
class Layout:
    """Distractors of a scene and placement of objects; the defaults are those of training scenes.

    distractors: the least and the greatest number of unnamed things, laid where room is left. distractor_tints: how many tints
    they take, those that stand out most from the ground. placement: "inside" draws a thing's place among those where all of it
    is in the frame, so that the middle is covered most often; "anywhere" draws its middle in the whole frame and moves it inwards
    where it would stick out, so that all but the rim is covered alike.
    """

    distractors: tuple[int, int] = (3, 6)
    distractor_tints: int = len(TINTS)
    placement: str = "inside"


TRAINING = Layout()

HARD_KINDS: tuple[str, ...] = ("tint", "part", "absent")
LOOK_ALIKES: tuple[tuple[str, str], ...] = (("ball", "clock"),)
"""Kinds that differ in one part: the same disc with another face."""


@dataclass(frozen=True)
class Placed:
    """One object of a scene: its word, tint word, and the box it fills as (left, top, side) in pixels."""

    word: str
    tint: str
    box: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """A drawn scene. image: uint8 [H W 3]; mask: uint8 [H W], 0 ground, 1..12 object (order of OBJECTS), 255 void rim."""

    image: np.ndarray
    mask: np.ndarray
    ground: str
    objects: tuple[Placed, ...]


def is_held_out(word: str, ground: str) -> bool:
    """Whether this object never stands on this ground in the training split (12 of the 72 pairs)."""
    return (OBJECTS.index(word) + GROUNDS.index(ground)) % len(GROUNDS) == 0


def draw_scene(
    split: str,
    seed: int,
    index: int,
    size: int = 64,
    objects: tuple[int, int] = (1, 3),
    words: Sequence[str] = OBJECTS,
    layout: Layout = TRAINING,
) -> Scene:
    """Draw scene `index` of a split at size × size pixels.

    `train` leaves out the held-out (object, ground) pairs, `val` draws all pairs, `unseen` draws only held-out ones.
    `objects` is the least and the greatest number of objects (at most 3); an object that finds no room is left out.
    """
    rng = np.random.default_rng([_SPLITS[split], seed, index])
    ground = str(rng.choice(GROUNDS))
    if split == "unseen":
        allowed = [w for w in words if is_held_out(w, ground)]
    elif split == "train":
        allowed = [w for w in words if not is_held_out(w, ground)]
    else:
        allowed = list(words)
    count = min(int(rng.integers(objects[0], objects[1] + 1)), len(allowed))
    chosen = [str(w) for w in rng.choice(allowed, size=count, replace=False)]

    named = [(word, str(rng.choice(list(TINTS))), OBJECTS.index(word) + 1) for word in chosen]
    return _draw(rng, ground, named, [_SPANS[count]] * count, size, layout)


def example_scene() -> Scene:
    """The scene of the documentation's first example: a house and a clock on water, 64 × 64 pixels, with one unnamed distractor.

    One of 40 drawn for this; the settings of the methods were chosen on other scenes (conf/views/lab).
    """
    named = [(word, tint, OBJECTS.index(word) + 1) for word, tint in (("house", "red"), ("clock", "yellow"))]
    return _draw(np.random.default_rng([99, 121]), "water", named, [(0.42, 0.5)] * 2, 64, Layout(distractors=(1, 1)))


@dataclass(frozen=True)
class HardScene:
    """A scene with the names that are asked for: 1 what is meant, 2 its look-alike or what is absent.

    The scene's mask holds these numbers, 0 for everything else and 255 for the rims.
    """

    kind: str
    scene: Scene
    names: dict[int, str]


def draw_hard_scene(
    split: str,
    seed: int,
    index: int,
    size: int = 64,
    kind: str | None = None,
    layout: Layout = TRAINING,
) -> HardScene:
    """Draw hard scene `index`; kinds take turns unless one is named.

    "tint": two of one kind in tints far apart, asked for as "green kite" and "red kite". "part": two look-alikes of one
    tint and size, asked for by their words. "absent": one or two objects; one is asked for, and so is a word that is not there.
    """
    kind = kind or HARD_KINDS[index % len(HARD_KINDS)]
    for attempt in range(100):  # a crowded canvas may have no room for both
        rng = np.random.default_rng([_HARD + _SPLITS[split], seed, index, HARD_KINDS.index(kind), attempt])
        ground = str(rng.choice(GROUNDS))
        allowed = [w for w in OBJECTS if (split == "val") or (is_held_out(w, ground) == (split == "unseen"))]
        first = str(rng.choice(allowed))
        tint = str(rng.choice(list(TINTS)))
        if kind == "tint":
            far = [t for t in TINTS if np.linalg.norm(np.subtract(TINTS[t], TINTS[tint])) > 130]
            other = str(rng.choice(far))
            named = [(first, tint, 1), (first, other, 2)]
            names = {1: f"{tint} {first}", 2: f"{other} {first}"}
        elif kind == "part":
            pairs = [p for p in LOOK_ALIKES if split == "val" or any(w in allowed for w in p)]
            pair = [str(w) for w in rng.permutation(pairs[int(rng.integers(len(pairs)))])] if pairs else []
            if not pair:
                continue
            named = [(pair[0], tint, 1), (pair[1], tint, 2)]
            names = {1: pair[0], 2: pair[1]}
        else:
            absent = str(rng.choice([w for w in OBJECTS if w != first]))
            more = [w for w in allowed if w not in (first, absent)]
            named = [(first, tint, 1)]
            if rng.integers(2) and more:
                named.append((str(rng.choice(more)), str(rng.choice(list(TINTS))), 0))
            names = {1: first, 2: absent}
        side = float(rng.uniform(*_SPANS[2]))
        scene = _draw(rng, ground, named, [(side, side + 1e-6)] * len(named), size, layout)
        if len(scene.objects) == len(named):
            return HardScene(kind, scene, names)
    raise AssertionError(f"no room for two objects in hard scene {split}/{seed}/{index}")


def _draw(
    rng: np.random.Generator,
    ground: str,
    named: Sequence[tuple[str, str, int]],
    spans: Sequence[tuple[float, float]],
    size: int,
    layout: Layout,
) -> Scene:
    """Paint a ground, lay the named (word, tint, label) objects on it, then unnamed distractors wherever room is left.

    The first two distractors are as large as objects and all are as colourful and as solid: an odd colour says nothing.
    """
    canvas = Image.fromarray(draw_ground(ground, rng, size))
    labels = np.zeros((size, size), np.uint8)
    taken: list[tuple[int, int, int]] = []
    placed: list[Placed] = []
    for (word, tint, label), span in zip(named, spans, strict=True):
        box = _free_box(rng, size, taken, span, layout.placement)
        if box is None:
            continue
        patch = draw_object(word, jitter(rng, TINTS[tint]), rng)
        alpha = _paste(canvas, patch, box, angle=float(rng.uniform(-25, 25)), flip=bool(rng.integers(2)))
        inside, rim = alpha >= 0.75, (alpha > 0.1) & (alpha < 0.75)
        labels[inside] = label
        labels[rim] = VOID
        taken.append(box)
        placed.append(Placed(word, tint, box))
    tints = standing_out(ground, layout.distractor_tints)
    for number in range(int(rng.integers(layout.distractors[0], layout.distractors[1] + 1))):
        if (box := _free_box(rng, size, taken, _LITTER[min(number, 2)], layout.placement)) is not None:
            alpha = _paste(canvas, draw_distractor(rng, tints), box, angle=float(rng.uniform(0, 360)))
            labels[(alpha > 0.1) & (labels > 0)] = VOID  # boxes may overlap a little: a part that is covered ...
            labels[alpha >= 0.75] = 0  # ... is no part of the object
            taken.append(box)
    return Scene(np.asarray(canvas, np.uint8).copy(), labels, ground, tuple(placed))


def _free_box(
    rng: np.random.Generator, size: int, taken: list[tuple[int, int, int]], span: tuple[float, float], placement: str
) -> tuple[int, int, int] | None:
    for _ in range(40):
        side = round(size * float(rng.uniform(*span)))
        if placement == "inside":
            left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
        else:
            left, top = (min(max(0, int(v)), size - side) for v in rng.integers(-(side // 2), size - side // 2, 2))
        if all(
            left >= x + 0.85 * s or x >= left + 0.85 * side or top >= y + 0.85 * s or y >= top + 0.85 * side for x, y, s in taken
        ):
            return left, top, side
    return None


def _paste(canvas: Image.Image, patch: Image.Image, box: tuple[int, int, int], angle: float, flip: bool = False) -> np.ndarray:
    """Tilt, shrink and paste an object; returns its opacity on the canvas, float [H W] in 0..1."""
    left, top, side = box
    if flip:
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    patch = patch.rotate(angle, Image.Resampling.BICUBIC)
    patch = patch.resize((side, side), Image.Resampling.BOX)
    layer = Image.new("L", canvas.size, 0)
    layer.paste(patch.getchannel("A"), (left, top))
    canvas.paste(patch.convert("RGB"), (left, top), patch.getchannel("A"))
    return np.asarray(layer, np.float32) / 255
