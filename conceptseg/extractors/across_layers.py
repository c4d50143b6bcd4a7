"""Base of methods that read the joint attention of a diffusion transformer, averaged over heads and all layers of a view.

Attention is added up in the hooks, some rows at a time; a map is made once the last layer of a view has been added. So a view's
layers yield one cell, where ConceptAttention has one a layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from conceptseg.backbones.attention_rows import mean_attention_bytes
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.transformers.concept_stream import ConceptStream, ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.cells import CellStore, softmax_of_cell
from conceptseg.saliency.views import CellKind, View

OF_FLUX = (16, 24, 128)
"""Pixels a side of an image token, heads, and features of a head, of FLUX.1."""


@runtime_checkable
class Gathered(Protocol):
    """Holds what a method has read of one set of layers so far."""

    def add(self, found: StreamActivations) -> None:
        """Add one layer."""

    def maps(self, space: str) -> Float[Tensor, "R C L"]:
        """Return maps of C words at L image tokens, once every layer was added."""


class AcrossLayers(ConceptAttention):
    """Implement `gathering` and `axes`; everything else is that of the class beside it in the list of bases."""

    def __init__(self, backbone: MultiModalBackbone | Loaded, **settings: Any) -> None:
        super().__init__(backbone, **settings)
        if self.backbone.rotates_text:
            raise ConfigError(
                f"extractor.backbone is a {type(self.backbone).__name__}, whose attention rotates the prompt's keys after they "
                f"are read, so {type(self).__name__} can't compute its attention matrix. Choose FLUX.1 or SD3, such as "
                f"backbone@extractor.backbone=lab_flux."
            )

    matrices: ClassVar[int] = 1
    """Matrices of tokens x tokens that a row holds at the peak."""

    @abstractmethod
    def gathering(self, concepts: ConceptTokens) -> Gathered:
        """An empty holder for one set of layers; concepts: of the rows of one forward pass."""

    def held_bytes(self, images: int, views: Sequence[Mapping[str, Any]]) -> int:
        side, heads, width = OF_FLUX
        if self.backbone.checkpoint.folder() is not None:
            config, side = self.backbone.config, self.backbone.pixels_per_token
            heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        tokens = (self.backbone.size[0] // side) * (self.backbone.size[1] // side) + self.backbone.prompt_tokens
        rows = images * max((int(view.get("draws") or 1) for view in views), default=1)
        sets = len({str(view.get("layers", "all")) for view in views})
        return mean_attention_bytes(rows, heads, tokens, tokens, width) + (sets * self.matrices - 1) * 4 * rows * tokens**2

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
        always = None if background is None else background.to(concepts.tokens.device).repeat_interleave(draws, 0)
        kinds: dict[tuple[int, ...], set[CellKind]] = {}
        for view in asked:
            kinds.setdefault(view.layers, set()).add(view.cell)
        waiting = {layers: self.gathering(concepts) for layers in kinds}

        def on_block(layer: int, found: StreamActivations) -> None:
            for layers in [one for one in waiting if layer in one]:
                waiting[layers].add(found)
                if layer < layers[-1]:
                    continue
                gathered = waiting.pop(layers)
                for kind in kinds[layers]:
                    scores = softmax_of_cell(gathered.maps(kind.space), kind, always)
                    for draw in range(draws):  # copies of an image stand side by side
                        cells.put(kind, layers, level, draw, scores[draw::draws])

        stream = super().concept_stream(concepts, asked, level, draws, cells, background, **options)
        return replace(stream, on_block=on_block)
