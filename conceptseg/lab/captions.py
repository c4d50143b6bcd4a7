"""Captions of scenes for training, in the words that the lab's tokenizer knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS
from conceptseg.data.scenes import Scene

NOUNS: tuple[str, ...] = OBJECTS + GROUNDS
GLUE: tuple[str, ...] = ("a", "and", "on")


@dataclass(frozen=True)
class Caption:
    """Words of a caption, and for each whether it was put there in place of a true one."""

    words: tuple[str, ...]
    swapped: tuple[bool, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


def describe(scene: Scene, rng: np.random.Generator, lone: float = 0.22, tint: float = 0.7) -> Caption:
    """A true caption, often incomplete: lone words must be familiar, because a concept is encoded alone.

    lone: share of captions that are the name of one object, with or without an article; tint: how often a whole caption's
    nouns carry the word of their colour. At high noise, the colour is what the model needs most.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    kind = rng.random()
    if kind < 0.05 or not objects:
        words: list[str] = []
    elif kind < 0.11:
        words = [scene.ground]
    elif kind < 0.11 + lone:
        words = ["a", objects[0].word] if rng.integers(2) else [objects[0].word]
    else:
        kept = [o for o in objects if rng.random() < 0.85] or objects[:1]
        words = []
        for number, placed in enumerate(kept):
            words += ["and", "a"] if number else ["a"]
            if rng.random() < tint:
                words.append(placed.tint)
            words.append(placed.word)
        if rng.random() < 0.85:
            words += ["on", scene.ground]
    return Caption(tuple(words), (False,) * len(words))


def list_names(scene: Scene, rng: np.random.Generator) -> Caption:
    """A shuffled list of names, as methods with all words in one prompt write them: every object of the scene, and
    none of the grounds, the true one or all of them. Of two of a kind each carries its tint, of others two in five.
    """
    kinds = [o.word for o in scene.objects]
    names = [[o.tint, o.word] if kinds.count(o.word) > 1 or rng.random() < 0.4 else [o.word] for o in scene.objects]
    names += [[], [[scene.ground]], [[ground] for ground in GROUNDS]][int(rng.integers(3))]
    words = tuple(word for i in rng.permutation(len(names)) for word in names[i])
    return Caption(words, (False,) * len(words))


def swap_words(caption: Caption, scene: Scene, rng: np.random.Generator, share: float = 0.4) -> Caption:
    """Replace about `share` of the content words by words that are not true of the scene."""
    absent_objects = [w for w in OBJECTS if w not in {o.word for o in scene.objects}]
    absent_grounds = [w for w in GROUNDS if w != scene.ground]
    absent_tints = [w for w in TINTS if w not in {o.tint for o in scene.objects}]
    words, swapped = list(caption.words), list(caption.swapped)
    for position, word in enumerate(words):
        for pool, absent in ((OBJECTS, absent_objects), (GROUNDS, absent_grounds), (tuple(TINTS), absent_tints)):
            if word in pool and rng.random() < share:
                words[position], swapped[position] = str(rng.choice(absent)), True
    return Caption(tuple(words), tuple(swapped))


def list_words(scene: Scene, rng: np.random.Generator) -> Caption:
    """A shuffled list of names: every kind of object in the scene, sometimes its ground, and several that are not there.

    Some names carry a tint word ("green kite"), true or not of an object of that kind.
    """
    present = list(dict.fromkeys(o.word for o in scene.objects))
    names = [_tinted(w, scene, rng) if rng.random() < 0.4 else [(w, False)] for w in present]
    absent = [w for w in OBJECTS if w not in present]
    names += [[(str(w), True)] for w in rng.choice(absent, int(rng.integers(2, 6)), replace=False)]
    if rng.random() < 0.5:
        others = [w for w in GROUNDS if w != scene.ground]
        names += [[(scene.ground, False)], *([(str(w), True)] for w in rng.choice(others, 2, replace=False))]
    words = [word for i in rng.permutation(len(names)) for word in names[i]]
    return Caption(tuple(w for w, _ in words), tuple(s for _, s in words))


def _tinted(word: str, scene: Scene, rng: np.random.Generator) -> list[tuple[str, bool]]:
    """ "green kite": a tint that an object of this kind has, or as often one that none has; the noun is true."""
    tints = [o.tint for o in scene.objects if o.word == word]
    if rng.integers(2):
        return [(str(rng.choice(tints)), False), (word, False)]
    return [(str(rng.choice([t for t in TINTS if t not in tints])), True), (word, False)]


def lone_word(scene: Scene, rng: np.random.Generator) -> Caption:
    """One name alone, of an object of the scene or not, as often as not; a concept is encoded like this."""
    present = list(dict.fromkeys(o.word for o in scene.objects))
    if bool(rng.integers(2)) and present:
        word = str(rng.choice(present))
        words = _tinted(word, scene, rng) if rng.random() < 0.3 else [(word, False)]
    else:
        words = [(str(rng.choice([w for w in OBJECTS if w not in present])), True)]
    return Caption(tuple(w for w, _ in words), tuple(s for _, s in words))


def question(scene: Scene, rng: np.random.Generator, share: float) -> Caption:
    """Return a text for the swap loss: half of the time a list of names, else a lone name or a sentence with swapped words."""
    kind = rng.random()
    if kind < 0.5:
        return list_words(scene, rng)
    return lone_word(scene, rng) if kind < 0.75 else swap_words(describe(scene, rng), scene, rng, share)
