"""A sheet of pictures: image, truth, and each method's map and prediction, one row per sample. Needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL import __version__ as PILLOW
from PIL.PngImagePlugin import PngInfo

from conceptseg.errors import ReportError
from conceptseg.files import write_atomically

VOID = 255  # as in conceptseg.types, which would import torch
MAX_BYTES = 1_500_000

MARGIN = 16
CELL_GAP = 3  # between a method's map and its prediction
COLUMN_GAP = 14
ROW_GAP = 12

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

_INK, _QUIET, _RULE = (25, 25, 30), (105, 105, 115), (215, 215, 220)
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_HIT, _EXTRA, _MISSED, _CONFUSED = (0, 158, 115), (213, 94, 0), (0, 114, 178), (204, 121, 167)
# Unlike the four above; a picture with more classes than tints uses them again.
_CLASS_TINTS = ((245, 210, 40), (140, 85, 195), (110, 205, 235), (150, 100, 55), (170, 210, 90), (235, 150, 150))


@dataclass(frozen=True, slots=True)
class PanelCell:
    """Answer of one method for one sample."""

    map: Pixels
    """uint8 [h w], 255 where the method sees most of the concept; drawn on its own grid."""
    prediction: Pixels
    """uint8 [H W], class indices."""
    caption: str
    """Printed under the two pictures, such as "IoU 0.61"."""
    foreground: tuple[int, ...]
    """Class indices that count as found; every other index is background."""


@dataclass(frozen=True, slots=True)
class PanelRow:
    """One sample. The label's first line is its word; further lines (its key, its ground) are printed small."""

    label: str
    image: Pixels
    """uint8 [H W 3], RGB."""
    truth: Pixels
    """uint8 [H W], class indices, 0 background, 255 void."""
    methods: tuple[PanelCell, ...]
    """One for each column title, in that order."""


