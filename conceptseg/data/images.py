"""The one reader of images and masks, for runs, tables, studies and `explain`, and what every data set checks alike.

| what a file holds | as an image | as a mask of indices | as a mask of VOC colours |
| --- | --- | --- | --- |
| formats | PNG, JPEG, WebP, TIFF, BMP, GIF | PNG, TIFF, BMP, GIF | those and lossless WebP |
| RGB, 8 bits | as it is | refused | each colour one of VOC's |
| grey, 8 bits; black and white | R = G = B | the stored value; 0 and 1 | refused |
| palette | its colours | the stored index, where the palette agrees with VOC's or is grey | its colours |
| CMYK, YCbCr | Pillow's conversion | refused | refused |
| alpha, transparency | dropped where every pixel is opaque, else refused | refused; of a palette ignored | as of an image |
| grey of 2 or 4 bits | Pillow scales to 0..255 | refused: index or scaled? | refused |
| 16 bits, float | refused | refused | refused |
| lossy compression (JPEG) | as it is | refused | refused |
| several frames | refused (a phone's JPEG: the photo) | refused | refused |

Nothing is resized or clipped. A format that is not named is not opened: to read EPS, Pillow starts another program.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.reading import read_regular
from conceptseg.types import BACKGROUND, VOID

Item = TypeVar("Item")
MaskEncoding = Literal["index", "rgb", "stored"]
MASK_ENCODINGS: tuple[str, ...] = ("index", "rgb", "stored")
VOC_LABELS: tuple[int, ...] = (*range(21), VOID)

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF", "WEBP")
MAX_PIXELS = 89_478_485
"""Height times width of the largest picture that is decoded: from here on Pillow warns of a decompression bomb."""

_EXACT_MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
_WITH_ALPHA = ("RGBA", "LA", "PA")
_LOSSLESS_TIFF = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd")


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


def read_image(source: Path | bytes, key: str, name: str = "", upright: bool = True) -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB, 0..255. `key` and `name` say in messages whose image it is and where it lies.

    upright: turn it as its EXIF orientation says (tags 2 to 8), which is how viewers and `datasets` show it; False keeps the
    stored rows and columns. Raises DataError for what the table above refuses, and for files that are absent, no regular files,
    damaged, or of more than `MAX_PIXELS`.
    """
    where = f"{key}: image {_named(source, name)}"
    with _opened(source, where, IMAGE_FORMATS) as (picture, _):
        return as_rgb(picture, where, upright)


@contextmanager
def open_picture(source: Path | bytes, where: str) -> Iterator[Image.Image]:
    """An image file as Pillow decodes it, for callers that lay its transparent pixels on a colour. Raises DataError."""
    with _opened(source, where, IMAGE_FORMATS) as (picture, _):
        yield picture


def as_rgb(picture: Image.Image, where: str, upright: bool = True) -> UInt8[np.ndarray, "H W 3"]:
    """A picture of Pillow's as RGB, 0..255, under the same rules as `read_image`. Raises DataError."""
    if picture.format is not None and picture.format not in (*IMAGE_FORMATS, "MPO"):
        raise DataError(f"{where} is {picture.format}; {', '.join(IMAGE_FORMATS)} are read.\n  Save it as PNG.")
    _check_size(picture.size, where)
    with _decoding(where):
        _check_depth(picture.mode, _raw_mode(picture), where)
        picture.load()
        if upright:
            picture = ImageOps.exif_transpose(picture)
        mode, transparent = picture.mode, picture.mode in _WITH_ALPHA or "transparency" in picture.info
        if transparent:
            picture = picture.convert("RGBA")
            if picture.getchannel("A").getextrema() == (255, 255):
                return np.array(picture)[..., :3].copy()
    if transparent or mode not in _EXACT_MODES:
        raise DataError(
            f"{where} is of mode {mode}{', partly transparent' if transparent else ''}; an opaque 8-bit image was "
            "wanted.\n  Save it as RGB, so that what the model sees is your choice."
        )
    return np.array(picture.convert("RGB"), np.uint8)


