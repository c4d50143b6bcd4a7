"""Sliding windows: an image is shown in overlapping squares, and maps of the squares are averaged where they overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from conceptseg.errors import ConfigError
from conceptseg.segment.resize import bilinear
from conceptseg.types import BACKGROUND, Task


@dataclass(frozen=True, slots=True)
class Windows:
    """Squares of `side` pixels, `stride` pixels apart; the last one of a row or column ends at the image's edge.

    An image that is smaller than a square in one direction is shown whole in that direction.
    Source: mmsegmentation's slide inference, as wangf3014/SCLIP at b56bd30, clip_segmentor.py (forward_slide) uses it.
    """

    side: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.side:
            raise ConfigError(
                f"protocol.window_stride is {self.stride}; wanted 1 to the window's side, which is {self.side} "
                f"(protocol.window): pixels between two windows would never be shown."
            )

    @property
    def label(self) -> str:
        """For example "windows of 224, stride 112"."""
        return f"windows of {self.side}, stride {self.stride}"

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Return (first, one past the last) pixel of each window along a side of `length` pixels.

        >>> Windows(224, 112).spans(448)
        [(0, 224), (112, 336), (224, 448)]
        >>> Windows(224, 112).spans(500)[-2:]
        [(224, 448), (276, 500)]
        """
        count = max(length - self.side + self.stride - 1, 0) // self.stride + 1
        ends = [min(number * self.stride + self.side, length) for number in range(count)]
        return [(max(end - self.side, 0), end) for end in ends]

    def places(self, size: tuple[int, int]) -> list[tuple[slice, slice]]:
        """Return rows and columns of each window of an image of (height, width), row by row."""
        height, width = size
        return [(slice(*rows), slice(*columns)) for rows in self.spans(height) for columns in self.spans(width)]

    def cut(self, task: Task) -> list[Task]:
        """Return one task per window: the same words on a part of the image. Their truth is empty, for no method is shown it."""
        parts = []
        for rows, columns in self.places(task.image.shape[:2]):
            image = np.ascontiguousarray(task.image[rows, columns])
            truth = np.full(image.shape[:2], BACKGROUND, np.uint8)
            parts.append(replace(task, key=f"{task.key}@{rows.start},{columns.start}", image=image, truth=truth))
        return parts

    def joined(self, maps: Sequence[Float[np.ndarray, "C h w"]], size: tuple[int, int]) -> Float[np.ndarray, "C H W"]:
        """Return the mean of the windows' maps at each pixel of an image of (height, width).

        maps: one per window, in the order of `places`, each enlarged to its window, bilinear, before it is added.
        """
        total = np.zeros((len(maps[0]), *size), np.float64)
        covering = np.zeros(size, np.int64)
        for (rows, columns), one in zip(self.places(size), maps, strict=True):
            total[:, rows, columns] += bilinear(one, (rows.stop - rows.start, columns.stop - columns.start))
            covering[rows, columns] += 1
        return (total / covering).astype(np.float32)
