"""Result of `ConceptAttention.explain`: named maps, to look at and to save."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from conceptseg.data.images import as_rgb, read_image
from conceptseg.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

PICTURES, NUMBERS = (".png", ".jpg", ".jpeg"), ".safetensors"
"""Endings of files that hold maps as a picture sheet, and as numbers."""
CAPTION_HEIGHT = 16
SHEET_CELL = 192
"""Pixels a side up to which small images are enlarged on a sheet."""


@dataclass(frozen=True)
class Explanation(Mapping[str, Tensor]):
    """Where the model finds each concept: a mapping from names to maps, in the order asked.

    names: the concepts; maps: float32 [C h w] (or [C f h w] for video), larger where the concept is, on the scale that the view
    gives (shares of 1 with a softmax over concepts); image: what was explained, uint8 RGB [H W 3] (or [F H W 3]); about: settings
    and provenance.
    """

    names: tuple[str, ...]
    maps: Float[Tensor, "C *f h w"]
    image: UInt8[np.ndarray, "*F H W 3"]
    about: Mapping[str, Any]
    scale: tuple[float, float] | None = None
    """The scores that the ends of the colour scale stand for; by default the least and greatest of these maps."""

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise ConfigError(f'there is no map of "{name}". {did_you_mean(name, self.names)}')
        return self.maps[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def winner(self) -> Int[Tensor, "*f h w"]:
        """Return the index of the concept with the greatest score at each place."""
        return self.maps.argmax(0)

    def overlay(self, name: str, opacity: float = 0.6, colours: str = "plasma") -> Image.Image:
        """The image with one concept's map over it; the colour scale spans all concepts, so that overlays can be compared.

        Raises ConfigError for a name without a map and DataError for video: take `frame(f).overlay(name)`.
        """
        shown = self._coloured(name, colours)
        picture = np.asarray(Image.fromarray(shown).resize(self._size(), Image.Resampling.BILINEAR))
        mixed = (1 - opacity) * self.image.astype(np.float32) + opacity * picture.astype(np.float32)
        return Image.fromarray(np.round(mixed).astype(np.uint8))

    def _size(self) -> tuple[int, int]:
        if self.image.ndim != 3:
            raise DataError("an overlay is drawn on one image; of a video take frame(f).overlay(name).")
        return self.image.shape[1], self.image.shape[0]

    def _coloured(self, name: str, colours: str) -> UInt8[np.ndarray, "h w 3"]:
        import matplotlib

        low, high = self.scale or (float(self.maps.min()), float(self.maps.max()))
        scaled = (self[name].float().cpu().numpy() - low) / (high - low or 1.0)
        found: np.ndarray = np.round(255 * matplotlib.colormaps[colours](scaled)[..., :3]).astype(np.uint8)
        return found

    def frame(self, number: int) -> Explanation:
        """One of a video's maps with the frame at its place, on the video's colour scale. Videos have more frames than maps."""
        last, scale = self.maps.shape[1] - 1, (float(self.maps.min()), float(self.maps.max()))
        shown = self.image[round(number * (len(self.image) - 1) / max(1, last))]
        return Explanation(self.names, self.maps[:, number], shown, self.about, scale)

    def sheet(self) -> Image.Image:
        """The image, and under each concept's name its map at its own grid and its overlay; of a video, frame under frame."""
        if self.image.ndim == 4:
            sheets = [self.frame(number).sheet() for number in range(self.maps.shape[1])]
            whole = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
            for number, sheet in enumerate(sheets):
                whole.paste(sheet, (0, number * sheet.height))
            return whole
        scale = max(1, SHEET_CELL // max(self._size()))
        width, height = (scale * side for side in self._size())
        sheet = Image.new("RGB", ((1 + len(self)) * (width + 8) + 8, 2 * height + CAPTION_HEIGHT + 24), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((8, 4), "image", fill="black")
        sheet.paste(Image.fromarray(self.image).resize((width, height), Image.Resampling.NEAREST), (8, 8 + CAPTION_HEIGHT))
        for place, name in enumerate(self.names, 1):
            left = 8 + place * (width + 8)
            draw.text((left, 4), name, fill="black")
            grid = Image.fromarray(self._coloured(name, "plasma")).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(grid, (left, 8 + CAPTION_HEIGHT))
            over = self.overlay(name).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(over, (left, 16 + CAPTION_HEIGHT + height))
        return sheet

    def save_image(self, path: str | Path) -> Path:
        """Write what was explained, as it is: a video as .gif, eight frames a second, whatever the ending given."""
        path = Path(path)
        if self.image.ndim == 3:
            Image.fromarray(self.image).save(path)
            return path
        first, *others = (Image.fromarray(frame) for frame in self.image)
        first.save(path.with_suffix(".gif"), save_all=True, append_images=others, duration=125, loop=0)
        return path.with_suffix(".gif")

    def save(self, path: str | Path) -> Path:
        """Write a picture sheet (.png, .jpg) or the numbers (.safetensors, with names and settings in its metadata).

        Raises ConfigError for another ending.
        """
        path = checked_place(path, (*PICTURES, NUMBERS), "explain")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == NUMBERS:
            import json

            from safetensors.torch import save_file

            metadata = {"names": json.dumps(self.names), "about": json.dumps(dict(self.about), default=str)}
            save_file({"maps": self.maps.contiguous().cpu()}, path, metadata=metadata)
        else:
            self.sheet().save(path)
        return path


def checked_place(path: str | Path, endings: Sequence[str], key: str) -> Path:
    """Where a file is to be written. Raises ConfigError for another ending, or where it can't be written."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ConfigError(f'{key}: saving to "{path}": unknown ending "{path.suffix}". {did_you_mean(path.suffix, endings)}')
    nearest = next((one for one in path.absolute().parents if one.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f'{key}: saving to "{path}": "{nearest}" is no folder that can be written to. Name another place.')
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ConfigError(f'{key}: saving to "{path}": it is there and is no file that can be written to. Name another place.')
    return path


def checked_maps(names: Sequence[str], maps: Float[Tensor, "C *f h w"]) -> Float[Tensor, "C *f h w"]:
    """Return the maps unchanged. Raises DataError for values that are not finite, or if every map is the same number everywhere.

    Warns of single maps that are.
    """
    if not bool(maps.isfinite().all()):
        raise DataError(
            "the map holds NaN or infinity: the model's weights are damaged, or its numbers overflow. Try dtype=float32 or "
            "bfloat16: float16 overflows in multi-modal transformers."
        )
    flat = maps.flatten(1)
    constant = [name for name, values in zip(names, flat, strict=True) if flat.shape[1] > 1 and bool((values == values[0]).all())]
    if len(constant) == len(names) and constant:
        raise DataError(
            f"the maps of {', '.join(constant)} are the same number everywhere, which says nothing of the image. Concepts whose "
            f"scores lie far apart make a softmax 0 or 1 everywhere: try softmax=none, or other concepts, layers or timesteps."
        )
    if constant:
        log.warning("the map of %s is the same number everywhere: it says nothing of the image", ", ".join(constant))
    return maps


def as_pixels(image: Float[Tensor, "*F 3 H W"]) -> UInt8[np.ndarray, "*F H W 3"]:
    """Convert an image, or F frames, in 0..1 to bytes."""
    found: np.ndarray = (255 * image).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()
    return found


def read_pixels(image: Image.Image | np.ndarray | Path) -> UInt8[np.ndarray, "*F H W 3"]:
    """Return RGB bytes of a PIL image, an image file, or an array of an image [H W 3] or frames [F H W 3].

    Arrays are uint8, or float in 0..1.

    Pictures are turned upright, as their EXIF orientation says. Raises DataError for anything else, and for pictures that a run
    refuses: alpha, more than 8 bits, damaged files (`conceptseg.data.images`).
    """
    if isinstance(image, Path):
        return read_image(image, "explaining")
    if isinstance(image, Image.Image):
        return as_rgb(image, "explaining a picture: it")
    array = np.asarray(image)
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        raise DataError(f"explaining an array of shape {array.shape}: wanted RGB, [height, width, 3].")
    if array.size == 0:
        raise DataError(f"explaining an array of shape {array.shape}: it holds no pixel.")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):  # also of NaN
        raise DataError(
            f"explaining an array of {array.dtype} between {array.min()} and {array.max()}: wanted uint8, or float in 0..1."
        )
    found: np.ndarray = np.round(255 * array).astype(np.uint8)
    return found
