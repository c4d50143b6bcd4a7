"""Concept tokens that travel beside the text of a stock transformer: what blocks yield, the spaces it is scored in, the stream.

What differs between model families (which modules hold what, rotation, modulation) lies in the families' files, each with a
`ConceptCarrier`; what they share lies here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeVar

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import TapError

Held = TypeVar("Held", bound="TensorRows")
Vectors = tuple[Tensor, Tensor]
"""Concept vectors [R C d] or [R A C d], and image vectors [R L d] or [R A L d]."""


@dataclass
class StreamActivations:
    """Activations of one block for scoring, all before any output projection and before rotary embedding.

    R rows, A heads, C concept tokens, L image tokens, N text tokens; concept_* are [R C A d] or [R C A·d], image_* [R L A d] or
    [R L A·d], text_* [R N A d].
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
    text_queries: Tensor
    text_keys: Tensor
    text_values: Tensor
    rotated_image_queries: Callable[[], Tensor]
    """Image queries as attention sees them, [R L A d]; computed on demand."""
    image_outputs_beside_concepts: Callable[[], Tensor]
    """Attention outputs of image tokens that attend to image and concepts instead of text, [R L A·d]; computed on demand."""
    project_concepts: Callable[[Tensor], Tensor]
    project_image: Callable[[Tensor], Tensor]

    def joint_queries(self) -> Float[Tensor, "R A n d"]:
        """Return queries of prompt and image as attention sees them, where it does not rotate the prompt's; n = N + L."""
        return _by_head(torch.cat([self.text_queries, self.rotated_image_queries()], 1))

    def joint_keys(self) -> Float[Tensor, "R A n d"]:
        """Return keys of prompt and image as attention sees them, where it does not rotate the prompt's; n = N + L."""
        return _by_head(torch.cat([self.text_keys, self.rotated_image_keys], 1))


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.flatten(2)


def gram_columns(a: StreamActivations) -> Vectors:
    """In each head, the attention output of the image token whose query answers a concept's key most, and all image outputs.

    Their dot products are columns of the Gram matrix of one image's attention outputs.
    """
    outputs = _by_head(a.image_outputs.unflatten(-1, a.image_queries.shape[2:]))
    answers = _by_head(a.concept_keys).float() @ _by_head(a.image_queries).float().mT
    at = answers.argmax(-1)[..., None].expand(-1, -1, -1, outputs.shape[-1])
    return outputs.gather(2, at), outputs


