"""Concept tokens that travel beside the text of a stock Flux: what each block yields, the spaces it is scored in, the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import TapError

Vectors = tuple[Tensor, Tensor]
"""Concept vectors [R C d] or [R A C d], and image vectors [R L d] or [R A L d]."""


@dataclass
class BlockActivations:
    """What one double block yields for scoring, all before any output projection and before rotary embedding.

    R rows, A heads, C concepts, L image tokens; concept_* are [R C A d] or [R C A·d], image_* [R L A d] or [R L A·d].
    """

    concept_queries: Tensor
    concept_keys: Tensor
    concept_values: Tensor
    concept_outputs: Tensor
    image_queries: Tensor
    image_keys: Tensor
    image_values: Tensor
    image_outputs: Tensor
    rotated_image_keys: Tensor
    project_concepts: Callable[[Tensor], Tensor]
    project_image: Callable[[Tensor], Tensor]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.flatten(2)


SPACES: dict[str, tuple[str, Callable[[BlockActivations], Vectors]]] = {
    "output": (
        "attention outputs before the output projection, heads concatenated (the paper's space)",
        lambda a: (a.concept_outputs, a.image_outputs),
    ),
    "output_per_head": (
        "attention outputs head by head; softmax per head, then heads folded (keep_head_dim of the release)",
        lambda a: (
            _by_head(a.concept_outputs.unflatten(-1, a.image_queries.shape[2:])),
            _by_head(a.image_outputs.unflatten(-1, a.image_queries.shape[2:])),
        ),
    ),
    "output_projected": (
        "attention outputs after the output projections (what the reference's diffusers port scores)",
        lambda a: (a.project_concepts(a.concept_outputs), a.project_image(a.image_outputs)),
    ),
    "cross": (
        "concept key against image query, head by head, no rotation, no scaling (released code of the paper's days)",
        lambda a: (_by_head(a.concept_keys), _by_head(a.image_queries)),
    ),
    "cross_query_query": (
        "concept query against image query, heads concatenated (released code since 2025-03)",
        lambda a: (_joined(a.concept_queries), _joined(a.image_queries)),
    ),
    "cross_query_key": (
        "concept query against image key as attention sees them: rotated, over sqrt(d), head by head (paper Eq. 12's direction)",
        lambda a: (_by_head(a.concept_queries) / a.concept_queries.shape[-1] ** 0.5, _by_head(a.rotated_image_keys)),
    ),
    "cross_mixed": (
        "mean over heads of concept queries against sum over heads of image queries (a slip in the release of 2025-02)",
        lambda a: (a.concept_queries.mean(2), a.image_queries.sum(2)),
    ),
    "value": (
        "concept value against image value, head by head",
        lambda a: (_by_head(a.concept_values), _by_head(a.image_values)),
    ),
}


@dataclass
class ConceptStream:
    """Concept tokens that travel through the double blocks beside text and image: they read the image, nothing reads them.

    Each concept token uses the text stream's weights with the modulation of (t, pooled); its queries attend to concept
    keys and image keys. `on_block(layer, activations)` is called in every block up to `last_layer`, where the forward pass
    ends (when `stop` is set) before that block's projections and everything after it.

    concepts: [R C d_text], one row per row of the forward pass; pooled: [R p].
    Source: Helbling et al. 2025, arXiv:2502.04320, section 4; released code for pooled = 0 and the ablation switches.
    """

    concepts: Float[Tensor, "R C d"]
    pooled: Float[Tensor, "R p"]
    on_block: Callable[[int, BlockActivations], None]
    last_layer: int
    cross_attention: bool = True
    self_attention: bool = True
    stop: bool = True
    _state: dict[str, Any] = field(default_factory=dict)

    def attach(self, taps: TapSet) -> None:
        """Hook the stock model. Raises TapError if it is not laid out as expected or has fused projections."""
        taps.after("time_text_embed", self._modulation)
        taps.before("context_embedder", self._embed)
        count = len(list(taps.module("transformer_blocks").children()))
        for layer in range(min(self.last_layer + 1, count)):
            block = f"transformer_blocks.{layer}"
            attention = taps.module(f"{block}.attn")
            if getattr(attention, "fused_projections", False):
                raise TapError(
                    f"tapping {block}.attn: its projections are fused, so queries, keys and values can't be read. "
                    f"Call unfuse_qkv_projections() on the transformer first."
                )
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"):
                taps.module(f"{block}.attn.{name}")
            taps.before(block, self._rotary)
            taps.after(f"{block}.attn.norm_q", self._keep("image_queries"))
            taps.after(f"{block}.attn.norm_k", self._keep("image_keys"))
            taps.after(f"{block}.attn.to_v", self._keep("image_values"))
            taps.before(f"{block}.attn.to_out.0", self._at_output(layer, taps.module(block)))

    def _modulation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self._state["temb"] = module.forward(*args[:-1], self.pooled.to(output.dtype))

    def _embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._state["residual"] = module.forward(self.concepts.to(args[0].dtype))

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._state["rotary"] = kwargs["image_rotary_emb"]
        self._state["text_tokens"] = kwargs["encoder_hidden_states"].shape[1]

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._state[name] = output

        return keep

    def _at_output(self, layer: int, block: Any) -> Callable[..., None]:
        def at_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._advance(layer, block, image_outputs=args[0])

        return at_output

    def _advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        """One double block for the concepts: attention, scoring, residual update."""
        from diffusers.models.embeddings import apply_rotary_emb

        state, attention = self._state, block.attn
        residual = state["residual"]
        normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(residual, emb=state["temb"])
        queries = attention.norm_added_q(attention.add_q_proj(normed).unflatten(-1, (-1, attention.head_dim)))
        keys = attention.norm_added_k(attention.add_k_proj(normed).unflatten(-1, (-1, attention.head_dim)))
        values = attention.add_v_proj(normed).unflatten(-1, (-1, attention.head_dim))
        # Concepts and text sit at position 0, where the rotary embedding is the identity; only image keys are turned.
        cosine, sine = (part[state["text_tokens"] :] for part in state["rotary"])
        image_keys = apply_rotary_emb(state["image_keys"], (cosine, sine), sequence_dim=1)
        image_values = state["image_values"].unflatten(-1, (-1, attention.head_dim))
        seen_keys = [k for k, on in ((keys, self.self_attention), (image_keys, self.cross_attention)) if on]
        seen_values = [v for v, on in ((values, self.self_attention), (image_values, self.cross_attention)) if on]
        if seen_keys:
            outputs = scaled_dot_product_attention(
                queries.transpose(1, 2), torch.cat(seen_keys, 1).transpose(1, 2), torch.cat(seen_values, 1).transpose(1, 2)
            ).transpose(1, 2)
        else:
            outputs = values  # neither: a concept sees only itself
        outputs = outputs.flatten(2).to(residual.dtype)
        self.on_block(
            layer,
            BlockActivations(
                concept_queries=queries, concept_keys=keys, concept_values=values, concept_outputs=outputs,
                image_queries=state["image_queries"], image_keys=state["image_keys"], image_values=image_values,
                image_outputs=image_outputs, rotated_image_keys=image_keys,
                project_concepts=attention.to_add_out, project_image=attention.to_out[0].forward,
            ),
        )  # fmt: skip
        if layer == self.last_layer and self.stop:
            raise StopForward
        residual = residual + gate[:, None] * attention.to_add_out(outputs)
        mlp_in = block.norm2_context(residual) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        state["residual"] = residual + gate_mlp[:, None] * block.ff_context(mlp_in)
