"""Relatives of FLUX.1 without its pooled vector: LongCat-Image and Ovis-Image, and the concept stream that Chroma has too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.settings import too_long
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.flux import FluxCarrier, FluxLike
from conceptseg.backbones.transformers.flux2 import chat_message


class UnpooledCarrier(FluxCarrier):
    """Concepts in FLUX.1's double blocks where the noise level alone makes the text's modulation, and so theirs.

    They stand where the text begins, at a position that the rotary embedding leaves as it is. No published code covers these
    models: the stream is that of FLUX.1 (Helbling et al. 2025, arXiv:2502.04320, section 4).
    """

    def attach(self, taps: TapSet) -> None:
        taps.before("context_embedder", self.embed)
        self.tap_blocks(taps)

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().before_block(module, args, kwargs)
        self.state["temb"] = kwargs["temb"][self.stream.rows]


class OvisCarrier(UnpooledCarrier):
    """The text is normalised before it is embedded, and so are concepts."""

    def attach(self, taps: TapSet) -> None:
        self.state["text_norm"] = taps.module("context_embedder_norm")
        super().attach(taps)

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self.state["residual"] = module.forward(self.state["text_norm"](self.stream.concepts.to(args[0].dtype)))


class TextOnDiagonal(FluxLike):
    """Parts that LongCat-Image and Ovis-Image share: each token of the prompt has a rotary position (_, k, k) of its own."""

    rotates_text = True
    carrier = UnpooledCarrier
    classifier_free = True
    text_parts = ("text_pipeline",)

    def text_places(self, count: int) -> Float[Tensor, "N 3"]:
        places = torch.arange(count, device=self.device, dtype=torch.float32)
        return torch.stack([torch.zeros_like(places), places, places], dim=-1)


class LongCatImageBackbone(TextOnDiagonal):
    """LongCat-Image. Text goes through the checkpoint's own pipeline (Qwen2.5-VL), and what stands in quotes letter by letter.

    text_tokens: 512, as trained: the image's rotary positions begin at it. Images are made as the pipeline makes them without
    having the prompt rewritten (enable_prompt_rewrite=False).
    """

    kind = "longcat_image"
    transformer_class = "LongCatImageTransformer2DModel"
    text_encoder_name = "Qwen2.5-VL"
    beside_text = ("transformer", "vae", "text_processor")

    def own_tokens(self, string: str) -> int:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

        parts = [letter for part, quoted in split_quotation(string) for letter in (part if quoted else [part])]
        return sum(len(self.tokenizer(part, add_special_tokens=False).input_ids) for part in parts)

    def check_length(self, string: str) -> None:
        if (count := self.own_tokens(string)) > self.text_tokens:
            raise too_long(string, count, self.text_tokens, "extractor.backbone.text_tokens")

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        pipeline = self.text_pipeline
        read = pipeline.tokenizer_max_length
        left = pipeline.tokenizer.padding_side == "left"
        for string in strings:
            pipeline.tokenizer_max_length = self.text_tokens
            try:
                tokens, _ = pipeline.encode_prompt([string])
            finally:
                pipeline.tokenizer_max_length = read
            count = self.own_tokens(string)
            yield {
                "tokens": tokens[0], "start": torch.tensor(self.text_tokens - count if left else 0),
                "length": torch.tensor(count),
            }  # fmt: skip

    def image_places(self, h: int, w: int) -> Float[Tensor, "L 3"]:
        return super().image_places(h, w) + torch.tensor([1, self.text_tokens, self.text_tokens], device=self.device)

    def guided(
        self, without: Float[Tensor, "R ..."], with_caption: Float[Tensor, "R ..."], guidance: float
    ) -> Float[Tensor, "R ..."]:
        """Combine the two outputs [R L d] as the pipeline does: no token becomes longer than it is with the caption."""
        mixed = super().guided(without, with_caption, guidance)
        length = with_caption.norm(dim=-1, keepdim=True)
        return mixed * (length / (mixed.norm(dim=-1, keepdim=True) + 1e-8)).clamp(max=1)


class OvisImageBackbone(TextOnDiagonal):
    """Ovis-Image. Text goes through the checkpoint's own pipeline: Qwen3 reads a message, whose first 28 tokens are dropped."""

    kind = "ovis_image"
    transformer_class = "OvisImageTransformer2DModel"
    text_encoder_name = "Qwen3"
    carrier = OvisCarrier

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        for string in strings:
            tokens, *_ = self.text_pipeline.encode_prompt(
                [string], do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
            )
            own, _ = self._places(string)
            yield {"tokens": tokens[0], "start": torch.tensor(own.start), "length": torch.tensor(len(own))}

    def own_tokens(self, string: str) -> int:
        return len(self._places(string)[0])

    def check_length(self, string: str) -> None:
        _, count = self._places(string)
        if count > self.text_tokens:
            raise too_long(string, count, self.text_tokens, "extractor.backbone.text_tokens, with its chat message")

    @cached_property
    def _message(self) -> Any:
        """The stock pipeline with nothing in it: it says what stands before a prompt, and how much of that is dropped."""
        from diffusers import OvisImagePipeline

        return OvisImagePipeline(None, None, None, None, None)

    def _places(self, string: str) -> tuple[range, int]:
        """Where a string's own tokens stand among the encoded ones of its chat message, and how many are encoded."""
        said, dropped = self._message.system_prompt, self._message.user_prompt_begin_id
        message = chat_message(self.tokenizer, said + string)
        start = message.index(said) + len(said)
        found = self.tokenizer(message, add_special_tokens=False, return_offsets_mapping=True)
        spans = enumerate(found["offset_mapping"])
        own = [k - dropped for k, (first, end) in spans if end > start and first < start + len(string)]
        return range(own[0], own[-1] + 1) if own else range(0), len(found["input_ids"]) - dropped
