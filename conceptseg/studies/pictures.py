"""Picture sheets of the studies: rows of images with a title each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def draw_rows(path: Path, rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> None:
    """Write a sheet with one row of titled images after the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(2.2 * columns, 2.5 * len(rows)), dpi=100)
    for r, row in enumerate(rows):
        for c, (title, image) in enumerate(row):
            axes = figure.add_subplot(len(rows), columns, r * columns + c + 1)
            axes.imshow(image)
            axes.set_title(title, fontsize=8)
            axes.set_axis_off()
    figure.tight_layout()
    figure.savefig(path)