def read_mask(
    source: Path | bytes, key: str, name: str = "", encoding: MaskEncoding = "index", upright: bool = True
) -> UInt8[np.ndarray, "H W"]:
    """A mask as class indices, 0..255.

    encoding: "index", the stored 8-bit values, where a palette must show VOC's colours or greys at those that occur; "stored",
    the same whatever the palette shows; "rgb", VOC's colours, of RGB pixels or of a palette, decoded exactly. upright: as for
    images. Raises DataError for what the table above refuses.
    """
    where = f"{key}: mask {_named(source, name)}"
    # JPEG is opened, so that it can be refused by its name.
    with _opened(source, where, (*MASK_FORMATS, "JPEG")) as (picture, raw):
        _check_lossless(picture, source, where)
        if encoding == "rgb":
            if picture.mode in ("L", "LA", "1"):
                raise DataError(
                    f"{where} is of mode {picture.mode}, but dataset.mask_encoding=rgb wants RGB colours or a palette.\n"
                    "  Set dataset.mask_encoding=index if the mask stores class indices."
                )
            return _decode_voc_colours(as_rgb(picture, where, upright), where)
        if picture.mode in ("RGB", "RGBA"):
            raise DataError(
                f"{where} is RGB coded (mode {picture.mode}); class indices were wanted (mode P or L).\n"
                "  Set dataset.mask_encoding=rgb, which decodes the VOC palette."
            )
        if picture.mode not in ("P", "L", "1"):
            raise DataError(
                f"{where} is of mode {picture.mode}; class indices in 8 bits were wanted (mode P or L).\n  Save it as mode L."
            )
        if raw and raw not in ("P", "P;1", "P;2", "P;4", "L", "1"):
            raise DataError(
                f"{where} stores its values as {raw}; whether they are class indices or shades of grey can't be told.\n"
                "  Save it with 8 bits a pixel."
            )
        turned = ImageOps.exif_transpose(picture) if upright else picture
        pixels = np.array(turned)  # of mode 1: bool
        if picture.mode == "P" and encoding == "index":
            _check_palette(turned, pixels, where)
    return pixels.astype(np.uint8)


def read_opacity(source: Path | bytes, key: str, name: str = "") -> Bool[np.ndarray, "H W"]:
    """A mask that is drawn as the opaque part of a picture: where alpha is above 0. Raises DataError, also without alpha."""
    where = f"{key}: mask {_named(source, name)}"
    with _opened(source, where, (*MASK_FORMATS, "JPEG")) as (picture, _):
        _check_lossless(picture, source, where)
        if "A" not in picture.getbands():
            raise DataError(
                f"{where} has no opacity (mode {picture.mode}); an RGBA picture whose opacity is the mask was wanted."
            )
        return np.array(picture.getchannel("A")) > 0


def orientation_note(source: Path | bytes, key: str, name: str, applied: bool) -> str:
    """For a message: the image's EXIF orientation (2 to 8) and whether it was applied; empty where it has none."""
    with _opened(source, f"{key}: image {_named(source, name)}", IMAGE_FORMATS) as (picture, _), _decoding(name):
        tag = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if tag not in range(2, 9):
        return ""
    done = "is applied, as `datasets` and viewers do" if applied else "is not applied: VOC's masks are drawn on the stored pixels"
    return f"; the image's EXIF orientation {tag} {done}"


