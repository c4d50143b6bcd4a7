"""Where the words of a prompt sit among its tokens: by character spans, and by the rule of the reference implementation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from conceptseg.errors import DataError, did_you_mean

Span = tuple[int, int]
"""Characters of a text, from the first up to, not including, the second."""


def occurrences(text: str, word: str) -> list[Span]:
    """Where a word or phrase stands in a text, whatever its case. It is no part of a longer word: "cat" is not in "catnip"."""
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    before, after = (r"(?<!\w)" if word[:1].isalnum() else ""), (r"(?!\w)" if word[-1:].isalnum() else "")
    return [match.span() for match in re.finditer(before + pattern + after, text, re.IGNORECASE)] if pattern else []


def token_spans(tokenizer: Any, text: str) -> list[Span]:
    """The characters of each token of an encoded text; special tokens are counted, and have none."""
    found: list[Span] = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False).offset_mapping
    return found


def span_positions(
    tokenizer: Any, text: str, offsets: Sequence[Span], spans: Sequence[Span], word: str, length: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Token positions of each of a word's spans in an encoded text; special tokens are counted.

    offsets: `token_spans` of the text. length: tokens that the model is given, if fewer than the tokenizer's own limit. Raises
    DataError for a span without a token, or past the tokens that the text encoder reads.
    """
    found = [
        tuple(place for place, (start, end) in enumerate(offsets) if start < last and end > first and end > start)
        for first, last in spans
    ]
    longest = min(int(tokenizer.model_max_length), length or int(tokenizer.model_max_length))
    if any(position >= longest - 1 for span in found for position in span):
        raise DataError(
            f'looking for "{word}": it lies past the {longest} tokens (with the end token) that the text encoder reads of the '
            f'prompt "{text[:120]}". Ask for fewer words, or use a shorter template (extractor.prompt, extractor.concept).'
        )
    if not all(found):
        raise DataError(f'looking for "{word}" in the prompt "{text[:120]}": it makes no token. Ask for another word.')
    return tuple(found)


def word_spans(tokenizer: Any, prompt: str, word: str, length: int | None = None) -> tuple[tuple[int, ...], ...]:
    """Token positions of every occurrence of a word or phrase in an encoded prompt, in order; see `occurrences`.

    length: as in `span_positions`. Raises DataError if it does not occur, or lies past the tokens that the text encoder reads.
    """
    found = occurrences(prompt, word)
    if not found:
        raise _not_there(prompt, word)
    return span_positions(tokenizer, prompt, token_spans(tokenizer, prompt), found, word, length)


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A text, words, and where each of them stands in it, in order."""

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]


def placed(template: str, caption: str, words: Sequence[str], concept: str, join: str, others: Sequence[str] = ()) -> PlacedText:
    """A template filled with a caption and a list of words, and where the words stand in it.

    template: with {caption} and {concepts}; concept: with {concept}, what each word is put into; join: what stands between them.
    A word stands where the list puts it, and wherever else the template or the caption says it; there the longest of `words` and
    `others` are taken first, so that "dog" is not read in "hot dog".
    """
    text, spans, taken = "", [list[Span]() for _ in words], list[Span]()
    for literal, field, _, _ in Formatter().parse(template):
        text += literal
        if field == "caption":
            text += caption
        elif field == "concepts":
            begin = len(text)
            for number, word in enumerate(words):
                text += join if number else ""
                for around, slot, _, _ in Formatter().parse(concept):
                    text += around
                    if slot == "concept":
                        spans[number].append((len(text), len(text) + len(word)))
                        text += word
            taken.append((begin, len(text)))
    claims = [*words, *(other for other in others if other not in words)]
    for word in sorted(claims, key=len, reverse=True):
        free = [span for span in occurrences(text, word) if not any(span[0] < end and span[1] > start for start, end in taken)]
        taken += free
        if word in words:
            spans[words.index(word)] += free
    return PlacedText(text, tuple(words), tuple(tuple(sorted(one)) for one in spans))


def _not_there(text: str, word: str) -> DataError:
    near = did_you_mean(word.lower(), re.findall(r"\w+", text.lower()))
    return DataError(f'looking for "{word}" in the prompt "{text}": it is not there. {near}')


def exact_positions(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Token positions of all occurrences of a word, pooled; see `word_spans`."""
    return tuple(sorted({position for span in word_spans(tokenizer, prompt, word) for position in span}))


def reference_positions(
    tokenizer: Any, prompt: str, word: str, word_index: int | None = None, offset: int = 0
) -> tuple[int, ...]:
    """Positions by the reference's rule: wherever the pieces of the lower-cased word occur in those of the lower-cased prompt.

    End-of-word marks are removed, so "cat" is found in "cat" + "fish", and a position may lie past the encoded text.
    `word_index` counts pieces and replaces the search. Raises DataError if nothing matches.
    Source: castorini/daam at 09564e0, daam/utils.py, compute_token_merge_indices.
    """
    if word_index is not None:
        return (word_index + 1,)
    pieces, wanted = ([piece.replace("</w>", "") for piece in tokenizer.tokenize(text.lower())] for text in (prompt, word))
    starts = [i for i in range(len(pieces) - len(wanted) + 1) if wanted and pieces[i : i + len(wanted)] == wanted]
    if not starts:
        raise DataError(f'looking for "{word}" in the prompt "{prompt}": its pieces {wanted} do not occur in {pieces}.')
    return tuple(sorted({start + step + offset + 1 for start in starts for step in range(len(wanted))}))


def prompt_length(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt without special tokens."""
    return len(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def token_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text, special ones included (CLIP has two, T5 an end, Gemma a start), before any are cut off."""
    return tuple(tokenizer(text, truncation=False, verbose=False).input_ids)


POSITION_RULES = ("exact", "reference")
"""How words are found among tokens, by the name that settings use: by their characters, or as the reference does."""


def positions_of(rule: str, tokenizer: Any, prompt: PlacedText) -> list[tuple[int, ...]]:
    """Token positions of each word of a text under the named rule, all its occurrences pooled.

    Raises DataError for a word that is not there, or lies past the tokens that the text encoder reads.
    """
    if rule == "reference":
        return [reference_positions(tokenizer, prompt.text, word) for word in prompt.words]
    found, offsets = [], token_spans(tokenizer, prompt.text)
    for word, spans in zip(prompt.words, prompt.spans, strict=True):
        if not spans:
            raise _not_there(prompt.text, word)
        held = span_positions(tokenizer, prompt.text, offsets, spans, word)
        found.append(tuple(sorted({place for span in held for place in span})))
    return found
