"""Encoded captions, and which tokens of a text stand for a word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from conceptseg.backbones.transformers.concept_stream import ConceptTokens, TensorRows

POOLINGS = ("first", "last", "mean", "max", "joint")
"""Which tokens of a word stand for it: one of them, the mean or greatest value of their embeddings, or all of them, travelling
side by side, with the mean of their vectors when they are scored."""


@dataclass(frozen=True)
class Prompts(TensorRows):
    """Encoded captions.

    hidden: [B N d]; pooled: [B p], None in families without one and for Flux's zeros; present: [B N], False for padding that the
    model is not to see, None where it sees all N tokens.
    """

    hidden: Float[Tensor, "B N d"]
    pooled: Float[Tensor, "B p"] | None = None
    present: Bool[Tensor, "B N"] | None = None

    def after(self, other: Prompts) -> Prompts:
        """The other's rows, then these: the two halves of classifier-free guidance. The shorter texts are padded."""
        halves = (other, self)
        lengths = [half.hidden.shape[1] for half in halves]
        hidden = torch.cat([pad(half.hidden, (0, 0, 0, max(lengths) - n)) for half, n in zip(halves, lengths, strict=True)])
        pooled = None if other.pooled is None or self.pooled is None else torch.cat([other.pooled, self.pooled])
        if lengths[0] == lengths[1] and other.present is None and self.present is None:
            return Prompts(hidden, pooled)
        seen = [torch.ones(half.hidden.shape[:2], dtype=torch.bool, device=hidden.device) for half in halves]
        seen = [all_of if half.present is None else half.present for half, all_of in zip(halves, seen, strict=True)]
        return Prompts(hidden, pooled, torch.cat([pad(one, (0, max(lengths) - one.shape[1])) for one in seen]))


def padded(texts: Sequence[Float[Tensor, "_ d"]]) -> Prompts:
    """Stack texts, [N d] each, as one batch padded to the longest, with a mask if lengths differ."""
    lengths = torch.tensor([len(text) for text in texts])
    hidden = pad_sequence(list(texts), batch_first=True)
    present = torch.arange(hidden.shape[1]) < lengths[:, None]
    return Prompts(hidden, None, None if present.all() else present.to(hidden.device))


def own_tokens(tokenizer: Any, string: str) -> int:
    """How many tokens a string has, begin-of-text included, up to its end mark."""
    ids = tokenizer(string).input_ids
    return ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)


def pooled_tokens(rows: Sequence[Sequence[Float[Tensor, "_ d"]]], pooling: str) -> ConceptTokens:
    """Return the concept tokens of rows of words, each word given by its tokens, and the share of each token in its word.

    Source of "first": Helbling et al. 2025 as released (the other poolings are this project's).
    """
    if pooling != "joint":
        return ConceptTokens(torch.stack([torch.stack([_one_token(tokens, pooling) for tokens in row]) for row in rows]))
    most = max(sum(len(tokens) for tokens in row) for row in rows)
    width, first = rows[0][0].shape[-1], rows[0][0]
    together = first.new_zeros(len(rows), most, width)
    words = first.new_zeros(len(rows), len(rows[0]), most)
    present = torch.zeros(len(rows), most, dtype=torch.bool, device=first.device)
    for r, row in enumerate(rows):
        at = 0
        for c, tokens in enumerate(row):
            together[r, at : at + len(tokens)] = tokens
            words[r, c, at : at + len(tokens)] = 1 / len(tokens)
            present[r, at : at + len(tokens)] = True
            at += len(tokens)
    return ConceptTokens(together, words, None if present.all() else present)


def _one_token(tokens: Float[Tensor, "n d"], pooling: str) -> Float[Tensor, " d"]:
    if pooling == "mean":
        return tokens.mean(0)
    return tokens.amax(0) if pooling == "max" else tokens[0 if pooling == "first" else -1]
