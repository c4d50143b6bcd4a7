"""Result of `Extractor.explain`: named maps, to look at, to cut and to save."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of
from conceptseg.files import takes_files
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import BACKGROUND, Concepts

PICTURES, NUMBERS = (".png", ".jpg", ".jpeg"), ".safetensors"
"""Endings of files that hold maps as a picture, and as numbers."""
COLOURS = "viridis"
"""The colour scale: perceptually even, and read alike by colour-blind readers."""
PANEL = 2.2
"""Inches of a panel's longer side."""
DOTS = 110
"""Dots an inch."""


@dataclass(frozen=True)
class Explanation(Mapping[str, Tensor]):
    """Where the model finds each word: a mapping from words to maps, in the order asked.

    names: the words; scores: float32 [C h w] (or [C f h w] for video), larger where the word is, on the scale that the method
    gives (shares of 1 with a softmax over concepts); image: what was explained, uint8 RGB [H W 3] (or [F H W 3]); about: settings
    and provenance; comparable: whether scores of two words may be compared; notes: what a reader should know;
    others: maps of the background words that competed, [b h w].
    """

    names: tuple[str, ...]
    scores: Float[Tensor, "C *f h w"]
    image: UInt8[np.ndarray, "*F H W 3"]
    about: Mapping[str, Any]
    scale: tuple[float, float] | None = None
    """The scores that the ends of the colour scale stand for; by default those of the maps drawn."""
    comparable: bool = True
    notes: tuple[str, ...] = ()
    others: Float[Tensor, "b *f h w"] | None = None

    @property
    def maps(self) -> dict[str, Tensor]:
        """Word -> its map, float32 [h w] (or [f h w] for video)."""
        return dict(self)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise ConfigError(f'there is no map of "{name}". {did_you_mean(name, self.names)}')
        return self.scores[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        height, width = self.image.shape[-3:-1]
        grid = " x ".join(str(side) for side in self.scores.shape[1:])
        lines = [f"Explanation of {height} x {width} pixels by {self.about.get('method', 'a method')}: maps of {grid} cells"]
        lines += [f"  {name}: {one.min():.3g} to {one.max():.3g}" for name, one in self.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def winner(self) -> Int[Tensor, "*f h w"]:
        """Return the index of the word with the greatest score at each place. Raises ConfigError if words can't be compared."""
        if not self.comparable:
            raise ConfigError(
                f"{self.about.get('method', 'this method')} gives every word a scale of its own: no word wins a place."
            )
        return self.scores.argmax(0)

    def mask(self, name: str, decision: str | None = None, level: float = 0.5) -> Bool[np.ndarray, "H W"]:
        """Where the word is, at the image's size.

        decision: "argmax", where its score beats those of all other words and background words; or a cut of its own map: "mean",
            "otsu", "level" (share `level` between least and greatest), "share" (of the greatest), "quantile"; see `Segmenter`. By
            default argmax where several words can be compared, else mean.
        Raises ConfigError for a decision that is unknown or compares words that can't be compared.
        """
        own, others = self[name], [] if self.others is None else list(self.others)
        rivals = [one for other, one in self.items() if other != name] + others
        self._size()
        decision = decision or ("argmax" if self.comparable and rivals else "mean")
        one_of("mask(decision=...)", decision, ("argmax", "mean", "otsu", "level", "share", "quantile"))
        if decision == "argmax" and not (self.comparable and rivals):
            why = "there is no other word" if self.comparable else "every word has a scale of its own"
            raise ConfigError(f'mask("{name}", decision="argmax"): {why}. Take decision="mean".')
        maps = torch.stack([own, *rivals]).float().cpu().numpy()
        labels = (1, *(BACKGROUND for _ in rivals))
        concepts = Concepts((name, *(f"other {k}" for k in range(len(rivals)))), labels, target=0)
        segmenter = Segmenter(decision, level=level)
        scores = segmenter.scores(maps, (self.image.shape[0], self.image.shape[1]))
        found: np.ndarray = segmenter(maps, scores, concepts, (BACKGROUND, 1)).labels == 1
        return found

    def at_image_size(self) -> Explanation:
        """The same with maps enlarged to the image's size, bilinearly, as a run enlarges them before scoring: [C H W]."""
        size = self._size()[::-1]

        def enlarged(maps: Tensor) -> Tensor:
            return torch.nn.functional.interpolate(maps[None].float(), size=size, mode="bilinear", align_corners=False)[0]

        others = None if self.others is None else enlarged(self.others)
        return replace(self, scores=enlarged(self.scores), others=others)

    def overlay(self, name: str | None = None, opacity: float = 0.6, colours: str = COLOURS) -> Image.Image:
        """The image with one word's map over it, enlarged smoothly; without a name, the picture of all words with a legend.

        The colour scale spans all words where their scores are shares of 1, else each word has its own. Raises ConfigError for a
        name that was not asked for and DataError for video: take `frame(f).overlay(name)`.
        """
        if name is None and len(self) > 1:
            return self.sheet()
        return self._drawn(self.names[0] if name is None else name, self._size(), opacity, colours)

    def _size(self) -> tuple[int, int]:
        if self.image.ndim != 3:
            raise DataError("an overlay or mask is made of one image; of a video take frame(f).overlay(name).")
        return self.image.shape[1], self.image.shape[0]

    def ends(self, name: str) -> tuple[float, float]:
        """The scores that the ends of a word's colour scale stand for."""
        shown = self.scores if self.comparable and self.about.get("shares") else self[name]
        return self.scale or (float(shown.min()), float(shown.max()))

    def _drawn(self, name: str, size: tuple[int, int], opacity: float = 0.6, colours: str = COLOURS) -> Image.Image:
        """A word's map over the image, at (width, height)."""
        import matplotlib

        low, high = self.ends(name)
        heat = Image.fromarray(self[name].float().cpu().numpy()).resize(size, Image.Resampling.BICUBIC)
        scaled = np.clip((np.asarray(heat) - low) / ((high - low) or 1.0), 0, 1)
        how = Image.Resampling.NEAREST if max(self._size()) <= 128 else Image.Resampling.BICUBIC
        picture = np.asarray(Image.fromarray(self.image).resize(size, how), np.float32)
        grey = np.repeat(picture.mean(-1, keepdims=True), 3, axis=-1)
        paint = 255 * matplotlib.colormaps[colours](scaled)[..., :3]
        mixed = (1 - opacity) * grey + opacity * paint if opacity else picture
        return Image.fromarray(np.round(mixed).clip(0, 255).astype(np.uint8))

    def frame(self, number: int) -> Explanation:
        """One of a video's maps with the frame at its place, on the video's colour scale. Videos have more frames than maps."""
        last, scale = self.scores.shape[1] - 1, (float(self.scores.min()), float(self.scores.max()))
        shown = self.image[round(number * (len(self.image) - 1) / max(1, last))]
        others = None if self.others is None else self.others[:, number]
        return replace(self, scores=self.scores[:, number], image=shown, scale=scale, others=others)

    def sheet(self) -> Image.Image:
        """The image, each word's map over it, and the colour scale; of a video, frame under frame."""
        if self.image.ndim == 4:
            return side_by_side({f"map {number}": self.frame(number) for number in range(self.scores.shape[1])})
        return side_by_side({str(self.about.get("method", "")): self})

    def _repr_png_(self) -> bytes:
        """Return the picture that a notebook shows, as PNG."""
        buffer = io.BytesIO()
        self.sheet().save(buffer, "PNG")
        return buffer.getvalue()

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
        """Write the picture (.png, .jpg) or the numbers (.safetensors, with names and settings in its metadata).

        Raises ConfigError for another ending.
        """
        path = checked_place(path, (*PICTURES, NUMBERS), "explain")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == NUMBERS:
            import json

            from safetensors.torch import save_file

            metadata = {"names": json.dumps(self.names), "about": json.dumps(dict(self.about), default=str)}
            save_file({"maps": self.scores.contiguous().cpu()}, path, metadata=metadata)
        else:
            self.sheet().save(path)
        return path


def side_by_side(found: Mapping[str, Explanation]) -> Image.Image:
    """Explanations of one image by several methods, a row each: the image, each word's map over it, and a legend.

    found: title of a row -> explanation. Raises ConfigError for none, and for explanations of different words.
    """
    if not found:
        raise ConfigError("side_by_side: there is nothing to show.")
    rows = list(found.items())
    names = rows[0][1].names
    if other := next((title for title, one in rows if one.names != names), None):
        raise ConfigError(f'side_by_side: "{other}" explains {list(found[other].names)}, the first row {list(names)}.')
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = rows[0][1]._size()
    wide, high = (PANEL * side / max(width, height) for side in (width, height))
    columns = 1 + len(names)
    size = (0.55 + columns * (wide + 0.08), 0.4 + len(rows) * (high + 0.08) + 0.62)
    figure = Figure(size, dpi=DOTS, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    pixels = (round(wide * DOTS), round(high * DOTS))
    for row, (title, one) in enumerate(rows):
        bottom = size[1] - 0.4 - (row + 1) * (high + 0.08) + 0.08
        for column in range(columns):
            left = 0.45 + column * (wide + 0.08)
            axes = figure.add_axes((left / size[0], bottom / size[1], wide / size[0], high / size[1]))
            axes.set_axis_off()
            if column:
                shown = one._drawn(names[column - 1], pixels)
            else:
                how = Image.Resampling.NEAREST if max(width, height) <= 128 else Image.Resampling.BICUBIC
                shown = Image.fromarray(one.image).resize(pixels, how)
            axes.imshow(np.asarray(shown), interpolation="nearest")
            if row == 0:
                axes.set_title(names[column - 1] if column else "image", fontsize=12, pad=5)
        if title:
            place = (bottom + high / 2) / size[1]
            figure.text(0.24 / size[0], place, title, fontsize=11, rotation=90, ha="center", va="center")
    bar = figure.add_axes((0.45 / size[0], 0.34 / size[1], min(3.0, size[0] - 1.2) / size[0], 0.13 / size[1]))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOURS)
    ticks = figure.colorbar(scale, cax=bar, orientation="horizontal")
    ticks.set_ticks([0, 1], labels=_legend([one for _, one in rows]))
    bar.tick_params(labelsize=9, length=2)
    least, greatest = bar.get_xticklabels()
    least.set_horizontalalignment("left")
    greatest.set_horizontalalignment("right")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _legend(found: Sequence[Explanation]) -> tuple[str, str]:
    """Return labels for the two ends of the colour scale."""
    ends = {one.ends(name) for one in found for name in one.names}
    if len(ends) == 1:
        low, high = ends.pop()
        return f"{low:.2g}", f"{high:.2g}"
    return "least of each map", "greatest"


def checked_place(path: str | Path, endings: Sequence[str], key: str) -> Path:
    """Where a file is to be written. Raises ConfigError for another ending, or where it can't be written."""
    path = Path(path)
    if path.suffix.lower() not in endings:
        raise ConfigError(f'{key}: saving to "{path}": unknown ending "{path.suffix}". {did_you_mean(path.suffix, endings)}')
    nearest = next((one for one in path.absolute().parents if one.exists()), Path("/"))
    if not nearest.is_dir() or not takes_files(nearest):
        raise ConfigError(f'{key}: saving to "{path}": "{nearest}" is no folder that can be written to. Name another place.')
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ConfigError(f'{key}: saving to "{path}": it is there and is no file that can be written to. Name another place.')
    return path


def remarks_on(names: Sequence[str], maps: Float[Tensor, "C *f h w"]) -> list[str]:
    """Return a note for each word whose map is the same number everywhere.

    Raises DataError for values that are not finite, or if every map is the same number everywhere.
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
    return [f'the map of "{name}" is the same number everywhere: it says nothing of the image' for name in constant]


def as_pixels(image: Float[Tensor, "*F 3 H W"]) -> UInt8[np.ndarray, "*F H W 3"]:
    """Convert an image, or F frames, in 0..1 to bytes."""
    found: np.ndarray = (255 * image).round().clamp(0, 255).byte().movedim(-3, -1).cpu().numpy()
    return found
