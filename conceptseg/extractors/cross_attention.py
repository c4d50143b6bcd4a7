"""Cross-attention of multi-modal diffusion transformers: the prompt's own tokens against the image's, without concept tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from conceptseg.backbones.attention_rows import attention_rows
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.transformers.concept_stream import ConceptStream, ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.extractors.explanation import Explanation
from conceptseg.saliency.cells import CellStore, kinds_by_layer, softmax_of_cell
from conceptseg.saliency.normalize import softmax_over_concepts
from conceptseg.saliency.views import Axes, CellKind, Fold, View
from conceptseg.types import Batch

SPACES = {
    "key_query": "prompt key against image query, mean over heads, no rotation, no scaling",
    "query_key": "prompt query against image key, as paper Eq. 12 has it, else the same",
    "key_query_share": "prompt key against image query, as shares of all tokens of the prompt (the released SD3.5 baseline)",
    "joint_share": "the attention itself: image query against prompt key, as shares of all prompt and image keys (Seg4Diff)",
}


class PromptCrossAttention(ConceptAttention):
    """The prompt is the task's words, joined by blanks; a word's score is the mean over its tokens.

    noise, posterior, guidance, seed: as for ConceptAttention, with which it shares everything but what is scored.
    Source: the baseline "cross attention" on SD3.5 of Helbling et al. 2025, arXiv:2502.04320;
    helblazer811/ConceptAttention at db30c4d, concept_attention/sd3, which reads one word
    of "a {word}" and repeats its map; here every word of the prompt has its own.
    """

    version = 1

    def __init__(
        self,
        backbone: MultiModalBackbone | Loaded,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, noise=noise, posterior=posterior, guidance=guidance, seed=seed)

    @property
    def reads_caption(self) -> bool:
        """The words themselves are the prompt."""
        return False

    def _explained_prompt(self, *asked: Any) -> Explanation:
        raise ConfigError(
            "explain: PromptCrossAttention reads images and makes none: its prompt is the words. Give image=..., or choose "
            "concept_attention."
        )

    def axes(self) -> Axes:
        # "joint_share" needs the prompt's keys as attention sees them; they are tapped before rotation.
        spaces = tuple(s for s in SPACES if s != "joint_share" or not self.backbone.rotates_text)
        return Axes(spaces=spaces, layers=self.backbone.layers, has_timesteps=True, has_vectors=False)

    def texts(self, batch: Batch) -> set[str]:
        """Every text that is encoded for a batch."""
        return {" ".join(concepts.names) for concepts in batch.concepts}

    def encoded(self, batch: Batch) -> tuple[Prompts, ConceptTokens]:
        rows = [concepts.names for concepts in batch.concepts]
        prompts = self.backbone.prompts([" ".join(names) for names in rows])
        shares = prompts.hidden.new_zeros(len(rows), len(rows[0]), prompts.hidden.shape[1])
        for row, names in enumerate(rows):
            for word, places in enumerate(self.backbone.word_places(names)):
                shares[row, word, list(places)] = 1 / len(places)
        return prompts, ConceptTokens(prompts.hidden, shares)

    def concept_stream(
        self,
        concepts: ConceptTokens,
        asked: Sequence[View],
        level: float,
        draws: int,
        cells: CellStore,
        background: Bool[Tensor, "B C"] | None = None,
        **options: Any,
    ) -> ConceptStream:
        wanted = kinds_by_layer(asked)
        always = None if background is None else background.to(concepts.tokens.device).repeat_interleave(draws, 0)
        assert concepts.words is not None
        words = concepts.words.float()

        def score(layer: int, found: StreamActivations) -> None:
            for kind in wanted.get(layer, ()):
                scores = rearrange(prompt_scores(found, words, kind, always), "(B N) C L -> N B C L", N=draws)
                for draw in range(draws):
                    cells.put(kind, layer, level, draw, scores[draw])

        # No concept travels: the prompt's first token stands in, and nothing reads it.
        pooled = self.backbone.concept_pooled(len(concepts.tokens))
        return ConceptStream(concepts.tokens[:, :1], pooled, score, last_layer=max(wanted), **options)


def prompt_scores(
    found: StreamActivations, words: Float[Tensor, "R C N"], kind: CellKind, background: Bool[Tensor, "R C"] | None = None
) -> Float[Tensor, "R C L"]:
    """Score words against image tokens from a block's text and image tokens; words: the share of each token in each word."""
    if kind.space == "joint_share":
        return softmax_of_cell(words @ joint_shares(found, kind.heads), kind, background)
    text, image = found.text_keys, found.image_queries
    if kind.space == "query_key":
        text, image = found.text_queries, found.image_keys
    by_token = torch.einsum("rnad,rlad->rnl", text.float(), image.float())
    if kind.heads is Fold.MEAN:
        by_token = by_token / text.shape[2]
    if kind.space == "key_query_share":
        by_token = softmax_over_concepts(by_token)
    return softmax_of_cell(words @ by_token, kind, background)


def joint_shares(found: StreamActivations, heads: Fold) -> Float[Tensor, "R N L"]:
    """Return the attention of L image tokens to N prompt tokens: softmax over all N + L keys in every head, heads folded.

    The prompt's keys must be those that attention sees (see `MultiModalBackbone.rotates_text`).
    Source: Seg4Diff, arXiv:2509.18096, and cvlab-kaist/Seg4Diff at bb500ca, as a third party describes its read-out.
    """
    queries, keys = found.joint_queries(), found.joint_keys()
    prompt = found.text_keys.shape[1]
    rows = attention_rows(queries[:, :, prompt:], keys, keys.shape[-1] ** -0.5)
    shares = torch.cat([mean[:, :, :prompt].mT.contiguous() for _, mean in rows], -1)
    return shares if heads is Fold.MEAN else shares * keys.shape[1]