def picture_sheet(path: Path, columns: Sequence[str], rows: Sequence[PanelRow], cell: int = 128) -> None:
    """Write a PNG sheet: for each row its label, image and truth, then a map and a prediction under each title of `columns`.

    Pictures fit a square of `cell` pixels with their proportions kept. Maps are enlarged to the nearest cell, so that their
    true grid is seen. A sheet above MAX_BYTES is written with 256 colours, or with as many as fit. A sheet that shows just
    this is left as it is.
    """
    _check(columns, rows)
    content = _content(columns, rows, cell)
    if path.exists() and _content_of(path) == content:
        return
    body, small = _font(max(13, cell // 8)), _font(max(12, cell // 10))
    label_width = round(1.15 * cell)
    pair = 2 * cell + CELL_GAP
    lefts = [MARGIN + label_width + i * (cell + COLUMN_GAP) for i in range(2)]
    lefts += [MARGIN + label_width + 2 * (cell + COLUMN_GAP) + i * (pair + COLUMN_GAP) for i in range(len(columns))]
    width = (lefts[-1] + (pair if columns else cell)) + MARGIN
    titles = [_wrapped("image", cell, body), _wrapped("truth", cell, body), *(_wrapped(title, pair, body) for title in columns)]
    title_height = max(len(lines) for lines in titles) * _line_height(body)
    top = MARGIN + title_height + _line_height(small) + 4
    under = _line_height(small) + ROW_GAP  # the captions
    sizes = [_fitted(row.image.shape[:2], cell) for row in rows]
    heights = [max(height, cell // 2) for height, _ in sizes]  # half a cell is the least that a label needs
    legend_top = top + sum(heights) + len(rows) * under + ROW_GAP // 2
    legend = _legend(rows)
    height = legend_top + _draw_legend(None, legend, width, 0, small) + MARGIN

    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (left, lines) in enumerate(zip(lefts, titles, strict=True)):
        span = cell if i < 2 else pair
        y = MARGIN + title_height - len(lines) * _line_height(body)
        for line in lines:
            _centred(draw, line, left, span, y, body, _INK)
            y += _line_height(body)
        if i >= 2:
            _centred(draw, "map", left, cell, y + 1, small, _QUIET)
            _centred(draw, "prediction", left + cell + CELL_GAP, cell, y + 1, small, _QUIET)
    y = top
    for row, size, row_height in zip(rows, sizes, heights, strict=True):
        if y > top:
            draw.line([(MARGIN, y - ROW_GAP // 2), (width - MARGIN, y - ROW_GAP // 2)], _RULE)
        _draw_label(draw, row.label, (MARGIN, y), (label_width - COLUMN_GAP, row_height), body, small)
        _paste(sheet, _enlarged(row.image, size), lefts[0], y, cell, row_height)
        _paste(sheet, _truth(row, size), lefts[1], y, cell, row_height)
        for left, method in zip(lefts[2:], row.methods, strict=True):
            _paste(sheet, _nearest(colour_map()[method.map], size), left, y, cell, row_height)
            _paste(sheet, _prediction(row, method, size), left + cell + CELL_GAP, y, cell, row_height)
            _centred(draw, method.caption, left, pair, y + row_height + 2, small, _INK)
        y += row_height + under
    _draw_legend(sheet, legend, width, legend_top, small)
    write_atomically(path, _png(sheet, content))


def _content(columns: Sequence[str], rows: Sequence[PanelRow], cell: int) -> str:
    """Digest of all that a sheet is drawn from, this code too."""
    digest = sha256(Path(__file__).read_bytes() + repr((list(columns), cell, PILLOW)).encode())
    for row in rows:
        arrays = [row.image, row.truth, *(array for method in row.methods for array in (method.map, method.prediction))]
        said = row.label, [(method.caption, method.foreground) for method in row.methods], [array.shape for array in arrays]
        digest.update(repr(said).encode())
        for array in arrays:
            digest.update(array.tobytes())
    return digest.hexdigest()


def _content_of(path: Path) -> str | None:
    """Return the sources recorded in a picture sheet; None for a file without a record."""
    try:
        with Image.open(path) as sheet:
            return sheet.info.get("content")
    except OSError:
        return None


@cache
def colour_map() -> Pixels:
    """Viridis as uint8 [256 3]."""
    from matplotlib import colormaps  # late: a slow import that a table without pictures does not need

    table: Pixels = np.round(np.asarray(colormaps["viridis"](np.arange(256)))[:, :3] * 255).astype(np.uint8)
    table.setflags(write=False)
    return table


def _check(columns: Sequence[str], rows: Sequence[PanelRow]) -> None:
    if not rows:
        raise ReportError("a picture sheet was requested without rows. Choose at least one sample.")
    for row in rows:
        name = row.label.replace("\n", " ")
        if len(row.methods) != len(columns):
            raise ReportError(f'picture row "{name}" has {len(row.methods)} methods for {len(columns)} titles; give one each.')
        wanted = row.image.shape[:2]
        arrays = {"image": (row.image, (*wanted, 3)), "truth": (row.truth, wanted)}
        for title, method in zip(columns, row.methods, strict=True):
            arrays[f"prediction of {title}"] = (method.prediction, wanted)
            arrays[f"map of {title}"] = (method.map, method.map.shape[:2])
        for what, (array, shape) in arrays.items():
            if array.dtype != np.uint8 or array.shape != shape or not array.size or len(shape) < 2:
                raise ReportError(
                    f'picture row "{name}": {what} is {array.dtype} {list(array.shape)}, wanted uint8 '
                    f"{list(shape) if len(shape) > 1 else '[h w]'}. Resize or scale it before drawing."
                )


# ---------------------------------------------------------------- pictures: each returns uint8 [height width 3]


def _truth(row: PanelRow, size: tuple[int, int]) -> Pixels:
    """The grey photo with each class tinted and outlined, void hatched."""
    canvas = _grey(row.image, size)
    truth = _nearest(row.truth, size)
    classes = [index for index in np.unique(row.truth) if index not in (0, VOID)]
    for place, index in enumerate(classes):
        _tint(canvas, truth == index, _CLASS_TINTS[place % len(_CLASS_TINTS)], 0.6)
    _hatch(canvas, truth == VOID)
    return canvas


def _prediction(row: PanelRow, method: PanelCell, size: tuple[int, int]) -> Pixels:
    """The grey photo with hits, extras, misses and confused classes tinted, void hatched."""
    canvas = _grey(row.image, size)
    truth, prediction = _nearest(row.truth, size), _nearest(method.prediction, size)
    is_object, is_found, scored = np.isin(truth, method.foreground), np.isin(prediction, method.foreground), truth != VOID
    right = truth == prediction
    _tint(canvas, is_object & is_found & right, _HIT, 0.6)
    _tint(canvas, is_object & is_found & ~right, _CONFUSED, 0.6)
    _tint(canvas, ~is_object & is_found & scored, _EXTRA, 0.6)
    _tint(canvas, is_object & ~is_found, _MISSED, 0.6)
    _hatch(canvas, ~scored)
    return canvas


def _grey(image: Pixels, size: tuple[int, int]) -> Pixels:
    """The photo in 32 levels of a pale grey, so that tints stand out and the file stays small."""
    grey = np.asarray(Image.fromarray(_enlarged(image, size)).convert("L"), np.int32)
    return np.repeat((90 + grey // 8 * 8 * 150 // 255).astype(np.uint8)[..., None], 3, axis=2)


def _tint(canvas: Pixels, where: NDArray[np.bool_], colour: Colour, share: float) -> None:
    """Colour a region in place and darken its rim."""
    canvas[where] = ((1 - share) * canvas[where] + share * np.asarray(colour)).astype(np.uint8)
    padded = np.pad(where, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    canvas[where & ~inner] = np.asarray(colour) * 4 // 5


def _hatch(canvas: Pixels, where: NDArray[np.bool_]) -> None:
    y, x = np.indices(where.shape)
    canvas[where] = (190, 190, 190)
    canvas[where & ((x + y) % 4 == 0)] = (110, 110, 110)


def _fitted(shape: tuple[int, ...], cell: int) -> tuple[int, int]:
    """Height and width of the largest picture of these proportions in a cell."""
    longest = max(shape)
    return max(1, round(shape[0] * cell / longest)), max(1, round(shape[1] * cell / longest))


def _nearest(array: Pixels, size: tuple[int, int]) -> Pixels:
    """Every target pixel takes the source cell that holds its centre."""
    y = ((np.arange(size[0]) + 0.5) * array.shape[0] / size[0]).astype(int)
    x = ((np.arange(size[1]) + 0.5) * array.shape[1] / size[1]).astype(int)
    enlarged: Pixels = array[y[:, None], x[None, :]]
    return enlarged


def _enlarged(image: Pixels, size: tuple[int, int]) -> Pixels:
    """A photo at cell size: sharp pixels when it grows, smooth when it shrinks."""
    if image.shape[0] <= size[0]:
        return _nearest(image, size)
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS), np.uint8)


def _paste(sheet: Image.Image, picture: Pixels, left: int, top: int, room: int, room_height: int) -> None:
    height, width = picture.shape[:2]
    sheet.paste(Image.fromarray(picture), (left + (room - width) // 2, top + (room_height - height) // 2))


def _png(sheet: Image.Image, shows: str) -> bytes:
    content, about = b"", PngInfo()
    about.add_text("content", shows)
    for colours in (None, 256, 128, 64, 32, 16):
        reduced = sheet if colours is None else sheet.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        buffer = BytesIO()
        reduced.save(buffer, "PNG", optimize=True, pnginfo=about)
        content = buffer.getvalue()
        if len(content) <= MAX_BYTES:
            return content
    raise ReportError(
        f"a picture sheet of {sheet.width}x{sheet.height} pixels takes {len(content)} bytes in 16 colours, above {MAX_BYTES}.\n"
        "  Draw fewer rows, fewer methods or smaller cells."
    )


# ---------------------------------------------------------------- words


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _line_height(font: Font) -> int:
    _, _, _, bottom = font.getbbox("Agjy|")
    return int(bottom) + 3


def _wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces, or anywhere in a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _centred(draw: ImageDraw.ImageDraw, text: str, left: int, span: int, y: int, font: Font, colour: Colour) -> None:
    draw.text((left + (span - font.getlength(text)) // 2, y), text, colour, font)


def _draw_label(
    draw: ImageDraw.ImageDraw, label: str, corner: tuple[int, int], room: tuple[int, int], body: Font, small: Font
) -> None:
    word, _, rest = label.partition("\n")
    lines = [(line, body, _INK) for line in _wrapped(word, room[0], body)]
    lines += [(line, small, _QUIET) for part in rest.splitlines() for line in _wrapped(part, room[0], small)]
    y = corner[1]
    for line, font, colour in lines:
        if y + _line_height(font) > corner[1] + room[1]:
            break
        draw.text((corner[0], y), line, colour, font)
        y += _line_height(font)


def _legend(rows: Sequence[PanelRow]) -> list[tuple[str, Colour | str]]:
    """Entry -> its colour, or "bar" or "hatch"."""
    entries: list[tuple[str, Colour | str]] = [
        ("map, less to more of the concept", "bar"), ("found", _HIT), ("extra (not in truth)", _EXTRA), ("missed", _MISSED),
    ]  # fmt: skip
    if any(len(method.foreground) > 1 for row in rows for method in row.methods):
        entries.append(("another class", _CONFUSED))
    return [*entries, ("void, not scored", "hatch")]


def _draw_legend(sheet: Image.Image | None, entries: list[tuple[str, Colour | str]], width: int, top: int, font: Font) -> int:
    """Draw swatches and words from the left, broken into lines; returns the height. Only measures when `sheet` is None."""
    line, x, y = _line_height(font) + 4, MARGIN, top
    for words, colour in entries:
        swatch = 6 * line if colour == "bar" else line
        span = round(swatch + 6 + font.getlength(words) + 18)
        if x > MARGIN and x + span - 18 > width - MARGIN:
            x, y = MARGIN, y + line + 4
        if sheet is not None:
            sheet.paste(_swatch(colour, swatch, line - 4), (x, y))
            ImageDraw.Draw(sheet).text((x + swatch + 6, y), words, _INK, font)
        x += span
    return y + line - top


def _swatch(colour: Colour | str, width: int, height: int) -> Image.Image:
    if isinstance(colour, tuple):
        canvas = np.full((height, width, 3), 200, np.uint8)
        _tint(canvas, np.ones((height, width), bool), colour, 0.6)
    elif colour == "bar":
        canvas = np.repeat(_nearest(colour_map()[None], (1, width)), height, axis=0)
    else:
        canvas = np.zeros((height, width, 3), np.uint8)
        _hatch(canvas, np.ones((height, width), bool))
    return Image.fromarray(canvas)
