"""Noun segmentation of generated images: predictions at several cuts against truth masks (DAAM paper, section on attribution).

Every (image, noun) pair is one sample: the mean IoU is over pairs, not classes, with an interval of 1.96 standard errors.
Source: Tang et al. 2023, arXiv:2210.04885, section 3; the ground truth masks of the paper are no longer on
the web, so a set can be built from captions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool

from conceptseg.errors import DataError
from conceptseg.reading import read_lines
from conceptseg.studies.folders import Generation, generations, predict, write_generation
from conceptseg.studies.generator import Generator

TAUS = (0.3, 0.4, 0.5)

COCO80: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
"""The classes of COCO's objects, by name."""


@dataclass(frozen=True, slots=True)
class PairScore:
    """One (image, noun) sample. iou is None where no prediction was there and such samples are skipped."""

    image: str
    noun: str
    cut: float
    iou: float | None
    predicted: bool


def nouns_in(caption: str, vocabulary: Sequence[str]) -> list[str]:
    """Words of a vocabulary that a caption says, longest first where they overlap, in the order of the caption.

    >>> nouns_in("a hot dog and a dog", ["dog", "hot dog"])
    ['hot dog', 'dog']
    """
    left, found = caption.lower(), []
    for word in sorted(vocabulary, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        for match in re.finditer(pattern, left):
            found.append((match.start(), word))
        left = re.sub(pattern, lambda match: "#" * len(match.group()), left)
    return list(dict.fromkeys(word for _, word in sorted(found)))


def build(
    generator: Generator, captions: Iterable[tuple[str, str]], root: Path, vocabulary: Sequence[str], seed: int = 0
) -> list[Generation]:
    """Generate an image per (id, caption), with the maps of the nouns it says; finished ones are kept as they are."""
    made = []
    for number, (name, caption) in enumerate(captions):
        if (root / name / "output.png").exists():
            made.append(Generation(root / name))
            continue
        nouns = nouns_in(caption, vocabulary)
        one = generator.generate(caption, seed + number)
        made.append(write_generation(root, name, one, {noun: one.maps.word_map(noun) for noun in nouns}))
    return made


def read_captions(file: Path) -> list[tuple[str, str]]:
    """Return captions by id: one per line, "id<tab>caption" or the caption alone, which then is numbered."""
    lines = [line for line in read_lines(file) if line]
    pairs = [line.split("\t", 1) if "\t" in line else [f"{number:06d}", line] for number, line in enumerate(lines)]
    if strange := [name for name, _ in pairs if name in (".", "..") or set(name) & {"/", "\\"}]:
        raise DataError(f'{file}: the id "{strange[0]}" can\'t name a folder of the generations; wanted a name without slashes.')
    if repeated := [name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1]:
        raise DataError(f'{file}: the id "{repeated[0]}" stands twice; every caption needs its own.')
    return [(name, caption) for name, caption in pairs]


def iou(prediction: Bool[np.ndarray, "H W"], truth: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union; 1 if both are empty."""
    union = int((prediction | truth).sum())
    return float((prediction & truth).sum() / union) if union else 1.0


def score(root: Path, taus: Sequence[float] = TAUS, missing: Literal["zero", "skip"] = "zero") -> list[PairScore]:
    """Every truth mask against the prediction of its noun at every cut.

    missing: a noun without a prediction (its map was not kept) scores "zero", or is left out ("skip", as the original does).
    """
    rows = []
    for one in generations(root):
        truths = one.truths()
        for tau in taus:
            name = f"daam{tau:g}"
            predict(one, tau, name)
            predictions = one.predictions(name)
            for noun, truth in truths.items():
                there = noun in predictions
                if there and predictions[noun].shape != truth.shape:
                    raise DataError(
                        f"{one.folder}: the truth of {noun} is {truth.shape}, the image {predictions[noun].shape} (rows, "
                        f"columns). Truth masks are drawn at the size of output.png."
                    )
                value = iou(predictions[noun], truth) if there else (0.0 if missing == "zero" else None)
                rows.append(PairScore(one.id, noun, tau, value, there))
    if not rows:
        raise DataError(f"{root}: no folder holds a truth mask (<word>.gt.png). Draw some: conceptseg-study annotate --help")
    return rows


def summary(rows: Sequence[PairScore], classes: Sequence[str] = COCO80) -> list[dict[str, Any]]:
    """Per cut: mIoU over pairs whose noun is one of the classes ("miou80") and over all ("miou_all"), with n and interval."""
    found = []
    for cut in sorted({row.cut for row in rows}):
        table: dict[str, Any] = {"cut": cut}
        for name, chosen in (("miou80", [r for r in rows if r.noun in set(classes)]), ("miou_all", list(rows))):
            values = np.array([r.iou for r in chosen if r.cut == cut and r.iou is not None])
            mean, half = mean_and_half_width(values)
            table[name] = {"n": len(values), "mean": mean, "half_width": half}
        table["without_prediction"] = sum(r.cut == cut and not r.predicted for r in rows)
        found.append(table)
    return found


def mean_and_half_width(values: np.ndarray) -> tuple[float | None, float | None]:
    """The mean and 1.96 standard errors; None where there are too few values."""
    if len(values) == 0:
        return None, None
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None
    return float(values.mean()), half


def as_rows(rows: Sequence[PairScore]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]
