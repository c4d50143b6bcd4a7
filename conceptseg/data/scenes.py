"""Drawn scenes with exact masks: the data set that ships as code.

A scene is one of six textured grounds with one to three objects out of twelve, each with a characteristic look (a tree has
a trunk, a kite has a tail) and everything else free: place, size, tilt, flip and tint. Unnamed distractors lie about, and
the rim of every object is void, as in PascalVOC. The same `(split, seed, index)` always draws the same scene.

`draw_hard_scene` sets what a single word can't settle: two of a kind in different tints, two kinds that share all but one
part, and words for what is not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

OBJECTS: tuple[str, ...] = (
    "apple", "tree", "house", "fish", "boat", "sun", "flower", "kite", "clock", "mushroom", "cloud", "ball",
)  # fmt: skip
GROUNDS: tuple[str, ...] = ("grass", "sky", "sand", "water", "brick", "snow")
TINTS: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 45), "orange": (235, 140, 40), "yellow": (235, 215, 60), "green": (70, 165, 75),
    "blue": (60, 95, 205), "purple": (135, 70, 175), "pink": (240, 150, 190), "gray": (140, 140, 145),
}  # fmt: skip
VOID = 255
DRAWING_VERSION = 4  # raised whenever a scene of the same seed looks different, or its mask is another

_PATCH = 128  # pixels of an object's own drawing canvas, before it is tilted and shrunk
_SPANS = {1: (0.34, 0.66), 2: (0.28, 0.5), 3: (0.25, 0.42)}  # an object's side as a share of the scene's, by object count
_LITTER = ((0.3, 0.5), (0.3, 0.5), (0.18, 0.34))  # the same for the first two distractors and for each of the others
DISTRACTORS = (3, 6)  # the least and the greatest number of unnamed things in a scene
_GROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "grass": (95, 150, 70), "sky": (125, 175, 230), "sand": (215, 190, 140), "water": (70, 130, 170),
    "brick": (165, 95, 75), "snow": (232, 236, 242),
}  # fmt: skip
_SPLITS = {"train": 0, "val": 1, "unseen": 2}
_HARD = 1_000  # keeps the hard scenes' random streams apart from the others'

HARD_KINDS: tuple[str, ...] = ("tint", "part", "absent")
LOOK_ALIKES: tuple[tuple[str, str], ...] = (("ball", "clock"),)
"""Kinds that differ in one part: the same disc with another face."""

Colour = tuple[int, int, int]


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
    distractors: tuple[int, int] = DISTRACTORS,
    distractor_tints: int = len(TINTS),
) -> Scene:
    """Draw scene `index` of a split at size × size pixels.

    `train` leaves out the held-out (object, ground) pairs, `val` draws all pairs, `unseen` draws only held-out ones.
    `objects` is the least and the greatest number of objects (at most 3); an object that finds no room is left out.
    `distractors` is the same for the unnamed things that are laid where room is left; they take the `distractor_tints` tints
    that stand out most from the ground.
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
    return _draw(rng, ground, named, [_SPANS[count]] * count, size, distractors, distractor_tints)


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
    distractors: tuple[int, int] = DISTRACTORS,
    distractor_tints: int = len(TINTS),
) -> HardScene:
    """Draw hard scene `index`; kinds take turns unless one is named. Distractors are as in `draw_scene`.

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
        scene = _draw(rng, ground, named, [(side, side + 1e-6)] * len(named), size, distractors, distractor_tints)
        if len(scene.objects) == len(named):
            return HardScene(kind, scene, names)
    raise AssertionError(f"no room for two objects in hard scene {split}/{seed}/{index}")


def _draw(
    rng: np.random.Generator,
    ground: str,
    named: Sequence[tuple[str, str, int]],
    spans: Sequence[tuple[float, float]],
    size: int,
    distractors: tuple[int, int],
    distractor_tints: int,
) -> Scene:
    """Paint a ground, lay the named (word, tint, label) objects on it, then unnamed distractors wherever room is left.

    The first two distractors are as large as objects and all are as colourful and as solid: an odd colour says nothing.
    """
    canvas = Image.fromarray(_GROUNDS[ground](rng, size))
    labels = np.zeros((size, size), np.uint8)
    taken: list[tuple[int, int, int]] = []
    placed: list[Placed] = []
    for (word, tint, label), span in zip(named, spans, strict=True):
        box = _free_box(rng, size, taken, span)
        if box is None:
            continue
        patch = _draw_object(word, _jitter(rng, TINTS[tint]), rng)
        alpha = _paste(canvas, patch, box, angle=float(rng.uniform(-25, 25)), flip=bool(rng.integers(2)))
        inside, rim = alpha >= 0.75, (alpha > 0.1) & (alpha < 0.75)
        labels[inside] = label
        labels[rim] = VOID
        taken.append(box)
        placed.append(Placed(word, tint, box))
    tints = standing_out(ground, distractor_tints)
    for number in range(int(rng.integers(distractors[0], distractors[1] + 1))):
        if (box := _free_box(rng, size, taken, _LITTER[min(number, 2)])) is not None:
            alpha = _paste(canvas, _distractor(rng, tints), box, angle=float(rng.uniform(0, 360)))
            labels[(alpha > 0.1) & (labels > 0)] = VOID  # boxes may overlap a little: a part that is covered ...
            labels[alpha >= 0.75] = 0  # ... is no part of the object
            taken.append(box)
    return Scene(np.asarray(canvas, np.uint8).copy(), labels, ground, tuple(placed))


def _free_box(
    rng: np.random.Generator, size: int, taken: list[tuple[int, int, int]], span: tuple[float, float]
) -> tuple[int, int, int] | None:
    for _ in range(40):
        side = round(size * float(rng.uniform(*span)))
        left, top = (int(v) for v in rng.integers(0, size - side + 1, 2))
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


def _jitter(rng: np.random.Generator, colour: Colour, amount: float = 22) -> Colour:
    r, g, b = (int(np.clip(v + rng.uniform(-amount, amount), 0, 255)) for v in colour)
    return r, g, b


def _shade(colour: Colour, factor: float) -> Colour:
    """Darker below 1, towards white above 1."""
    if factor <= 1:
        r, g, b = (int(v * factor) for v in colour)
    else:
        r, g, b = (int(255 - (255 - v) * (2 - factor)) for v in colour)
    return r, g, b


# ---------------------------------------------------------------- grounds: uint8 [size size 3]


def _field(rng: np.random.Generator, size: int, base: Colour, noise: float) -> np.ndarray:
    return np.asarray(_jitter(rng, base, 16), np.float32) + rng.normal(0, noise, (size, size, 1)).astype(np.float32)


def _finish(field: np.ndarray) -> np.ndarray:
    return np.clip(field, 0, 255).astype(np.uint8)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["grass"], 6)
    for _ in range(size * 3):
        x, y, tall = int(rng.integers(size)), int(rng.integers(size)), int(rng.integers(3, 7))
        field[max(0, y - tall) : y + 1, x] += rng.uniform(-45, 35)
    return _finish(field)


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["sky"], 2)
    field += np.linspace(-30, 35, size, dtype=np.float32)[:, None, None]
    return _finish(field)


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["sand"], 5)
    specks = rng.random((size, size)) < 0.12
    field[specks] += rng.uniform(-60, 25, (int(specks.sum()), 1))
    return _finish(field)


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["water"], 4)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    phase, wavelength = rng.uniform(0, 6.3), rng.uniform(5, 8)
    wave = np.sin(2 * math.pi * y / wavelength + 1.3 * np.sin(2 * math.pi * x / 16 + phase))
    field += 26 * wave[..., None]
    return _finish(field)


def _brick(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["brick"], 6)
    high, wide = int(rng.integers(6, 9)), int(rng.integers(11, 15))
    offset = int(rng.integers(wide))
    mortar = np.asarray((200, 190, 180), np.float32)
    for row, y in enumerate(range(0, size, high)):
        field[y] = mortar
        for x in range((row % 2) * wide // 2 + offset - wide, size, wide):
            if x >= 0:
                field[y : y + high, x] = mortar
    return _finish(field)


def _snow(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, _GROUND_COLOURS["snow"], 3)
    small = rng.normal(0, 12, (size // 8 + 1, size // 8 + 1)).astype(np.float32)
    drift = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    field += np.asarray(drift)[..., None]
    return _finish(field)


_GROUNDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "grass": _grass, "sky": _sky, "sand": _sand, "water": _water, "brick": _brick, "snow": _snow,
}  # fmt: skip


# ---------------------------------------------------------------- objects: RGBA patches of _PATCH pixels a side

INK: Colour = (45, 40, 45)
WOOD: Colour = (120, 85, 50)
LEAF: Colour = (60, 130, 60)
PAPER: Colour = (245, 240, 228)


def _draw_object(word: str, tint: Colour, rng: np.random.Generator) -> Image.Image:
    patch = Image.new("RGBA", (_PATCH, _PATCH), (*tint, 0))
    _OBJECTS[word](ImageDraw.Draw(patch), tint, rng)
    return patch


def standing_out(ground: str, count: int) -> tuple[str, ...]:
    """The `count` tints whose colours are farthest from the ground's, in the order of TINTS."""
    far = sorted(TINTS, key=lambda tint: -math.dist(TINTS[tint], _GROUND_COLOURS[ground]))[:count]
    return tuple(tint for tint in TINTS if tint in far)