SPACES: dict[str, tuple[str, Callable[[StreamActivations], Vectors]]] = {
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
    "output_beside_concepts": (
        "attention outputs, where the image's are those of image tokens that read image and concepts (released SD3 code)",
        lambda a: (a.concept_outputs, a.image_outputs_beside_concepts()),
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
    "gramcol": (
        "each head's attention output of the image token that answers the concept's key most against all image outputs, "
        "standardised over concepts (GramCol of IMAP, arXiv:2603.02919)",
        gram_columns,
    ),
}

STANDARDIZED = frozenset({"gramcol"})
"""Spaces whose scores are standardised over concepts in every head (see `standardize_over_concepts`)."""


@dataclass(frozen=True)
class TensorRows:
    """A dataclass of tensors [B ...], any of which may be None."""

    def repeated(self: Held, draws: int) -> Held:
        """Every row `draws` times, copies of a row side by side."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{k: None if t is None else repeat(t, "B ... -> (B n) ...", n=draws) for k, t in held.items()})


@dataclass(frozen=True)
class ConceptTokens(TensorRows):
    """The tokens that stand for the words of each row.

    tokens: [B T d] as the text encoder gives them. words: [B C T], the share that each token has in each word's vectors when they
    are scored, None where token c is word c; a token of no word (a begin-of-text token) travels along and is not scored.
    present: [B T], False for padding, which joins no attention; None where all are present.
    """

    tokens: Float[Tensor, "B T d"]
    words: Float[Tensor, "B C T"] | None = None
    present: Bool[Tensor, "B T"] | None = None

    def by_word(self, vectors: Float[Tensor, "R *A T d"]) -> Float[Tensor, "R *A C d"]:
        """Return word vectors from vectors of the T tokens that travel; C words."""
        if self.words is None:
            return vectors
        shares = self.words.to(vectors)
        return (shares if vectors.ndim == 3 else shares[:, None]) @ vectors


@dataclass
class ConceptStream:
    """Concept tokens that travel through the blocks beside text and image: they read the image, nothing reads them.

    Each concept token uses the text stream's weights; its queries attend to concept keys and image keys.
    `on_block(layer, activations)` is called in every block up to `last_layer`, where the forward pass ends (when `stop` is set)
    before that block's projections and everything after it.

    concepts: [R T d_text], one row per row of the forward pass that concepts accompany; pooled: [R p], the pooled vector that
    modulates concepts in families that have one (Flux); present: [R T], False for padding; rows: which rows of the forward
    pass concepts accompany (the conditional half of classifier-free guidance), all by default.
    Source: Helbling et al. 2025, arXiv:2502.04320, section 4; released code for pooled = 0 and the ablation switches.
    """

    concepts: Float[Tensor, "R T d"]
    pooled: Float[Tensor, "R p"] | None
    on_block: Callable[[int, StreamActivations], None]
    last_layer: int
    cross_attention: bool = True
    self_attention: bool = True
    stop: bool = True
    present: Bool[Tensor, "R T"] | None = None
    rows: slice = field(default_factory=lambda: slice(None))


@dataclass
class Heads:
    """Queries, keys and values of one kind of token, [R n A d] each, after normalisation and before rotation."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    rotate: Callable[[Tensor], Tensor] = lambda x: x
    """Rotary embedding that attention applies to queries and keys, [R n A d] -> [R n A d]."""


class ConceptCarrier(ABC):
    """Carries one stream through one forward pass of a family's stock model, by hooks."""

    def __init__(self, stream: ConceptStream) -> None:
        self.stream = stream
        self.state: dict[str, Any] = {}
        self.image_tokens = 0
        """Tokens of the image's own, without what a model appends to them; set before `attach`."""

    @abstractmethod
    def attach(self, taps: TapSet) -> None:
        """Hook the stock model. Raises TapError if it is not laid out as expected or has fused projections."""

    @abstractmethod
    def advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        """Run one block for the concepts: attention, scoring, residual update. image_outputs: before the output projection."""

    def image_rows(self, outputs: Float[Tensor, "R n D"]) -> Float[Tensor, "R L D"]:
        """Select the L image tokens among the n tokens that attention gave outputs for."""
        return outputs

    def at_output(self, layer: int, block: Any) -> Callable[..., None]:
        """A tap before the image's output projection, where a block's attention is done and its outputs can be read."""
        return partial(self._advance_at_output, layer, block)

    def _advance_at_output(
        self, layer: int, block: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.advance(layer, block, self.image_rows(args[0][self.stream.rows]))

    def embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A tap before the text's embedding, which embeds concepts too."""
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self.state["residual"] = module.forward(self.stream.concepts.to(args[0].dtype))

    def wanted_blocks(self, taps: TapSet, path: str, first: int = 0) -> list[tuple[int, str, Any]]:
        """(layer, path, block) of every block up to the last layer; the first block is layer `first`."""
        wanted = self.stream.last_layer + 1 - first
        if wanted <= 0:
            return []
        count = len(list(taps.module(path).children()))
        return [(first + k, f"{path}.{k}", taps.module(f"{path}.{k}")) for k in range(min(wanted, count))]

    def refuse_fused(self, path: str, attention: nn.Module) -> None:
        """Raises TapError where queries, keys and values come out of one matrix."""
        if getattr(attention, "fused_projections", False):
            raise TapError(
                f"tapping {path}: its projections are fused, so queries, keys and values can't be read. "
                f"Call unfuse_qkv_projections() on the transformer first."
            )

    def keep(self, name: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[..., None]:
        """Return a tap that stores the concept rows of a module's output [B n ...] under `name`, after `change`."""
        return partial(self._keep_output, name, change)

    def _keep_output(
        self, name: str, change: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:  # fmt: skip
        self.state[name] = change(output[self.stream.rows])

    def attend(
        self,
        layer: int,
        concepts: Heads,
        image: Heads,
        image_outputs: Float[Tensor, "R L D"],
        text: Heads,
        project_concepts: Callable[[Tensor], Tensor],
        project_image: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "R T D"]:
        """Compute the concepts' attention outputs in one block, pass them to `on_block`, and stop after the last layer.

        text: the prompt's own tokens, before rotation, for methods that score them. project_concepts, project_image:
        output projections, [R n D] -> [R n D]. Raises TapError if the image has other tokens than its grid.
        """
        stream = self.stream
        if self.image_tokens and image_outputs.shape[1] != self.image_tokens:
            raise TapError(
                f"tapping layer {layer}: its attention gave {image_outputs.shape[1]} image tokens, but the image's grid has "
                f"{self.image_tokens}. Token merging, or attention in windows, changed them: undo it on the transformer."
            )
        rotated_image_keys, rotated_concept_keys = image.rotate(image.keys), concepts.rotate(concepts.keys)
        own = (rotated_concept_keys, concepts.values, stream.present)
        seen = [own] if stream.self_attention else []
        seen += [(rotated_image_keys, image.values, None)] if stream.cross_attention else []
        # With neither, a concept sees only itself.
        outputs = _attention(concepts.rotate(concepts.queries), seen) if seen else concepts.values
        outputs = outputs.flatten(2).to(image_outputs.dtype)

        both = [(rotated_image_keys, image.values, None), own]
        stream.on_block(
            layer,
            StreamActivations(
                concept_queries=concepts.queries, concept_keys=concepts.keys, concept_values=concepts.values,
                concept_outputs=outputs, image_queries=image.queries, image_keys=image.keys, image_values=image.values,
                image_outputs=image_outputs, rotated_image_keys=rotated_image_keys,
                text_queries=text.queries, text_keys=text.keys, text_values=text.values,
                rotated_image_queries=lambda: image.rotate(image.queries),
                image_outputs_beside_concepts=lambda: _attention(image.rotate(image.queries), both).flatten(2).to(outputs),
                project_concepts=project_concepts, project_image=project_image,
            ),
        )  # fmt: skip
        if layer == stream.last_layer and stream.stop:
            raise StopForward
        return outputs


def by_heads(x: Float[Tensor, "R n D"], attention: Any) -> Float[Tensor, "R n A d"]:
    """Split token vectors into the heads of a stock attention module; D = A·d."""
    return x.unflatten(-1, (attention.heads, -1))


def normed(norm: nn.Module | None, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
    """Apply a norm to queries or keys; None, as in some checkpoints, leaves them unchanged."""
    # forward(), not a call: what the host's own tokens give is read at these very modules.
    return x if norm is None else norm.forward(x)


def _attention(queries: Float[Tensor, "R n A d"], seen: list[tuple[Tensor, Tensor, Tensor | None]]) -> Float[Tensor, "R n A d"]:
    """Attention to several groups of (keys, values, present) side by side; present None means that all are."""
    keys, values = (torch.cat([group[i] for group in seen], 1) for i in (0, 1))  # type: ignore[misc]
    mask = None
    if any(group[2] is not None for group in seen):
        masks = [torch.ones_like(k[..., 0, 0], dtype=torch.bool) if here is None else here for k, _, here in seen]
        mask = torch.cat(masks, 1)[:, None, None]
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))  # heads before tokens
    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2)
