"""Entanglement: two nouns of one kind that share a place, and an adjective that colours more than its noun (DAAM paper).

Source: Tang et al. 2023, arXiv:2210.04885, section 5 (visuosemantic analysis). People judge whether both
nouns are present; the overlap of maps is measured.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conceptseg.errors import ConfigError, DataError
from conceptseg.reading import read_rows
from conceptseg.studies.dependencies import overlaps, switched_on
from conceptseg.studies.generator import Generated, Generator
from conceptseg.studies.nouns import mean_and_half_width
from conceptseg.studies.replay import AttentionRecord, recording, replaying
from conceptseg.trace import WordMap

GROUPS: dict[str, tuple[str, ...]] = {
    "two-wheeled vehicle": ("bicycle", "motorcycle"), "four-wheeled vehicle": ("bus", "truck", "car"),
    "livestock": ("cow", "horse", "sheep"), "pets": ("cat", "dog"), "wild animals": ("elephant", "bear", "zebra", "giraffe"),
    "bags": ("backpack", "handbag", "suitcase"), "sports boards": ("snowboard", "surfboard", "skateboard"),
    "utensils": ("fork", "knife", "spoon"), "receptacles": ("bowl", "cup"), "fruits": ("banana", "apple", "orange"),
    "meals": ("sandwich", "hot dog", "pizza"), "desserts": ("cake", "donut"), "furniture": ("chair", "couch", "bench"),
    "monitors": ("tv", "cell phone", "laptop"), "appliances": ("oven", "toaster", "refrigerator"),
}  # fmt: skip
"""Words of one kind, over COCO's nouns."""

LAB_GROUPS: dict[str, tuple[str, ...]] = {
    "round": ("ball", "clock", "sun"), "plants": ("tree", "flower", "mushroom"), "craft": ("boat", "kite", "fish"),
}  # fmt: skip
"""The same over the lab's nouns, by their drawn shapes."""


@dataclass(frozen=True, slots=True)
class NounPair:
    """A prompt with two nouns, of one kind or of two."""

    id: str
    prompt: str
    first: str
    second: str
    same_kind: bool
    seed: int


def article(word: str) -> str:
    """ "an" before a, e, i, o, u, else "a"."""
    return "an" if word[0] in "aeiou" else "a"


def noun_pairs(
    count: int, groups: Mapping[str, Sequence[str]], seed: int = 0, offset: int = 0, plain: bool = False
) -> list[NounPair]:
    """Prompts "a w1 and a w2": half of the time two words of one group, else of two; seeds are number plus offset.

    plain: always "a", for text encoders that know no "an".
    """
    rng, pairs = random.Random(seed), []
    for number in range(count):
        same = rng.random() < 0.5
        if same:
            first, second = rng.sample(list(groups[rng.choice(sorted(groups))]), 2)
        else:
            one, other = rng.sample(sorted(groups), 2)
            first, second = rng.choice(list(groups[one])), rng.choice(list(groups[other]))
        a, b = ("a", "a") if plain else (article(first), article(second))
        name = f"{'cohypo' if same else 'diff'}-{number}"
        pairs.append(NounPair(name, f"{a} {first} and {b} {second}", first, second, same, number + offset))
    return pairs


def noun_overlap(made: Generated, pair: NounPair, threshold: float = 0.4) -> float:
    """IoU of the two words' maps, each on where it has at least threshold times its greatest value."""
    maps = [switched_on(made.maps.word_map(word), threshold, absolute=False) for word in (pair.first, pair.second)]
    return overlaps(*maps)[2]


def cohyponym_table(
    pairs: Sequence[NounPair], overlap: Mapping[str, float], both_present: Mapping[str, bool] | None = None
) -> list[dict[str, Any]]:
    """For cohyponyms and for other pairs: mean IoU of the maps (percent), and how often both nouns were seen, where judged."""
    table = []
    for same, name in ((False, "different kinds"), (True, "cohyponyms")):
        mine = [pair for pair in pairs if pair.same_kind is same and pair.id in overlap]
        mean, half = mean_and_half_width(np.array([100 * overlap[pair.id] for pair in mine]))
        judged = [both_present[pair.id] for pair in mine if both_present is not None and pair.id in both_present]
        seen, seen_half = mean_and_half_width(np.array([100.0 * one for one in judged]))
        table.append(
            {
                "pairs": name, "n": len(mine), "miou": mean, "half_width": half, "judged": len(judged),
                "both_present": seen, "both_present_half_width": seen_half,
            }
        )  # fmt: skip
    return table


def read_presence(file: Path) -> dict[str, bool]:
    """Whether both nouns of a pair were seen, by the pair's id, from pairs.csv with first and second filled in (1 seen, 0 not).

    Pairs that were left open are left out. Raises DataError for other values, and for a pair that is judged twice.
    """
    found: dict[str, bool] = {}
    for line, row in read_rows(file, ("id", "first", "second")):
        seen = row["first"].strip(), row["second"].strip()
        if seen == ("", ""):
            continue
        if not set(seen) <= {"0", "1"}:
            raise DataError(f"{file}, line {line}: first and second are {seen}; wanted 1 (seen) or 0 (not), or both left open.")
        if row["id"] in found:
            raise DataError(f"{file}, line {line}: the pair {row['id']} is judged twice.")
        found[row["id"]] = seen == ("1", "1")
    return found


# ---------------------------------------------------------------- adjectives


@dataclass(frozen=True)
class AdjectiveRow:
    """One adjective in the slot: generated freely and with the attention of the first adjective's run."""

    adjective: str
    free: Generated
    replayed: Generated
    outside: float
    """Share of the adjective's map that lies outside its noun's mask, in the free run."""


def mass_outside(adjective: WordMap, noun: WordMap, threshold: float = 0.4) -> float:
    """Share of an adjective's map outside the place of its noun (at least threshold times the noun's greatest value)."""
    inside = switched_on(noun, threshold, absolute=False)
    return float(1 - (adjective.values * inside).sum() / adjective.values.sum())


def adjective_rows(
    generator: Generator, template: str, noun: str, adjectives: Sequence[str], seed: int = 0, threshold: float = 0.4
) -> list[AdjectiveRow]:
    """One seed, one adjective after the other in the {adjective} slot, freely and with the first one's attention replayed."""
    if "{adjective}" not in template or noun not in template:
        raise ConfigError(f'the template "{template}" needs the slot {{adjective}} and the noun "{noun}".')
    if not adjectives:
        raise ConfigError("adjectives: name at least one, the first is the one whose attention is replayed.")
    rows, record = [], AttentionRecord()
    for number, adjective in enumerate(adjectives):
        prompt = template.format(adjective=adjective)
        unet = generator.backbone.unet
        if number == 0:
            free = generator.generate(prompt, seed, around=recording(unet, record))
        else:
            free = generator.generate(prompt, seed)
        replayed = generator.generate(prompt, seed, around=replaying(unet, record))
        share = mass_outside(free.maps.word_map(adjective), free.maps.word_map(noun), threshold)
        rows.append(AdjectiveRow(adjective, free, replayed, share))
    return rows


def image_change(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two images, in grey levels of 255."""
    a, b = (torch.from_numpy(np.asarray(image, dtype=np.float32).copy()) for image in (one, other))
    return float((a - b).abs().mean())
