"""Input of `Extractor.explain`, checked before any model runs: images in every form, words, settings by Python's names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from conceptseg.backbones.base import GREATEST_SIDE
from conceptseg.data.images import IMAGE_FORMATS, as_rgb, open_picture, read_image
from conceptseg.downloads import read_address
from conceptseg.errors import ConceptSegError, ConfigError, DataError, whole_number
from conceptseg.types import check_distinct, checked_word

Picture: TypeAlias = Image.Image | np.ndarray | Tensor | Path | str
"""One image in any form that `read_picture` takes."""
LARGEST_DOWNLOAD = 64 << 20
"""Bytes of the largest image that is downloaded."""
_ENDING = re.compile(r"\.[A-Za-z0-9]{2,5}$")
_URL = re.compile(r"^https?://", re.IGNORECASE)


def read_picture(image: Any, ground: Any = None) -> UInt8[np.ndarray, "*F H W 3"]:
    """RGB bytes of an image in any form.

    image: a PIL image; a path, or a text that is one; a URL (http, https; at most 64 MiB); an array or tensor [H W 3], [3 H W],
        [H W] (grey), [H W 4] or [4 H W] (RGBA), of uint8 or of floats in 0..1; or frames of a video, [F H W 3].
    ground: what transparent pixels are laid on, a colour's name or (r, g, b) in 0..255; None refuses transparency.
    Pictures are turned upright, as their EXIF orientation says. Raises DataError for anything else, and for files that a run
    refuses (`conceptseg.data.images`); ConfigError for a text that is neither path nor URL: it may be meant as a prompt.
    """
    colour = None if ground is None else _colour(ground)
    if isinstance(image, str):
        if _URL.match(image):
            return _decoded(read_address(image, LARGEST_DOWNLOAD), colour, image)
        check_no_prompt(image)
        image = Path(image)
    if isinstance(image, Path):
        return _decoded(image, colour, str(image))
    if isinstance(image, Image.Image):
        return _flattened(image, colour, "explaining a picture: it")
    if isinstance(image, Tensor):
        image = image.detach().float().cpu().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
    return _of_array(np.asarray(image), colour)


def check_no_prompt(image: Any) -> None:
    """Raises ConfigError for a text that is neither URL nor path: it may be meant as a prompt, or as a file that is not there."""
    if not isinstance(image, str) or _URL.match(image) or _ENDING.search(image) or "/" in image or "\\" in image:
        return
    if not Path(image).exists():
        raise ConfigError(
            f'image is the text "{image[:80]}", which is no file and no URL. To make an image of it say '
            f'prompt="{image[:40]}"; to read a file of this name say image=Path("{image[:40]}").'
        )


def _decoded(source: Path | bytes, colour: tuple[int, int, int] | None, name: str) -> UInt8[np.ndarray, "H W 3"]:
    if colour is None:
        return read_image(source, "explaining", name if isinstance(source, bytes) else "")
    where = f"explaining: image {name}"
    with open_picture(source, where) as picture:
        return _flattened(picture, colour, where)


def _flattened(picture: Image.Image, colour: tuple[int, int, int] | None, where: str) -> UInt8[np.ndarray, "H W 3"]:
    if colour is not None and (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
        if picture.format is not None and picture.format not in (*IMAGE_FORMATS, "MPO"):
            raise DataError(f"{where} is {picture.format}; {', '.join(IMAGE_FORMATS)} are read.\n  Save it as PNG.")
        upright = ImageOps.exif_transpose(picture).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", upright.size, (*colour, 255)), upright).convert("RGB")
    return as_rgb(picture, where)


def _colour(ground: Any) -> tuple[int, int, int]:
    try:
        found = ImageColor.getrgb(ground)[:3] if isinstance(ground, str) else tuple(int(value) for value in ground)
    except (ValueError, TypeError):
        found = ()
    if len(found) != 3 or not all(0 <= value <= 255 for value in found):
        raise ConfigError(f'ground is {ground!r}; wanted a colour, such as "white" or (255, 255, 255).')
    return found[0], found[1], found[2]


def _of_array(array: np.ndarray, colour: tuple[int, int, int] | None) -> UInt8[np.ndarray, "*F H W 3"]:
    shape = list(array.shape)
    if array.size == 0:
        raise DataError(f"explaining an array of shape {shape}: it holds no pixel.")
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and shape[-1] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    elif array.ndim == 3 and (shape[0], shape[-1]) in ((3, 3), (3, 4), (4, 4)):
        raise DataError(
            f"explaining an array of shape {shape}: whether it is [height, width, colours] or [colours, height, width] "
            f"can't be told.\n  Give a PIL image."
        )
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        batch = "; several images are a list: list(images)" if array.ndim == 4 else ""
        raise DataError(f"explaining an array of shape {shape}: wanted [height, width, 3], [3, height, width] or grey{batch}.")
    if array.dtype != np.uint8:
        # NaN fails both comparisons.
        if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"explaining an array of {array.dtype} between {array.min()} and {array.max()}: wanted uint8, or float in 0..1."
            )
        array = np.round(255 * array.astype(np.float64)).astype(np.uint8)
    if array.shape[-1] == 4:
        return _flattened(Image.fromarray(np.ascontiguousarray(array), "RGBA"), colour, "explaining an array: it")
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    found: np.ndarray = np.ascontiguousarray(array)
    return found


def checked_words(words: Any, key: str = "words") -> tuple[str, ...]:
    """Raises ConfigError for what is no list of words, and for a word that is empty or given twice."""
    if isinstance(words, str) or not isinstance(words, Sequence) or not words:
        raise ConfigError(f"explain: {key} is {words!r}; wanted a list of words, such as ['dragon', 'rock'].")
    found = tuple(checked_word(word, f"{key}[{k}]") for k, word in enumerate(words))
    check_distinct(found, key, ConfigError)
    return found


def checked_size(size: Any) -> tuple[int, int]:
    """Raises ConfigError for what is no (height, width)."""
    if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
        raise ConfigError(f"explain: size is {size!r}; wanted [height, width] in pixels, such as [512, 768].")
    height, width = (whole_number("explain: size", side, 1, GREATEST_SIDE) for side in size)
    return height, width


def refuse(method: str, given: Mapping[str, Any], why: str) -> None:
    """Raises ConfigError for the first setting that is given and would change nothing."""
    for key, value in given.items():
        if value is not None and not (isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 0):
            raise ConfigError(f"explain: {key}={value!r} would change nothing: {method} {why}. Leave it out.")


@contextmanager
def progress_bar(total: int, shown: bool | None) -> Iterator[Callable[[int], object]]:
    """Calls with a number of finished images advance a bar; None shows it for several images in a terminal."""
    if not (shown if shown is not None else total > 1 and sys.stderr.isatty()):
        yield lambda count: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc="explaining", unit="image", disable=False) as bar:
        yield bar.update


_AS_PYTHON = (
    (re.compile(r"\b(?:backbone)@extractor\.(\w+)=([\w.]+)"), r'\1="\2"'),
    (re.compile(r"conceptseg \.\.\. "), ""),
    (re.compile(r"\bextractor\.(?:backbone|proxy|judge|masks)\.(\w+)"), r"\1"),
    (re.compile(r"\bviews\.(?:explained\.)?(\w+)"), r"\1"),
    (re.compile(r"\b(?:extractor|runtime)\.(\w+)"), r"\1"),
)


@contextmanager
def python_names() -> Iterator[None]:
    """Errors raised inside name settings as Python's arguments ("noise"), not by their place in a run ("extractor.noise")."""
    try:
        yield
    except ConceptSegError as error:
        said = str(error)
        for pattern, replacement in _AS_PYTHON:
            said = pattern.sub(replacement, said)
        if said == str(error):
            raise
        raise type(error)(said) from error
