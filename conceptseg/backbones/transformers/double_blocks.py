"""Concepts in double blocks, where text and image have weights of their own and attend together (FLUX.1, FLUX.2, Qwen-Image)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.transformers.concept_stream import ConceptCarrier, Heads, by_heads


class DoubleBlockCarrier(ConceptCarrier):
    """Carries concepts with the text's weights; a family says how blocks modulate, rotate, and feed forward."""

    def tap_blocks(self, taps: TapSet) -> None:
        """Hook every block up to the last layer."""
        for layer, path, block in self.wanted_blocks(taps, "transformer_blocks"):
            self.refuse_fused(f"{path}.attn", block.attn)
            for name in ("add_q_proj", "to_add_out"):
                taps.module(f"{path}.attn.{name}")
            taps.before(path, self.before_block)
            taps.after(f"{path}.attn.norm_q", self.keep("image_queries"))
            taps.after(f"{path}.attn.norm_k", self.keep("image_keys"))
            taps.after(f"{path}.attn.to_v", self.keep("image_values"))
            taps.after(f"{path}.attn.norm_added_q", self.keep("text_queries"))
            taps.after(f"{path}.attn.norm_added_k", self.keep("text_keys"))
            taps.after(f"{path}.attn.add_v_proj", self.keep("text_values"))
            taps.before(f"{path}.attn.to_out.0", self.at_output(layer, block))

    @abstractmethod
    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the block is given besides its tokens: rotation, modulation."""

    @abstractmethod
    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        """Return (shift, scale, gate) of the attention and of the MLP, [R 1 D] each."""

    @abstractmethod
    def norms(self, block: Any) -> tuple[Any, Any, Any]:
        """The text's normalisation before attention, that before the MLP, and the MLP."""

    def rotate_image(self, x: Float[Tensor, "R L A d"]) -> Float[Tensor, "R L A d"]:
        """Apply the image's rotary embedding to queries or keys of L tokens."""
        return x

    def rotate_concepts(self, x: Float[Tensor, "R C A d"]) -> Float[Tensor, "R C A d"]:
        """Apply the concepts' rotary embedding to queries or keys of C tokens; by default none."""
        return x

    def advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        state, attention = self.state, block.attn
        residual = state["residual"]
        norm, norm_mlp, mlp = self.norms(block)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(block)
        normed = norm(residual) * (1 + scale) + shift
        concepts = Heads(
            # forward(): the text's queries, keys and values are read at these very modules.
            attention.norm_added_q.forward(by_heads(attention.add_q_proj(normed), attention)),
            attention.norm_added_k.forward(by_heads(attention.add_k_proj(normed), attention)),
            by_heads(attention.add_v_proj.forward(normed), attention),
            self.rotate_concepts,
        )
        values = by_heads(state["image_values"], attention)
        image = Heads(state["image_queries"], state["image_keys"], values, self.rotate_image)
        project_image = attention.to_out[0].forward
        text = Heads(state["text_queries"], state["text_keys"], by_heads(state["text_values"], attention))
        outputs = self.attend(layer, concepts, image, image_outputs, text, attention.to_add_out, project_image)
        residual = residual + gate * attention.to_add_out(outputs)
        state["residual"] = residual + gate_mlp * mlp(norm_mlp(residual) * (1 + scale_mlp) + shift_mlp)
