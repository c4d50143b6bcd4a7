"""Chroma: a stock ChromaTransformer2DModel, FLUX.1's blocks without a pooled vector; a small network makes every modulation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.latents import image_ids, pack, unpack
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.flux import FluxCarrier
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts


class ChromaCarrier(FluxCarrier):
    """Concepts in the double blocks, with the text's own modulation: it depends on the noise level alone.

    No published code covers this model: the stream is that of FLUX.1 (Helbling et al. 2025, arXiv:2502.04320, section 4).
    """

    def attach(self, taps: TapSet) -> None:
        taps.before("context_embedder", self.embed)
        self.tap_blocks(taps)

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before_block(module, args, kwargs)
        self.state["temb"] = kwargs["temb"][self.stream.rows]

    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        # Twelve vectors a block: six of the image, then six of the text.
        return tuple(vector[:, None] for vector in self.state["temb"][:, 6:].unbind(1))


class ChromaBackbone(MultiModalBackbone):
    """Chroma1. Text goes through T5 alone, with its padding masked; the transformer sees one token of padding, as it was trained.

    Its pipeline adds 1 to the logits between tokens that are not masked, and so does this. Concepts and image are all such
    tokens, so what concepts see does not depend on it.
    """

    kind = "chroma"
    rotates_text = False
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

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // 4

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        rows, (h, w) = len(noisy), self.grid(noisy)
        mask = None
        if prompts.present is not None:
            mask = torch.cat([prompts.present.to(self.dtype), torch.ones(rows, h * w, dtype=self.dtype, device=self.device)], 1)
        return self.transformer(
            hidden_states=pack(noisy), encoder_hidden_states=prompts.hidden.to(self.dtype), timestep=level.to(self.dtype),
            img_ids=image_ids(h, w, self.device), txt_ids=torch.zeros(prompts.hidden.shape[1], 3, device=self.device),
            attention_mask=mask, return_dict=False,
        )[0]  # fmt: skip

    def as_latents(self, velocity: Float[Tensor, "R ..."], grid: tuple[int, ...]) -> Float[Tensor, "R *c H W"]:
        return unpack(velocity, (grid[0], grid[1]))
