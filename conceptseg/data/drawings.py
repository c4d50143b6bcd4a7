"""How the drawn world looks: the grounds, the twelve kinds of objects in any tint, and unnamed things."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

OBJECTS: tuple[str, ...] = (
    "apple", "tree", "house", "fish", "boat", "sun", "flower", "kite", "clock", "mushroom", "cloud", "ball",
)  # fmt: skip
GROUNDS: tuple[str, ...] = ("grass", "sky", "sand", "water", "brick", "snow")
TINTS: dict[str, tuple[int, int, int]] = {
    "red": (205, 50, 45), "orange": (235, 140, 40), "yellow": (235, 215, 60), "green": (70, 165, 75),
    "blue": (60, 95, 205), "purple": (135, 70, 175), "pink": (240, 150, 190), "gray": (140, 140, 145),
}  # fmt: skip
Colour = tuple[int, int, int]
GROUND_COLOURS: dict[str, tuple[int, int, int]] = {
    "grass": (95, 150, 70), "sky": (125, 175, 230), "sand": (215, 190, 140), "water": (70, 130, 170),
    "brick": (165, 95, 75), "snow": (232, 236, 242),
}  # fmt: skip
_PATCH = 128  # pixels of an object's own drawing canvas, before it is tilted and shrunk


def standing_out(ground: str, count: int) -> tuple[str, ...]:
    """The `count` tints whose colours are farthest from the ground's, in the order of TINTS."""
    far = sorted(TINTS, key=lambda tint: -math.dist(TINTS[tint], GROUND_COLOURS[ground]))[:count]
    return tuple(tint for tint in TINTS if tint in far)


def jitter(rng: np.random.Generator, colour: Colour, amount: float = 22) -> Colour:
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
    return np.asarray(jitter(rng, base, 16), np.float32) + rng.normal(0, noise, (size, size, 1)).astype(np.float32)


def _finish(field: np.ndarray) -> np.ndarray:
    return np.clip(field, 0, 255).astype(np.uint8)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, GROUND_COLOURS["grass"], 6)
    for _ in range(size * 3):
        x, y, tall = int(rng.integers(size)), int(rng.integers(size)), int(rng.integers(3, 7))
        field[max(0, y - tall) : y + 1, x] += rng.uniform(-45, 35)
    return _finish(field)


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, GROUND_COLOURS["sky"], 2)
    field += np.linspace(-30, 35, size, dtype=np.float32)[:, None, None]
    return _finish(field)


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, GROUND_COLOURS["sand"], 5)
    specks = rng.random((size, size)) < 0.12
    field[specks] += rng.uniform(-60, 25, (int(specks.sum()), 1))
    return _finish(field)


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, GROUND_COLOURS["water"], 4)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    phase, wavelength = rng.uniform(0, 6.3), rng.uniform(5, 8)
    wave = np.sin(2 * math.pi * y / wavelength + 1.3 * np.sin(2 * math.pi * x / 16 + phase))
    field += 26 * wave[..., None]
    return _finish(field)


def _brick(rng: np.random.Generator, size: int) -> np.ndarray:
    field = _field(rng, size, GROUND_COLOURS["brick"], 6)
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
    field = _field(rng, size, GROUND_COLOURS["snow"], 3)
    small = rng.normal(0, 12, (size // 8 + 1, size // 8 + 1)).astype(np.float32)
    drift = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    field += np.asarray(drift)[..., None]
    return _finish(field)


_PAINTED: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "grass": _grass, "sky": _sky, "sand": _sand, "water": _water, "brick": _brick, "snow": _snow,
}  # fmt: skip


def draw_ground(ground: str, rng: np.random.Generator, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """A square of one ground, size pixels a side; no two are alike."""
    return _PAINTED[ground](rng, size)


# ---------------------------------------------------------------- objects: RGBA patches of _PATCH pixels a side

INK: Colour = (45, 40, 45)
WOOD: Colour = (120, 85, 50)
LEAF: Colour = (60, 130, 60)
PAPER: Colour = (245, 240, 228)


def draw_object(word: str, tint: Colour, rng: np.random.Generator) -> Image.Image:
    patch = Image.new("RGBA", (_PATCH, _PATCH), (*tint, 0))
    _OBJECTS[word](ImageDraw.Draw(patch), tint, rng)
    return patch


def draw_distractor(rng: np.random.Generator, tints: Sequence[str]) -> Image.Image:
    """An unnamed thing in one or two of the tints: a polygon, an ellipse, a ring or a bar."""
    tint, second = (jitter(rng, TINTS[str(t)]) for t in rng.choice(tints, 2))
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
