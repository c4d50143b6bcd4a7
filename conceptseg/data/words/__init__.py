"""Class words of the data sets: data with their sources, no code that knows a method."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources

# PascalVOC class index -> word that the released ConceptAttention scripts prompt with (index 0 is background).
VOC_WORDS: tuple[str, ...] = (
    "background", "plane", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "table", "dog", "horse",
    "motorcycle", "person", "pot", "sheep", "sofa", "train", "monitor",
)  # fmt: skip

# The same classes under the names of the VOC development kit.
VOC_OFFICIAL: tuple[str, ...] = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# Words offered beside the class word, in the order of the released scripts.
IMAGENET_BACKGROUND: tuple[str, ...] = ("background", "floor", "tree", "person", "grass", "face")
VOC_BACKGROUND: tuple[str, ...] = ("background", "floor", "grass", "tree", "sky")


@cache
def imagenet_nouns() -> dict[str, tuple[str, str]]:
    """WordNet 3.0 id ("n02084071") -> (first lemma, one of the 72 nouns). Source: shipped imagenet_segmentation_words.csv."""
    table = resources.files(__package__).joinpath("imagenet_segmentation_words.csv").read_text(encoding="utf-8")
    return {row["wnid"]: (row["lemma"], row["noun"]) for row in csv.DictReader(table.splitlines())}


# Every word that a shipped protocol can ask for: a lab tokenizer gives each a token of its own.
OTHER_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *VOC_WORDS,
            *VOC_OFFICIAL,
            *IMAGENET_BACKGROUND,
            *VOC_BACKGROUND,
            *sorted({noun for _, noun in imagenet_nouns().values()}),
        ]
    )
)
