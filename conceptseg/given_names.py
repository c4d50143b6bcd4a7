"""Which class names a method is given for an image: the hidden variable of open-vocabulary numbers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, DataError, one_of
from conceptseg.reading import read_json, read_lines
from conceptseg.types import BACKGROUND, Sample, check_distinct, checked_word, folded

RULES = ("truth", "named", "distractors", "all", "file")


@dataclass(frozen=True)
class GivenNames:
    """The rule by which class names are offered beside the background words.

    rule: "truth" offers the classes of the mask; "named" every word that the sample itself names; "distractors" the classes of
        the mask and names drawn from the rest of the data set's vocabulary, until there are `total`; "all" the whole vocabulary;
        "file" what `file` lists, whether or not it is in the mask.
    total: how many names an image is given under "distractors"; an image with more classes keeps them all, and 0 adds none.
    seed: of the draw, which depends on the sample's key too, so that it is the same on every machine and for every method.
    file: a JSON object of sample keys to lists of words (such as the labels that another model predicted), or a text file with
        one word per line for all images (.txt).
    Source: the rules of ConceptAttention (arXiv:2502.04320; classes of the truth), METAGAME (arXiv:2605.06295; up to 20 names),
    SCLIP (arXiv:2312.01597; all names) and DiffSegmenter (arXiv:2309.02773; predicted labels).
    """

    rule: str = "truth"
    total: int = 0
    seed: int = 0
    file: str | None = None

    def __post_init__(self) -> None:
        one_of("protocol.names", self.rule, RULES)
        if self.total < 0:
            raise ConfigError(f"protocol.names_total is {self.total}; wanted the number of names an image is given, 0 or more.")
        if self.total and self.rule != "distractors":
            raise ConfigError(
                f'protocol.names_total is {self.total}, but protocol.names is "{self.rule}"; set names=distractors.'
            )
        if (self.file is None) == (self.rule == "file"):
            raise ConfigError(
                f'protocol.names is "{self.rule}" and protocol.names_file is {self.file}; names=file goes with a file of words.'
            )

    @property
    def label(self) -> str:
        """How tables name the rule."""
        if self.rule == "distractors":
            return f"truth + distractors up to {self.total}"
        return {"truth": "truth", "named": "truth + look-alikes", "all": "all", "file": f"file {Path(self.file or '').name}"}[
            self.rule
        ]

    def identity(self) -> dict[str, Any]:
        """Return the part of the run id; empty for "truth", so that older runs keep their ids."""
        if self.rule == "truth":
            return {}
        if self.rule == "named":
            return {"ask": "named"}  # as this rule was called when it was the only other one
        found: dict[str, Any] = {"names": self.rule}
        if self.rule == "distractors":
            found |= {"names_total": self.total, "names_seed": self.seed}
        if self.rule == "file":
            listed = json.dumps(self._listed, sort_keys=True)
            found["names_file"] = hashlib.sha256(listed.encode()).hexdigest()[:16]
        return found

    def of(self, sample: Sample, present: Mapping[int, str]) -> list[tuple[str, int]]:
        """Words with the classes that they vote for: those of the mask (`present`) by class, then the others by name.

        A word that belongs to no numbered class votes for 0. Raises DataError if the data set offers no vocabulary.
        """
        known = {folded(word): label for word, label in sample.vocabulary.items()}
        known |= {folded(word): label for label, word in present.items()}
        if self.rule == "named":
            return [(sample.words[label], label) for label in sorted(sample.words)]
        if self.rule == "file":
            return [(word, known.get(folded(word), BACKGROUND)) for word in self._words_of(sample.key)]
        truth = [(word, label) for label, word in present.items()]
        if self.rule == "truth" or (self.rule == "distractors" and len(truth) >= self.total):
            return truth
        if not sample.vocabulary:
            raise DataError(
                f"{sample.key}: its data set offers no vocabulary to draw names from. Set protocol.names=truth, or list words "
                "in a file: protocol.names=file protocol.names_file=words.txt."
            )
        taken = {folded(word) for word in present.values()}
        absent = sorted((word, label) for word, label in sample.vocabulary.items() if folded(word) not in taken)
        if self.rule == "distractors":
            count = min(max(self.total - len(truth), 0), len(absent))
            absent = sorted(random.Random(f"{self.seed}/{sample.key}").sample(absent, count))
        return truth + absent

    def _words_of(self, key: str) -> Sequence[str]:
        words = self._listed if isinstance(self._listed, list) else self._listed.get(key)
        if not words:
            raise DataError(f"{key}: {self.file} lists no word for it (protocol.names_file).")
        return words

    @cached_property
    def _listed(self) -> list[str] | dict[str, list[str]]:
        path = Path(self.file or "")
        where = f"protocol.names_file {path}"
        if path.suffix.lower() == ".txt":
            lines = [line for line in read_lines(path, where) if line]
            if not lines or lines[0][0] in "[{":
                raise DataError(
                    f"{where} holds {'JSON' if lines else 'no word'}; a word a line was wanted. JSON goes into a .json file."
                )
            return _distinct([checked_word(line, where, DataError) for line in lines], where)
        if path.suffix.lower() != ".json":
            raise ConfigError(f"{where}: a .txt file with a word a line was wanted, or a .json file.")
        content = read_json(path, where)
        if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
            raise DataError(f'{where} holds no object of sample keys to lists of words, such as {{"set/1": ["cat"]}}.')
        if empty := [key for key, words in content.items() if not words]:
            raise DataError(
                f'{where} lists no word for "{empty[0]}". Name at least one, or leave the sample out of the data set.'
            )
        return {
            key: _distinct([checked_word(word, f"{where}, {key}", DataError) for word in words], f"{where}, {key}")
            for key, words in content.items()
        }


def _distinct(words: list[str], where: str) -> list[str]:
    check_distinct(words, where)
    return words
