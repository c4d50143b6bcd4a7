"""Resizing, with the rounding rule in the name: two "nearest" rules are half a pixel apart and both occur in protocols."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Shaped
from PIL import Image
from torch.nn.functional import interpolate


def nearest_floor(array: Shaped[np.ndarray, "*C H W"], size: tuple[int, int]) -> Shaped[np.ndarray, "*C h w"]:
    """Resize to (h, w) like torch's "nearest" for float32 and uint8: pixel i reads input floor(i · H / h), H / h in float32."""
    rows = _floor_index(array.shape[-2], size[0])
    columns = _floor_index(array.shape[-1], size[1])
    return array[..., rows[:, None], columns]


def _floor_index(old: int, new: int) -> np.ndarray:
    # torch computes the scale in float32; integer arithmetic differs from it at a few sizes.
    return np.minimum(np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(np.int64), old - 1)


def nearest_centre(array: Shaped[np.ndarray, "H W"], size: tuple[int, int]) -> Shaped[np.ndarray, "h w"]:
    """Resize a uint8 label map to (h, w) like Pillow's NEAREST: output pixel i reads input floor((i + 0.5) · H / h)."""
    return np.asarray(Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.NEAREST))


def bilinear(maps: Float[np.ndarray, "C H W"], size: tuple[int, int]) -> Float[np.ndarray, "C h w"]:
    """Resize C maps to (h, w), bilinear between pixel centres, antialiased when shrinking.

    Formed in float64 and then rounded to float32: equal scores stay equal, and every processor breaks ties alike.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float64))[None]
    shrinks = size[0] < maps.shape[-2] or size[1] < maps.shape[-1]
    return interpolate(tensor, size=size, mode="bilinear", antialias=shrinks)[0].float().numpy()


def resize_image(image: Shaped[np.ndarray, "H W 3"], size: tuple[int, int], resample: str) -> Shaped[np.ndarray, "h w 3"]:
    """Resize a uint8 RGB image to (h, w) with Pillow. resample: "bicubic" or "bilinear" (antialiased), or "nearest"."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling[resample.upper()]))
