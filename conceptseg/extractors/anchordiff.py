"""AnchorDiff on multi-modal diffusion transformers (Zhang and Zhang 2026, arXiv:2605.26460): one anchor, spread over a graph.

A word's attention to the image picks one image token, the anchor. A seed at the anchor is spread over a graph of image tokens:
edges are the similarity of attention outputs, kept where the image's own attention is strong in its row. One forward pass.
Only the paper's abstract was read. The gate, how many steps the seed takes, and how a map ends are settings, and their values
are ours. Not checked against the original.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.backbones.attention_rows import MeanAttention
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.transformers.concept_stream import ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.errors import real_number, whole_number
from conceptseg.extractors.across_layers import AcrossLayers
from conceptseg.saliency.views import Axes

SPACES = {
    "propagated": "the anchor's seed after its steps over the graph, each word's greatest value 1: the method",
    "attention": "attention of the word to image tokens, whose greatest value is the anchor",
}


def gated_graph(similarity: Float[Tensor, "R L L"], attention: Float[Tensor, "R L L"], gate: float) -> Float[Tensor, "R L L"]:
    """Return the share of each edge in its row: similarity above 0, where attention is at least gate times its row's mean.

    similarity: in -1..1, overwritten. attention: 0..1. A row without an edge stays 0.
    """
    kept = attention >= gate * attention.mean(-1, keepdim=True)
    graph = similarity.clamp_(min=0).mul_(kept)
    return graph.div_(graph.sum(-1, keepdim=True).clamp_min(torch.finfo(graph.dtype).tiny))


def spread(graph: Float[Tensor, "R L L"], anchors: Int[Tensor, "R C"], steps: int) -> Float[Tensor, "R C L"]:
    """Move a seed of 1 at each of C anchors along the rows of the graph, and scale what each reaches to a greatest value of 1."""
    seeds = torch.zeros(*anchors.shape, graph.shape[-1], dtype=graph.dtype, device=graph.device).scatter_(
        -1, anchors[..., None], 1
    )
    for _ in range(steps):
        seeds = seeds @ graph
    return seeds / seeds.amax(-1, keepdim=True).clamp_min(torch.finfo(seeds.dtype).tiny)


@dataclass
class Anchored:
    """Sums over a set of layers: attention of image tokens, similarity of their outputs, attention of concepts to them."""

    concepts: ConceptTokens
    gate: float
    steps: int
    attention: MeanAttention = field(default_factory=MeanAttention)
    similarity: Tensor = field(default_factory=lambda: torch.zeros(()))
    answers: Tensor = field(default_factory=lambda: torch.zeros(()))
    prompt: int = 0
    layers: int = 0
    graph: Tensor | None = None

    def add(self, found: StreamActivations) -> None:
        """Add one layer."""
        keys, self.prompt = found.joint_keys(), found.text_keys.shape[1]
        self.attention.add(found.joint_queries()[:, :, self.prompt :], keys, keys.shape[-1] ** -0.5)
        unit = normalize(found.image_outputs.float(), dim=-1)
        if not self.layers:
            self.similarity = unit.new_zeros(len(unit), unit.shape[1], unit.shape[1])
        self.similarity.baddbmm_(unit, unit.mT)
        self.answers = self.answers.to(unit) + concept_attention(found, self.concepts)
        self.layers += 1

    def maps(self, space: str) -> Float[Tensor, "R C L"]:
        """Return the maps of a space."""
        answers = self.concepts.by_word(self.answers / self.layers)
        if space == "attention":
            return answers
        if self.graph is None:
            self.similarity /= self.layers
            self.graph = gated_graph(self.similarity, self.attention.read()[..., self.prompt :], self.gate)
        return spread(self.graph, answers.argmax(-1), self.steps)


def concept_attention(found: StreamActivations, concepts: ConceptTokens) -> Float[Tensor, "R T L"]:
    """Return the attention of T concept tokens to L image tokens, mean over heads: shares of all concept and image keys."""
    queries = found.concept_queries.transpose(1, 2).float() * found.concept_queries.shape[-1] ** -0.5
    own = queries @ found.concept_keys.transpose(1, 2).float().mT
    if concepts.present is not None:
        own = own.masked_fill(~concepts.present.to(own.device)[:, None, None], float("-inf"))
    image = queries @ found.rotated_image_keys.transpose(1, 2).float().mT
    return torch.cat([own, image], -1).softmax(-1)[..., own.shape[-1] :].mean(1)


class AnchorDiff(AcrossLayers):
    """Concept tokens travel as for ConceptAttention; space "propagated" is the method.

    gate: an edge stays where the row's attention is at least this many times its mean; 0 keeps all. steps: of the seed. Neither
    value was seen in the paper.
    noise, posterior, guidance, seed: as for ConceptAttention.
    """

    version = 1
    matrices = 3

    def __init__(
        self,
        backbone: MultiModalBackbone | Loaded,
        gate: float = 2.0,
        steps: int = 2,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, noise=noise, posterior=posterior, guidance=guidance, seed=seed)
        real_number("extractor.gate", gate, 0)
        whole_number("extractor.steps", steps, 1, 1000)
        self.gate, self.steps = gate, steps

    def axes(self) -> Axes:
        return Axes(spaces=tuple(SPACES), layers=self.backbone.layers, has_timesteps=True, has_vectors=False)

    def gathering(self, concepts: ConceptTokens) -> Anchored:
        return Anchored(concepts, self.gate, self.steps)
