"""Chroma: a stock ChromaTransformer2DModel, FLUX.1's blocks without a pooled vector; a small network makes every modulation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.flux import FluxLike
from conceptseg.backbones.transformers.flux_relatives import UnpooledCarrier
from conceptseg.backbones.transformers.prompts import Prompts


class ChromaCarrier(UnpooledCarrier):
    """The blocks are given their modulation, which a small network makes of the noise level."""

    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        # Twelve vectors a block: six of the image, then six of the text.
        return tuple(vector[:, None] for vector in self.state["temb"][:, 6:].unbind(1))


class ChromaBackbone(FluxLike):
    """Chroma1. Text goes through T5 alone, with its padding masked; the transformer sees one token of padding, as it was trained.

    Its pipeline adds 1 to the logits between tokens that are not masked, and so does this. Concepts and image are all such
    tokens, so what concepts see does not depend on it.
    """

    kind = "chroma"
    transformer_class = "ChromaTransformer2DModel"
    carrier = ChromaCarrier
    classifier_free = True

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        return self.placed(self.part("text_encoder", T5EncoderModel, torch_dtype=self.stored_dtype))

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        tokens = self.tokenizer(
            list(strings), padding="max_length", truncation=True, max_length=self.text_tokens, return_tensors="pt"
        )
        mask = tokens.attention_mask.to(self.device)
        hidden = self.text_encoder(input_ids=tokens.input_ids.to(self.device), attention_mask=mask).last_hidden_state
        for one, length in zip(hidden, mask.sum(1), strict=True):
            yield {"tokens": one, "length": length - 1}  # without the end mark

    def prompts(self, captions: Sequence[str]) -> Prompts:
        hidden = super().prompts(captions).hidden
        seen = self._stacked("length", captions) + 2  # the end mark and one token of padding
        return Prompts(hidden, present=torch.arange(hidden.shape[1], device=self.device) < seen[:, None])

    def further_inputs(self, rows: int, cells: int, prompts: Prompts, guidance: float) -> dict[str, Any]:
        if prompts.present is None:
            return {"attention_mask": None}
        image = torch.ones(rows, cells, dtype=self.dtype, device=self.device)
        return {"attention_mask": torch.cat([prompts.present.to(self.dtype), image], 1)}
