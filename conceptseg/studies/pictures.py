"""Picture sheets of the studies: rows of images with a title each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from jaxtyping import Bool
from PIL import Image

TITLE = 30  # characters a line over a picture of 2.2 inches


def grey(mask: Bool[np.ndarray, "H W"]) -> Image.Image:
    """A mask as a picture, white where it is set."""
    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).convert("RGB")


def draw_rows(path: Path, rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> None:
    """Write a sheet with one row of titled images after the other; a row may be shorter than the longest."""
    from matplotlib.figure import Figure

    titles = [[fill(title, TITLE) for title, _ in row] for row in rows]
    lines = max(title.count("\n") + 1 for row in titles for title in row)
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.2 * columns, (2.1 + 0.16 * lines) * len(rows)), dpi=100, layout="constrained")
    for r, row in enumerate(rows):
        for c, (_, image) in enumerate(row):
            axes = figure.add_subplot(len(rows), columns, r * columns + c + 1)
            axes.imshow(image)
            axes.set_title(titles[r][c], fontsize=8, verticalalignment="bottom")
            axes.set_xticks([])
            axes.set_yticks([])  # the frame stays: a white mask is a picture too
    figure.savefig(path)