def check_mask(
    image: np.ndarray, mask: np.ndarray, key: str, labels: Collection[int], known: str, orientation: Callable[[], str] = str
) -> None:
    """The mask must fit its image and hold nothing but `labels` and void; `known` says in a message where labels are from.

    orientation: what to add where the two differ in size; see `orientation_note`. Raises DataError.
    """
    check_shape(image, mask, key, orientation)
    strange = sorted(set(present_labels(mask)) - {BACKGROUND, VOID, *labels})
    if strange:
        listed = ", ".join(map(str, strange[:8])) + (", ..." if len(strange) > 8 else "")
        raise DataError(
            f"{key}: the mask holds the values {listed}; {known} and {VOID} (void) were wanted.\n"
            "  Look at dataset.mask_encoding, and whether the mask belongs to this data set."
        )


def check_shape(image: np.ndarray, mask: np.ndarray, key: str, orientation: Callable[[], str] = str) -> None:
    """The mask must be of its image's size; `orientation` as for `check_mask`. Raises DataError."""
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"{key}: the mask is {mask.shape[0]} x {mask.shape[1]} (height x width), but its image is "
            f"{image.shape[0]} x {image.shape[1]}{orientation()}.\n"
            "  Masks are never resized to fit; restore the pair from the source."
        )


def present_labels(mask: np.ndarray) -> list[int]:
    """The values that occur in a uint8 mask, ascending."""
    return [int(v) for v in np.flatnonzero(np.bincount(mask.ravel(), minlength=256))]


def checked_encoding(encoding: str) -> MaskEncoding:
    if encoding == "index":
        return "index"
    if encoding == "rgb":
        return "rgb"
    if encoding == "stored":
        return "stored"
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
    """Decode `sample` of the keys and return one line per error; at most `shown` of them are spelt out.

    One more line says so if no mask shows a class.
    """
    tried, found, without_class = spread(keys, sample), [], 0
    for key in tried:
        try:
            read_sample = read(key)
        except DataError as error:
            found.append(one_line(error))
        else:
            mask = getattr(read_sample, "mask", None)
            without_class += mask is not None and set(present_labels(mask)) <= {BACKGROUND, VOID}
    if len(found) > shown:
        found[shown:] = [f"{len(found) - shown} more of the {len(tried)} samples that were decoded fail; mend the first ones."]
    if tried and without_class == len(tried):
        found.append(
            f"None of the {len(tried)} masks that were decoded shows a class: every pixel is background or void ({VOID}), and "
            "nothing is scored. Are they the masks of these images, with the values that the settings name?"
        )
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


def _check_palette(picture: Image.Image, pixels: np.ndarray, where: str) -> None:
    """A palette says which class an index is: programs that renumber palettes keep the colours and change the indices.

    Void is left out where its colour is no class's: many palettes end before 255.
    """
    flat = picture.getpalette("RGB") or []
    palette = [tuple(flat[start : start + 3]) for start in range(0, len(flat) - 2, 3)]
    used = present_labels(pixels)
    shown = {index: palette[index] if index < len(palette) else (0, 0, 0) for index in used}
    classes = {voc_colour(label) for label in range(1, 21)}
    judged = [index for index in used if index != VOID or shown[index] in classes]
    grey = all(shown[index] == (index, index, index) for index in judged)
    strange = [index for index in judged if shown[index] != voc_colour(index)]
    if strange and not grey:
        index = strange[0]
        means = next((f", the colour of VOC's class {label}" for label in range(21) if shown[index] == voc_colour(label)), "")
        raise DataError(
            f"{where}: its palette shows index {index} as {shown[index]}{means}; VOC's class {index} is {voc_colour(index)}. "
            "A program may have renumbered the palette.\n"
            "  Set dataset.mask_encoding=rgb to read the colours, or dataset.mask_encoding=stored if the indices are right."
        )


def _check_lossless(picture: Image.Image, source: Path | bytes, where: str) -> None:
    lossy = picture.format in ("JPEG", "MPO")
    if picture.format == "TIFF":
        lossy = picture.info.get("compression") not in _LOSSLESS_TIFF
    if picture.format == "WEBP":
        lossy = b"VP8L" not in _webp_chunks(source)
    if lossy:
        packing = f" ({picture.info['compression']})" if picture.format == "TIFF" else ""
        raise DataError(
            f"{where} is {picture.format}{packing}, compressed with loss: its values are not the ones that were drawn.\n"
            "  Take the mask as it was published, or export it from its source as PNG."
        )


