"""Head-dependent interactions: how the heat maps of syntactically related words overlap (DAAM paper, visuosyntactic analysis).

    IoD = |D ∩ H| / |D|    IoH = |D ∩ H| / |H|    IoU = |D ∩ H| / |D ∪ H|,    D, H: where the dependent's, the head's map is on

Means are over pairs; Δ = |mIoD - mIoH|. Parses come from CoNLL-U, words are found by their place in the sentence.
Source: Tang et al. 2023, arXiv:2210.04885, section 4 (visuosyntactic analysis).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from conceptseg.errors import ConfigError, DataError
from conceptseg.reading import read_text
from conceptseg.trace import PromptMaps, WordMap

UNRELATED, ALL_PAIRS, COREFERENT = "(unrelated)", "(all pairs)", "(coreferent)"
"""Reference rows of the table: pairs without an arc, all head-dependent pairs, pairs that name the same thing."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a sentence: its place among the characters, its head (0: root), relation, tag, and coreference cluster."""

    number: int
    form: str
    start: int
    end: int
    head: int
    relation: str
    tag: str
    cluster: str | None


@dataclass(frozen=True, slots=True)
class Sentence:
    """A parsed prompt."""

    id: str
    text: str
    words: tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """One pair of words of one prompt; kept, so that means and intervals can be formed again."""

    prompt: str
    head: str
    dependent: str
    relation: str
    iod: float
    ioh: float
    iou: float


def read_conllu(file: Path, enhanced: bool = False) -> list[Sentence]:
    """Sentences of a CoNLL-U file with "# text" and, if there is one, "# sent_id"; enhanced takes relations from DEPS.

    Coreference is read from MISC, "Coref=<cluster>". An enhanced head that is an empty node ("5.1") is no word of the prompt: the
    next arc to a word is taken, and none where there is no other. Raises DataError, with the line, for what does not fit: also a
    head that is left open ("_") or that no word of the sentence has.
    """
    found: list[Sentence] = []
    lines: list[tuple[int, str]] = []
    for number, line in enumerate([*read_text(file).split("\n"), ""], 1):
        if line.strip():
            lines.append((number, line))
        elif lines:
            found.append(_sentence(file, lines, len(found), enhanced))
            lines = []
    return found


def _sentence(file: Path, lines: Sequence[tuple[int, str]], place: int, enhanced: bool) -> Sentence:
    pairs = (line[1:].partition("=") for _, line in lines if line.startswith("#"))
    about = {key.strip(): value.strip() for key, _, value in pairs}
    if "text" not in about:
        raise DataError(f'{file}, sentence {place + 1}: wanted a comment "# text = ...", which is the prompt.')
    words: list[Word] = []
    heads: list[tuple[str, int]] = []
    at = 0
    for number, line in lines:
        if line.startswith("#"):
            continue
        where = f"{file}, line {number} (sentence {place + 1})"
        columns = line.split("\t")
        if len(columns) != 10:
            raise DataError(f"{where}: wanted 10 columns, found {len(columns)} in {line!r}.")
        if not columns[0].isdecimal():
            continue  # ranges of contractions and empty nodes hold no word of their own
        if int(columns[0]) != len(words) + 1:
            raise DataError(f"{where}: wanted the word number {len(words) + 1}, found {columns[0]}.")
        start = about["text"].find(columns[1], at)
        if start < 0:
            raise DataError(f'{where}: the word "{columns[1]}" is not in "{about["text"][at:]}".')
        at = start + len(columns[1])
        head, relation = columns[6], columns[7]
        if enhanced and columns[8] != "_":
            arcs = [arc.partition(":") for arc in columns[8].split("|")]
            head, _, relation = next((arc for arc in arcs if "." not in arc[0]), ("0", ":", arcs[0][2]))
        if not head.isdecimal():
            raise DataError(
                f'{where}: the head of "{columns[1]}" is "{head}"; the number of a word, or 0 for the root, was wanted.\n'
                "  Parse the sentence, or leave it out."
            )
        heads.append((where, int(head)))
        misc = dict(part.split("=", 1) for part in columns[9].split("|") if "=" in part)
        words.append(Word(int(columns[0]), columns[1], start, at, int(head), relation, columns[3], misc.get("Coref")))
    for word, (where, number) in zip(words, heads, strict=True):
        if number > len(words) or number == word.number:
            raise DataError(f'{where}: the head of "{word.form}" is {number}; another of the words 1 to {len(words)} was wanted.')
    return Sentence(about.get("sent_id", f"{place:06d}"), about["text"], tuple(words))


