"""The nouns that flow through a run.

Letters, used everywhere: B batch, C concepts, H W image or mask pixels, h w map grid, L = h·w image tokens, K layers,
T timesteps, N noise draws, A heads, d width.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from conceptseg.errors import ConceptSegError, ConfigError, DataError

if TYPE_CHECKING:  # data and reports must not pay for torch
    from torch import Tensor

BACKGROUND = 0
VOID = 255
Told = Literal["nothing", "own prediction", "true name", "name and prompt", "truth"]
"""Information about the image that is shown to the model: nothing; the class that it predicts itself; the words; the words and
a caption that says what is there; or (controls) the mask."""

TrainedOn = Literal["nothing", "images", "class labels", "images and captions", "masks or boxes"]
"""Supervision of a method's model, the strongest if there are several."""
Provenance = Literal["control", "lab", "weights", "local", "random"]
"""Basis of numbers: no model; a tiny model that ships with the package, by its digest; files of a pinned commit on the hub;
a folder of which nothing but its digest is known; or weights whose card says that they were drawn at random."""
LEAST_KNOWN_FIRST: tuple[Provenance, ...] = ("random", "local", "lab", "weights", "control")
"""Of several models, the first of these is what numbers rest on."""
PER_IMAGE = ("foreground", "two_channel", "two_channel_minmax", "f1_rowwise")
"""Per-image numbers that counts can't give: average precision, its two released forms (raw and min-max scaled scores), and the
F1 that Chefer's protocol averages over the rows of an image."""


JOINERS = "\u200c\u200d"
"""Invisible characters that are part of how some languages are written."""


def folded(word: str) -> str:
    """The form in which words are compared: no case, single blanks, no blanks or separators at the ends.

    Text encoders lower case and strip what they read, so two words with one folded form are one question.

    >>> folded("Traffic  Light"), folded("wall, "), folded("\u212bngstr\u00f6m")
    ('traffic light', 'wall', '\xe5ngstr\xf6m')
    """
    return " ".join(unicodedata.normalize("NFKC", word).casefold().split()).strip(" ,;")


def checked_word(word: Any, key: str, error: type[ConceptSegError] = ConfigError) -> str:
    """The word in Unicode's form NFKC, with single blanks and none at its ends.

    Tokenizers read composed, decomposed and full-width letters as different words. Raises `error` for what is no text, empty, or
    holds characters that nobody sees; `key` names the setting.
    """
    if not isinstance(word, str):
        kind = "an empty value" if word is None else f"the {type(word).__name__} {word}"
        raise error(
            f"{key}: {kind} was read where a word was wanted. YAML takes no, on, null, 12:30 and 1_000 without quotes for truth "
            f'values, nothing and numbers: put the word in quotes, such as "no" (on the command line "key=[\'no\',cat]").'
        )
    if not folded(word):
        raise error(f"{key}: the word {word!r} is empty. Remove it, or write a word.")
    for letter in " ".join(word.split()):
        if letter not in JOINERS and (unicodedata.category(letter) in ("Cc", "Cf", "Cs") or "\ufe00" <= letter <= "\ufe0f"):
            raise error(f"{key}: the word {word!a} holds the invisible character U+{ord(letter):04X}. Remove it.")
    return " ".join(unicodedata.normalize("NFKC", word).split())


def check_distinct(words: Iterable[str], key: str, error: type[ConceptSegError] = DataError) -> None:
    """Raise `error` if two words are the same after folding; `key` says where they were given."""
    seen: dict[str, str] = {}
    for word in words:
        before = seen.get(folded(word))
        if before is not None:
            both = f'"{word}" twice' if before == word else f'"{before}" and "{word}", which are one word but for case and blanks'
            raise error(f"{key} names {both}: every concept must be distinct. Remove one of them.")
        seen[folded(word)] = word


@dataclass(frozen=True, slots=True)
class Concepts:
    """The words of one image, in channel order. labels[c] is the class that channel c votes for, 0 = background.

    Raises DataError for no word, an empty word, or a word given twice (see `folded`): its maps would compete with themselves.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    target: int | None = None
    """Channel of the one class word of a single-class protocol; None where every foreground channel is one."""
    distractors: tuple[int, ...] = ()
    """Channels of names whose class is not in the image. In a single-class protocol they vote for 0, as background words do."""

    def __post_init__(self) -> None:
        if not self.names:
            raise DataError("the list of concepts is empty: name at least one word.")
        for name in self.names:
            checked_word(name, "concepts", DataError)
        check_distinct(self.names, "concepts")

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with its truth, as the data set holds it."""

    key: str
    """Stable across machines, for example "voc2012/2007_000033"."""
    image: UInt8[np.ndarray, "H W 3"]
    """RGB, 0..255, untouched."""
    mask: UInt8[np.ndarray, "H W"]
    """Class index; 0 background; 255 void, never scored."""
    words: Mapping[int, str]
    """Class index -> word, for every foreground class that may occur in the mask."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further facts (ground, synset, ...); never read by a method."""
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    """Every class word of the data set -> its class index, or 0 where classes are not numbered; empty where nothing is known."""


@dataclass(frozen=True, slots=True)
class Task:
    """A sample under a protocol: the image and text shown to the model, and the ground truth."""

    key: str
    image: Float[np.ndarray, "h w 3"]
    """RGB in 0..1, after the protocol's own resizing."""
    truth: UInt8[np.ndarray, "H W"]
    """The mask that is scored, after the protocol's resizing; 255 void."""
    concepts: Concepts
    caption: str
    classes: tuple[int, ...]
    """Class indices that rows count, 0 first: (0, 1) for single-class protocols."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks with the same number of concepts, so that no padding concept can join the attention."""

    tasks: tuple[Task, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(task.key for task in self.tasks)

    @property
    def concepts(self) -> tuple[Concepts, ...]:
        return tuple(task.concepts for task in self.tasks)

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(task.caption for task in self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True, slots=True)
class SaliencyMaps:
    """Maps of one view of one batch. A larger value means more of the concept; the scale is the method's own."""

    view: str
    """Key of the view that these maps were read with."""
    scores: Float[Tensor, "B C h w"]
    comparable: bool
    """May channels be compared by argmax?"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A segmenter's answer for one task, at the size of the truth."""

    labels: UInt8[np.ndarray, "H W"]
    scores: Float[np.ndarray, "C H W"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Integer counts of one prediction against its ground truth, from which every ratio can be formed at the end.

    Void pixels are in no count but `void` and `pred_void`.
    """

    classes: tuple[int, ...]
    inter: tuple[int, ...]
    """Pixels of class k predicted as k, in the order of `classes`."""
    pred: tuple[int, ...]
    """Non-void pixels predicted as k."""
    label: tuple[int, ...]
    """Pixels whose truth is k."""
    pred_void: tuple[int, ...]
    """Void pixels predicted as k (the released VOC code keeps them in the union)."""
    valid: int
    """Non-void pixels."""
    correct: int
    """Non-void pixels predicted right."""
    void: int
    """Void pixels."""


__all__ = [
    "BACKGROUND",
    "PER_IMAGE",
    "VOID",
    "Batch",
    "Concepts",
    "Counts",
    "Prediction",
    "SaliencyMaps",
    "Sample",
    "Task",
    "check_distinct",
    "checked_word",
    "folded",
]
