"""Where the words of a prompt sit among its tokens: by character spans, and by the rule of the reference implementation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from conceptseg.errors import DataError, did_you_mean


def word_spans(tokenizer: Any, prompt: str, word: str) -> tuple[tuple[int, ...], ...]:
    """Token positions of every occurrence of a word or phrase in an encoded prompt, in order; special tokens are counted.

    A word is found by its characters, whatever their case, and only where a word begins and ends: "cat" is not in "catnip".
    Raises DataError if it does not occur, or lies past the tokens that the text encoder reads.
    """
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    before, after = (r"(?<!\w)" if word[:1].isalnum() else ""), (r"(?!\w)" if word[-1:].isalnum() else "")
    found = list(re.finditer(before + pattern + after, prompt, re.IGNORECASE)) if pattern else []
    if not found:
        known = re.findall(r"\w+", prompt.lower())
        raise DataError(f'looking for "{word}" in the prompt "{prompt}": it is not there. {did_you_mean(word.lower(), known)}')
    offsets = tokenizer(prompt, return_offsets_mapping=True, truncation=False, verbose=False).offset_mapping
    spans = []
    for match in found:
        span = tuple(
            position
            for position, (start, end) in enumerate(offsets)
            if start < match.end() and end > match.start() and end > start
        )
        spans.append(span)
    longest = int(tokenizer.model_max_length)
    if any(position >= longest - 1 for span in spans for position in span):
        raise DataError(
            f'looking for "{word}": it lies past the {longest} tokens (with the end token) that the text encoder reads of the '
            f'prompt "{prompt[:120]}". Ask for fewer words, or use a shorter template (extractor.prompt, extractor.concept).'
        )
    return tuple(spans)


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


POSITION_RULES = {"exact": exact_positions, "reference": reference_positions}
"""How words are found among tokens, by the name that settings use."""


def positions_of(rule: str, tokenizer: Any, prompt: str, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Token positions of several words under the named rule."""
    return [POSITION_RULES[rule](tokenizer, prompt, word) for word in words]