def parse_with_spacy(prompts: Iterable[tuple[str, str]], model: str) -> list[Sentence]:
    """Sentences by a spaCy model that is installed already. Its labels differ from Universal Dependencies (prep, pobj, dobj)."""
    try:
        import spacy  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError("parsing prompts: spaCy is not installed. Install it with a model, or give a CoNLL-U file.") from error
    try:
        parser = spacy.load(model)
    except OSError as error:
        raise ConfigError(f'parsing prompts: spaCy has no model "{model}" here; nothing is downloaded unasked.') from error
    found = []
    for name, prompt in prompts:
        words = [
            Word(t.i + 1, t.text, t.idx, t.idx + len(t), 0 if t.head.i == t.i else t.head.i + 1, t.dep_, t.tag_, None)
            for t in parser(prompt)
        ]
        found.append(Sentence(name, prompt, tuple(words)))
    return found


def map_of(maps: PromptMaps, word: Word) -> WordMap:
    """The map of one word by its characters, so that a repeated word is not merged with itself."""
    offsets = maps.tokenizer(maps.prompt, return_offsets_mapping=True, truncation=True).offset_mapping
    return maps.token_map([i for i, (a, b) in enumerate(offsets) if a < word.end and b > word.start and b > a], word.form)


def switched_on(one: WordMap, threshold: float, absolute: bool) -> Float[Tensor, "X Y"]:
    """Where a map is on: at least threshold times its greatest value, or above the threshold itself."""
    return (one.values > threshold if absolute else one.values >= threshold * one.values.max()).float()


def overlaps(dependent: Float[Tensor, "X Y"], head: Float[Tensor, "X Y"]) -> tuple[float, float, float]:
    """(IoD, IoH, IoU); 0 where nothing is on. For maps in 0..1 the soft variant: products for intersections.

    >>> overlaps(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]]))
    (0.5, 1.0, 0.5)
    """
    both, of_dependent, of_head = (float(x.sum()) for x in (dependent * head, dependent, head))
    either = of_dependent + of_head - both
    return both / of_dependent if of_dependent else 0.0, both / of_head if of_head else 0.0, both / either if either else 0.0


def pair_rows(
    sentence: Sentence, maps: PromptMaps, threshold: float = 0.4, absolute: bool = False, soft: bool = False, seed: int = 0
) -> list[Overlap]:
    """Every head-dependent pair of a sentence, its coreferent pairs, and as many unrelated pairs, drawn at random.

    soft: maps scaled to 0..1 by their greatest value instead of being switched on.
    """
    prepared: dict[int, Float[Tensor, "X Y"]] = {}
    for word in sentence.words:
        one = map_of(maps, word)
        prepared[word.number] = one.values / one.values.max() if soft else switched_on(one, threshold, absolute)
    by_number = {word.number: word for word in sentence.words}

    def row(dependent: Word, head: Word, relation: str) -> Overlap:
        measured = overlaps(prepared[dependent.number], prepared[head.number])
        return Overlap(sentence.id, head.form, dependent.form, relation, *measured)

    arcs = [word for word in sentence.words if word.head in by_number]
    rows = [row(word, by_number[word.head], word.relation) for word in arcs]
    related = {frozenset((word.number, word.head)) for word in arcs}
    pairs = list(combinations(sentence.words, 2))
    rows += [row(b, a, COREFERENT) for a, b in pairs if a.cluster is not None and a.cluster == b.cluster]
    free = [
        (a, b)
        for a, b in pairs
        if frozenset((a.number, b.number)) not in related and (a.cluster is None or a.cluster != b.cluster)
    ]
    drawn = random.Random(f"{seed}/{sentence.id}").sample(free, min(len(arcs), len(free)))
    return rows + [row(b, a, UNRELATED) for a, b in drawn]


def relation_table(rows: Sequence[Overlap], least: int = 1, top: int | None = 10) -> list[dict[str, Any]]:
    """Means (percent) and Δ per relation, the most frequent ones with at least `least` pairs, and the reference rows."""
    marks = (UNRELATED, COREFERENT)
    arcs = [row for row in rows if row.relation not in marks]
    counts: dict[str, int] = {}
    for one in arcs:
        counts[one.relation] = counts.get(one.relation, 0) + 1
    frequent = [r for r, n in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])) if n >= least][:top]
    groups: Mapping[str, list[Overlap]] = {
        UNRELATED: [row for row in rows if row.relation == UNRELATED], ALL_PAIRS: arcs,
        **{relation: [row for row in arcs if row.relation == relation] for relation in frequent},
        COREFERENT: [row for row in rows if row.relation == COREFERENT],
    }  # fmt: skip
    table = []
    for relation, group in groups.items():
        if not group:
            continue
        iod, ioh, iou = (100 * sum(getattr(row, name) for row in group) / len(group) for name in ("iod", "ioh", "iou"))
        table.append({"relation": relation, "n": len(group), "miod": iod, "mioh": ioh, "delta": abs(iod - ioh), "miou": iou})
    return table


def as_rows(rows: Sequence[Overlap]) -> list[dict[str, Any]]:
    """Rows as plain data."""
    return [asdict(row) for row in rows]