def _webp_chunks(source: Path | bytes) -> set[bytes]:
    """Names of the chunks of a WebP file: "VP8L" holds pixels without loss, "VP8 " with."""
    content = source if isinstance(source, bytes) else read_regular(source, str(source))
    names, at = set(), 12
    while at + 8 <= len(content):
        names.add(content[at : at + 4])
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return names


def _raw_mode(picture: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's words ("L;4": grey of 4 bits); empty once decoded, or where it is not said."""
    for tile in getattr(picture, "tile", None) or ():
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if arguments and isinstance(arguments[0], str):
            return arguments[0]
    return ""


def _check_depth(mode: str, raw: str, where: str) -> None:
    """Pillow keeps the upper 8 of 16 bits of colour without a word; grey and floats arrive as modes of their own."""
    if ";16" in raw or ";32" in raw or mode.startswith(("I", "F")):
        raise DataError(
            f"{where} is of mode {mode} with more than 8 bits a channel; 8 bits were wanted.\n"
            "  Scale it to 0..255 and save it with 8 bits, so that the values that are read are your choice."
        )


@contextmanager
def _opened(source: Path | bytes, where: str, formats: tuple[str, ...]) -> Iterator[tuple[Image.Image, str]]:
    """A fully decoded picture of one frame and its raw mode, or a DataError that names the file and the key."""
    content = source if isinstance(source, bytes) else read_regular(source, where)
    with _decoding(where):
        picture = Image.open(io.BytesIO(content), formats=formats)
    with picture:
        _check_size(picture.size, where)
        with _decoding(where):
            _check_whole(content, picture.format)
            several = picture.format != "MPO" and getattr(picture, "is_animated", False)
        if several:
            raise DataError(f"{where} holds several frames; one picture was wanted.\n  Save the frame that is meant as PNG.")
        raw = _raw_mode(picture)  # decoding forgets it
        _check_depth(picture.mode, raw, where)
        with _decoding(where):
            picture.load()
        yield picture, raw


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{where} claims {height:,} x {width:,} pixels (height x width); at most {MAX_PIXELS:,} are decoded.\n"
            "  Make it smaller, if it is meant to be that large."
        )


def _check_whole(content: bytes, kind: str | None) -> None:
    """Refuse files that decoders accept: a JPEG that ends in zeros, as half a download may, and a PNG with flipped bits."""
    if kind in ("JPEG", "MPO"):
        at = 2
        while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":  # to the first scan
            at += 2 + max(2, int.from_bytes(content[at + 2 : at + 4], "big"))
        if content.find(b"\xff\xd9", at) < 0:
            raise ValueError("the end mark (EOI) is absent")
    if kind == "PNG":
        at = 8
        while at + 8 <= len(content):
            size = int.from_bytes(content[at : at + 4], "big")
            chunk, check = content[at + 4 : at + 8 + size], content[at + 8 + size : at + 12 + size]
            if zlib.crc32(chunk).to_bytes(4, "big") != check:
                raise ValueError(f"the checksum of the part {chunk[:4]!r} at byte {at} does not fit")
            if chunk[:4] == b"IEND":
                return
            at += 12 + size
        raise ValueError("its last part (IEND) is absent")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Raise a DataError for any error of a decoder on a damaged or hostile file; Pillow's decoders share no error class."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(
            f"{where} can't be decoded: it is in none of the formats that are read here.\n"
            "  The file is damaged or cut short, or of another kind; restore it, or save it as PNG."
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where} can't be decoded: {reason}.\n  The file is damaged or cut short; restore it.") from error


def _named(source: Path | bytes, name: str) -> str:
    return name or (f"of {len(source)} bytes" if isinstance(source, bytes) else str(source))
