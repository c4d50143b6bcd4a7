"""Reading one image or one mask, and what every data set checks alike. Nothing is resized, turned or clipped."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.types import BACKGROUND, VOID

Item = TypeVar("Item")
MaskEncoding = Literal["index", "rgb"]
MASK_ENCODINGS: tuple[str, ...] = ("index", "rgb")
VOC_LABELS: tuple[int, ...] = (*range(21), VOID)

# All modes that become RGB without a choice being made; alpha and 16 bits would need one.
_EXACT_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def voc_colour(index: int) -> tuple[int, int, int]:
    """Colour of a class in the VOC colour map: bits 0, 1, 2 of the index go to the top bit of R, G, B, and so on down.

    >>> voc_colour(15), voc_colour(255)
    ((192, 128, 128), (224, 224, 192))
    """
    red = green = blue = 0
    for level in range(7, -1, -1):
        red |= (index & 1) << level
        green |= (index >> 1 & 1) << level
        blue |= (index >> 2 & 1) << level
        index >>= 3
    return red, green, blue


def read_image(source: Path | bytes, key: str, name: str = "") -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB, 0..255, as stored: the EXIF orientation is not applied. Grey, palette and CMYK become RGB."""
    with _opened(source, key, name, "image") as picture:
        if picture.mode not in _EXACT_MODES or "transparency" in picture.info:
            raise DataError(
                f"{key}: image {_named(source, name)} is of mode {picture.mode}"
                f"{' with transparency' if 'transparency' in picture.info else ''}; an opaque 8-bit image was wanted.\n"
                "  Save it as RGB, so that what the model sees is your choice."
            )
        return np.array(picture.convert("RGB"), np.uint8)


def read_mask(source: Path | bytes, key: str, name: str = "", encoding: MaskEncoding = "index") -> UInt8[np.ndarray, "H W"]:
    """A mask as class indices. "index": the stored 8-bit values; "rgb": the VOC colour map, decoded exactly."""
    with _opened(source, key, name, "mask") as picture:
        mode, pixels = picture.mode, np.array(picture)
    where = f"{key}: mask {_named(source, name)}"
    if encoding == "rgb":
        if mode != "RGB":
            raise DataError(
                f"{where} is of mode {mode}, but dataset.mask_encoding=rgb wants RGB colours.\n"
                "  Set dataset.mask_encoding=index if the mask stores class indices."
            )
        return _decode_voc_colours(pixels, where)
    if mode in ("RGB", "RGBA"):
        raise DataError(
            f"{where} is RGB coded (mode {mode}); class indices were wanted (mode P or L).\n"
            "  Set dataset.mask_encoding=rgb, which decodes the VOC palette."
        )
    if mode not in ("P", "L", "1"):
        raise DataError(f"{where} is of mode {mode}; class indices in 8 bits were wanted (mode P or L).\n  Save it as mode L.")
    return pixels.astype(np.uint8)  # mode 1 arrives as bool


def check_mask(image: np.ndarray, mask: np.ndarray, key: str, labels: Collection[int], known: str) -> None:
    """The mask must fit its image and hold nothing but `labels` and void; `known` says in a message where labels are from."""
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{key}: the mask is {mask.shape[0]} x {mask.shape[1]} (height x width), but its image is "
            f"{image.shape[0]} x {image.shape[1]}.\n  Masks are never resized to fit; restore the pair from the source."
        )
    strange = sorted(set(present_labels(mask)) - {BACKGROUND, VOID, *labels})
    if strange:
        listed = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        raise DataError(
            f"{key}: the mask holds the values {listed}; {known} and {VOID} (void) were wanted.\n"
            "  Look at dataset.mask_encoding, and whether the mask belongs to this data set."
        )


def present_labels(mask: np.ndarray) -> list[int]:
    """The values that occur in a uint8 mask, ascending."""
    return [int(v) for v in np.flatnonzero(np.bincount(mask.ravel(), minlength=256))]


def checked_encoding(encoding: str) -> MaskEncoding:
    if encoding == "index":
        return "index"
    if encoding == "rgb":
        return "rgb"
    raise ConfigError(f'dataset.mask_encoding is "{encoding}". {did_you_mean(encoding, MASK_ENCODINGS)}')


def checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ConfigError(f"dataset.limit is {limit}; a positive number of samples was wanted, or null for all.")
    return limit


def unknown_key(key: str, keys: Collection[str], name: str) -> DataError:
    return DataError(f'{name}: there is no sample "{key}" among {len(keys)}. {did_you_mean(key, keys)}')


def unique_keys(keys: Sequence[str], source: str) -> tuple[str, ...]:
    """The keys, after a check that each is there once and that there is one at all."""
    seen: set[str] = set()
    twice = [key for key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(
            f'{source} names {len(twice)} samples more than once (first: "{twice[0]}"); each would be counted twice.\n'
            "  Take the list from the source again, or another revision of it."
        )
    if not keys:
        raise DataError(f"{source} names no sample.\n  Restore it from the source, or choose another dataset.split.")
    return tuple(keys)


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items at even distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def reading_problems(keys: Sequence[str], read: Callable[[str], object], sample: int = 20, shown: int = 3) -> list[str]:
    """What goes wrong when `sample` of the keys are decoded, one line each; at most `shown` of them are spelt out."""
    tried, found = spread(keys, sample), []
    for key in tried:
        try:
            read(key)
        except DataError as error:
            found.append(one_line(error))
    if len(found) > shown:
        found[shown:] = [f"{len(found) - shown} more of the {len(tried)} samples that were decoded fail; mend the first ones."]
    return found


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _decode_voc_colours(pixels: np.ndarray, where: str) -> np.ndarray:
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    mask = np.zeros(codes.shape, np.uint8)
    known = np.zeros(codes.shape, bool)
    for label in VOC_LABELS:
        red, green, blue = voc_colour(label)
        hit = codes == (red << 16 | green << 8 | blue)
        mask[hit] = label
        known |= hit
    if not known.all():
        row, column = (int(v) for v in np.argwhere(~known)[0])
        raise DataError(
            f"{where} has {int((~known).sum())} pixels of colours that are not in the VOC colour map, the first "
            f"{tuple(int(v) for v in pixels[row, column])} at row {row}, column {column}.\n"
            "  Take the mask as it was published: resizing or JPEG mixes its colours."
        )
    return mask


@contextmanager
def _opened(source: Path | bytes, key: str, name: str, what: str) -> Iterator[Image.Image]:
    """A fully decoded picture, or a DataError that names the file and the key."""
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        picture.load()
    except FileNotFoundError as error:
        raise DataError(
            f"{key}: {what} {_named(source, name)} is missing.\n  Restore it from the source, or point dataset.root elsewhere."
        ) from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{key}: {what} {_named(source, name)} can't be decoded: {reason}.\n  The file is damaged or cut short; restore it."
        ) from error
    with picture:
        yield picture


def _named(source: Path | bytes, name: str) -> str:
    return name or (f"of {len(source)} bytes" if isinstance(source, bytes) else str(source))
