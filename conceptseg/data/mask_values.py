"""Which stored values of a mask mean a class, background or void."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from conceptseg.data.images import present_labels
from conceptseg.errors import ConfigError, DataError
from conceptseg.types import BACKGROUND, VOID, check_distinct, checked_word, folded

NO_CLASSES = ("background", "void", "ignore", "ignored", "unlabeled", "unlabelled")
"""Names that lists of classes give to values that are no class."""


class MaskValues:
    """Turns stored values into labels: 0 background, 255 void, else the label that `classes` gives.

    classes: stored value -> label, 1..254. background, void: stored values that mean these; void None takes 255 unless it is a
    class. A mask that holds 255 and no class is then refused, since 255 marks the object in most black-and-white masks; a void
    that is given is taken at its word. setting: what names the classes, for messages. Raises ConfigError for values outside
    0..255, and for a value with two meanings.
    """

    def __init__(
        self,
        classes: Mapping[int, int],
        background: Sequence[int] = (BACKGROUND,),
        void: Sequence[int] | None = None,
        setting: str = "dataset.classes",
    ) -> None:
        self.classes, self.background, self.void_given, self.setting = dict(classes), tuple(background), void is not None, setting
        self.void = tuple(void) if void is not None else () if VOID in classes else (VOID,)
        meant: dict[int, str] = {}
        for name, values in ((setting, self.classes), ("dataset.background", self.background), ("dataset.void", self.void)):
            for value in values:
                if isinstance(value, bool) or not 0 <= value <= 255:
                    raise ConfigError(f"{name} names the mask value {value}; 0 to 255 were wanted.")
                if value in meant:
                    raise ConfigError(
                        f"{name} names the mask value {value}, which {meant[value]} names too. Remove one of the two."
                    )
                meant[value] = name
        self._known = frozenset(meant)
        self._table = np.zeros(256, np.uint8)
        self._table[list(self.void)] = VOID
        for value, label in self.classes.items():
            self._table[value] = label

    def identity(self) -> tuple[Any, ...]:
        """Return the settings that decide the labels, for fingerprints."""
        return tuple(sorted(self.classes.items())), tuple(sorted(self.background)), tuple(sorted(self.void))

    def labels(self, mask: UInt8[np.ndarray, "H W"], key: str) -> UInt8[np.ndarray, "H W"]:
        """The labels of a stored mask. Raises DataError for a value without a meaning, and for one of 0 and 255 as said above."""
        present = present_labels(mask)
        if not self.void_given and VOID in self.void and VOID in present and set(present) <= {VOID, *self.background}:
            raise DataError(
                f"{key}: the mask holds {_listed(present)} and no class of {self.setting}; 255 means void, so that nothing of it "
                f"would be scored.\n  {self._remedy()} If 255 does mean void, set dataset.void=[255]."
            )
        if strange := [value for value in present if value not in self._known]:
            wanted = f"{_listed(self.classes)} ({self.setting}), {_listed(self.background)} (background)"
            void = f" and {_listed(self.void)} (void)" if self.void else ""
            grey = " Many values in between are left by resizing or smoothing: export it without." if len(strange) > 8 else ""
            raise DataError(
                f"{key}: the mask holds the values {_listed(strange)}; {wanted}{void} were wanted.\n"
                f"  Name them in {self.setting}, dataset.background or dataset.void.{grey}"
            )
        return self._table[mask]

    def _remedy(self) -> str:
        if self.setting == "dataset.foreground":
            return "If 255 marks the object, set dataset.foreground=[255]."
        return f"If 255 marks the object, name it: '{self.setting}={{255: cat}}'."


def labels_of(values: Iterable[int]) -> dict[int, int]:
    """Stored value -> label: itself, but for 255, which takes the least label that is free."""
    stored = set(values)
    free = next(label for label in range(1, 256) if label not in stored)
    return {value: free if value == VOID else value for value in sorted(stored)}


def numbered(words: Iterable[str]) -> dict[str, int]:
    """Folded word -> label of data with one word an image, in the order of the words. Raises DataError beyond 254 words."""
    distinct = sorted({folded(word) for word in words})
    if len(distinct) >= VOID:
        raise DataError(f"the images have {len(distinct)} words; at most {VOID - 1} are read.\n  Evaluate them in parts.")
    return {word: number for number, word in enumerate(distinct, 1)}


def checked_classes(classes: Mapping[Any, Any], setting: str = "dataset.classes") -> dict[int, str]:
    """Mask value (1..255) -> word, as a setting gives them. Raises ConfigError."""
    named: dict[int, str] = {}
    for value, word in classes.items():
        digits = str(value).strip()
        if isinstance(value, bool) or not digits.isdecimal():
            raise ConfigError(f"{setting} names the class {value!r}: whole numbers were wanted as keys, such as {{1: cat}}.")
        if int(digits) in named:
            raise ConfigError(f"{setting} names the class {digits} twice. Remove one of the two.")
        named[int(digits)] = checked_word(word, f"{setting}.{digits}")
    if not named or not all(BACKGROUND < value <= VOID for value in named) or len(named) > 254:
        raise ConfigError(f"{setting} names the classes {_listed(named)}; 1 to 255 were wanted, 254 of them at most.")
    if strange := next((f'{value} "{word}"' for value, word in named.items() if names_no_class(word)), None):
        raise ConfigError(
            f"{setting} names the class {strange}, which would be a word to ask for. Leave it out, and name its value in "
            "dataset.background or dataset.void."
        )
    check_distinct(named.values(), setting, ConfigError)
    return named


def names_no_class(word: str) -> bool:
    """Whether a list of classes means background or void by a word.

    >>> names_no_class("__Background__"), names_no_class("cat")
    (True, False)
    """
    return folded(word).strip("_ ") in NO_CLASSES


def _listed(values: Iterable[int]) -> str:
    """For a message: 1, 2, 3; at most eight."""
    every = sorted(values)
    return ", ".join(map(str, every[:8])) + (", ..." if len(every) > 8 else "") if every else "none"
