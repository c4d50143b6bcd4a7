"""Z-Image: a stock ZImageTransformer2DModel; image and caption run through one stream with one set of weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.settings import token_count, too_long
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.concept_stream import ConceptCarrier, Heads, by_heads
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts, padded


class ZImageCarrier(ConceptCarrier):
    """Concepts beside the joint sequence [image, caption]: the same weights and modulation, all where the caption begins.

    Concepts pass the caption's refiner first, among themselves. They read the image's own tokens, not those that fill its length
    up to a multiple of 32. No published code covers this model: the stream is that of FLUX.1 (Helbling et al. 2025,
    arXiv:2502.04320, section 4) on its blocks.
    """

    START = (1, 0, 0)
    """Position of a caption's first token."""

    def attach(self, taps: TapSet) -> None:
        self.state["host"] = taps.model
        taps.before("cap_embedder", self.embed)
        for layer, path, block in self.wanted_blocks(taps, "layers"):
            attention = f"{path}.attention"
            self.refuse_fused(attention, block.attention)
            taps.before(path, self._inputs)
            taps.after(f"{attention}.norm_q", self.keep("queries"))
            taps.after(f"{attention}.norm_k", self.keep("keys"))
            taps.after(f"{attention}.to_v", self.keep("values"))
            taps.before(f"{attention}.to_out.0", self.at_output(layer, block))

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # forward(), not a call: the module's own hooks (this one) must not run again.
        x = module.forward(self.stream.concepts.to(args[0].dtype))
        host, (rows, count, _) = self.state["host"], x.shape
        place = torch.tensor([self.START], device=x.device, dtype=torch.int32)
        self.state["concept_rotary"] = host.rope_embedder(place)
        if not self.stream.self_attention:
            x = x.flatten(0, 1)[:, None]
        rotary = self.state["concept_rotary"].expand(len(x), x.shape[1], -1)
        for block in host.context_refiner:
            x = block(x, self.stream.present if self.stream.self_attention else None, rotary)
        self.state["residual"] = x.reshape(rows, count, -1)

    def _inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.state["image_rotary"] = args[2][self.stream.rows][:, : self.image_tokens]
        self.state["temb"] = args[3][self.stream.rows]

    def _rotate(self, x: Tensor, rotary: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary[:, :, None]
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    def image_rows(self, outputs: Float[Tensor, "R n D"]) -> Float[Tensor, "R L D"]:
        return outputs[:, : self.image_tokens]

    def advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        state, attention, end = self.state, block.attention, self.image_tokens
        residual = state["residual"]
        scale, gate, scale_mlp, gate_mlp = block.adaLN_modulation(state["temb"])[:, None].chunk(4, dim=-1)
        normed = block.attention_norm1(residual) * (1 + scale)
        # forward(): the image's queries, keys and values are read at these very modules.
        concepts = Heads(
            attention.norm_q.forward(by_heads(attention.to_q(normed), attention)),
            attention.norm_k.forward(by_heads(attention.to_k(normed), attention)),
            by_heads(attention.to_v.forward(normed), attention),
            lambda x: self._rotate(x, state["concept_rotary"][None]),
        )
        image = Heads(
            state["queries"][:, :end], state["keys"][:, :end], by_heads(state["values"][:, :end], attention),
            lambda x: self._rotate(x, state["image_rotary"]),
        )  # fmt: skip
        project = attention.to_out[0].forward
        prompt = Heads(state["queries"][:, end:], state["keys"][:, end:], by_heads(state["values"][:, end:], attention))
        outputs = self.attend(layer, concepts, image, image_outputs, prompt, project, project)
        residual = residual + gate.tanh() * block.attention_norm2(project(outputs))
        inner = block.feed_forward(block.ffn_norm1(residual) * (1 + scale_mlp))
        state["residual"] = residual + gate_mlp.tanh() * block.ffn_norm2(inner)


class ZImageBackbone(MultiModalBackbone):
    """Z-Image and Z-Image-Turbo. Text goes through the checkpoint's own pipeline (Qwen3, chat template) without padding.

    Its pipeline calls g what is 1 + g as the strength of guidance here and in other families.
    """

    kind = "z_image"
    transformer_class = "ZImageTransformer2DModel"
    carrier = ZImageCarrier
    text_encoder_name = "Qwen3"
    text_parts = ("text_pipeline",)
    classifier_free = True

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(range(int(self.config["n_layers"])))

    def check_length(self, string: str) -> None:
        before, own = (token_count(self.tokenizer, text) for text in (self._before_content(), string))
        if before + own > self.text_tokens:
            raise too_long(string, before + own, self.text_tokens, "extractor.backbone.text_tokens, with the chat template")

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        for string in strings:
            (tokens,), _ = self.text_pipeline.encode_prompt(
                [string], do_classifier_free_guidance=False, max_sequence_length=self.text_tokens
            )
            before, own = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (self._before_content(), string))
            yield {"tokens": tokens, "start": torch.tensor(len(before)), "length": torch.tensor(len(own))}

    def _before_content(self) -> str:
        """Return the part of a chat message before its content."""
        mark = "\0"
        message: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return message.partition(mark)[0]

    def prompts(self, captions: Sequence[str]) -> Prompts:
        self.encode_text(captions)
        return padded([self.texts[caption]["tokens"].to(self.device) for caption in captions])

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        texts = list(prompts.hidden.to(self.dtype))
        if prompts.present is not None:
            texts = [text[here] for text, here in zip(texts, prompts.present, strict=True)]
        # Its time runs from noise (0) to image (1), and so does its velocity.
        found = self.transformer(list(noisy[:, :, None]), (1 - level).float(), texts, return_dict=False)[0]
        return -torch.stack(list(found))[:, :, 0]