def _distractor(rng: np.random.Generator, tints: Sequence[str]) -> Image.Image:
    """An unnamed thing in one or two of the tints: a polygon, an ellipse, a ring or a bar."""
    tint, second = (_jitter(rng, TINTS[str(t)]) for t in rng.choice(tints, 2))
    patch = Image.new("RGBA", (_PATCH, _PATCH), (*tint, 0))
    d = ImageDraw.Draw(patch)
    form = int(rng.integers(4))
    if form == 0:
        angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 6))))
        d.polygon([(64 + 58 * math.cos(a), 64 + 58 * math.sin(a)) for a in angles], fill=(*tint, 255))
    elif form == 1:
        d.ellipse((6, 14, 122, 114), fill=(*tint, 255))
    elif form == 2:
        d.ellipse((10, 10, 118, 118), outline=(*tint, 255), width=36)
    else:
        d.rounded_rectangle((8, 22, 120, 106), 10, fill=(*tint, 255))
    if form != 2 and rng.integers(2):
        d.ellipse((46, 46, 82, 82), fill=(*second, 255))
    return patch


def _apple(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.line((64, 40, 72, 10), fill=WOOD, width=8)
    d.ellipse((12, 32, 76, 118), fill=c)
    d.ellipse((52, 32, 116, 118), fill=c)
    d.ellipse((72, 8, 108, 30), fill=LEAF)
    d.ellipse((26, 48, 44, 74), fill=_shade(c, 1.5))


def _tree(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.rectangle((54, 84, 74, 124), fill=WOOD)
    for top, half in ((4, 30), (30, 42), (56, 54)):
        d.polygon([(64, top), (64 - half, top + 42), (64 + half, top + 42)], fill=c)
        d.line((64 - half, top + 42, 64 + half, top + 42), fill=_shade(c, 0.6), width=4)


def _house(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.rectangle((20, 58, 108, 122), fill=PAPER)
    d.polygon([(64, 6), (6, 60), (122, 60)], fill=c)
    d.rectangle((54, 84, 76, 122), fill=WOOD)
    d.rectangle((28, 72, 46, 90), fill=INK)
    d.rectangle((84, 72, 102, 90), fill=INK)


def _fish(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.polygon([(84, 64), (122, 30), (122, 98)], fill=_shade(c, 0.7))
    d.ellipse((6, 34, 98, 94), fill=c)
    d.polygon([(44, 36), (76, 14), (74, 40)], fill=_shade(c, 0.7))
    for x in (50, 64, 78):
        d.arc((x - 14, 46, x + 6, 82), 290, 70, fill=_shade(c, 0.55), width=4)
    d.ellipse((20, 52, 34, 66), fill=PAPER)
    d.ellipse((24, 56, 31, 63), fill=INK)


def _boat(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.line((60, 8, 60, 90), fill=INK, width=6)
    d.polygon([(66, 10), (66, 76), (112, 76)], fill=PAPER)
    d.polygon([(54, 22), (54, 76), (20, 76)], fill=PAPER)
    d.polygon([(6, 84), (122, 84), (100, 120), (26, 120)], fill=c)


def _sun(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    for k in range(10):
        a = 2 * math.pi * k / 10
        left, right = a - 0.16, a + 0.16
        d.polygon(
            [
                (64 + 62 * math.cos(a), 64 + 62 * math.sin(a)),
                (64 + 32 * math.cos(left), 64 + 32 * math.sin(left)),
                (64 + 32 * math.cos(right), 64 + 32 * math.sin(right)),
            ],
            fill=_shade(c, 0.85),
        )
    d.ellipse((28, 28, 100, 100), fill=c)
    d.ellipse((42, 42, 86, 86), fill=_shade(c, 1.35))


def _flower(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.line((64, 60, 64, 124), fill=LEAF, width=9)
    d.ellipse((66, 88, 100, 106), fill=LEAF)
    for k in range(5):
        a = 2 * math.pi * k / 5 - math.pi / 2
        x, y = 64 + 26 * math.cos(a), 44 + 26 * math.sin(a)
        d.ellipse((x - 19, y - 19, x + 19, y + 19), fill=c)
    d.ellipse((50, 30, 78, 58), fill=INK)


def _kite(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.line((64, 86, 48, 100, 78, 112, 60, 126), fill=INK, width=5)
    d.polygon([(64, 4), (108, 40), (64, 92), (20, 40)], fill=c)
    d.polygon([(64, 4), (108, 40), (64, 40)], fill=_shade(c, 1.5))
    d.polygon([(64, 92), (20, 40), (64, 40)], fill=_shade(c, 0.6))


def _clock(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.ellipse((8, 8, 120, 120), fill=c)
    d.ellipse((24, 24, 104, 104), fill=PAPER)
    hour, minute = rng.uniform(0, 2 * math.pi, 2)
    d.line((64, 64, 64 + 22 * math.cos(hour), 64 + 22 * math.sin(hour)), fill=INK, width=8)
    d.line((64, 64, 64 + 34 * math.cos(minute), 64 + 34 * math.sin(minute)), fill=INK, width=5)


def _mushroom(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.rounded_rectangle((46, 60, 82, 122), 12, fill=PAPER)
    d.pieslice((8, 8, 120, 128), 180, 360, fill=c)
    for x, y, r in ((40, 44, 9), (66, 28, 10), (90, 48, 8)):
        d.ellipse((x - r, y - r, x + r, y + r), fill=PAPER)


def _cloud(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    pale = _shade(c, 1.45)
    for x, y, r in ((32, 74, 26), (58, 54, 32), (90, 66, 30), (64, 82, 26)):
        d.ellipse((x - r, y - r, x + r, y + r), fill=pale)
    d.rectangle((32, 84, 92, 101), fill=pale)
    d.arc((30, 44, 84, 96), 190, 290, fill=_shade(c, 1.1), width=5)


def _ball(d: ImageDraw.ImageDraw, c: Colour, rng: np.random.Generator) -> None:
    d.ellipse((8, 8, 120, 120), fill=c)
    d.pieslice((8, 8, 120, 120), 60, 120, fill=PAPER)
    d.pieslice((8, 8, 120, 120), 180, 240, fill=PAPER)
    d.pieslice((8, 8, 120, 120), 300, 360, fill=PAPER)


_OBJECTS: dict[str, Callable[[ImageDraw.ImageDraw, Colour, np.random.Generator], None]] = {
    "apple": _apple, "tree": _tree, "house": _house, "fish": _fish, "boat": _boat, "sun": _sun, "flower": _flower,
    "kite": _kite, "clock": _clock, "mushroom": _mushroom, "cloud": _cloud, "ball": _ball,
}  # fmt: skip
