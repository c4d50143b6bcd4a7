"""GoCA on multi-modal diffusion transformers (arXiv:2603.06178): heads and layers weighed, words rescaled pixel by pixel.

The attention of image tokens to a word's tokens is averaged over heads with weights of each pixel: how much a head's share of
the output, read from the prompt, agrees with the sum over heads. Layers are weighed by how well their attention between image
tokens agrees with the similarity of their outputs. Words are then divided by their sum at each pixel, brought to 0..1, and
averaged along the attention between image tokens. One forward pass.
The paper's abstract and third-party notes were read, not its equations or code: what weights are normalised by, the features
that layers are compared with and their temperature, and how often maps are refined, are ours. Its dropping of stop words has no
counterpart, since the prompt is the words alone; so has its reading of U-Nets. Not checked against the original.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from conceptseg.backbones.attention_rows import attention_by_head
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.transformers.concept_stream import ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.errors import one_of, real_number, whole_number
from conceptseg.extractors.across_layers import AcrossLayers
from conceptseg.extractors.cross_attention import PromptCrossAttention
from conceptseg.saliency.views import Axes

SPACES = {
    "rescaled": "words divided by their sum at each pixel, brought to 0..1 and refined: the method",
    "aggregated": "attention to each word, heads and layers weighed, as it is",
}


def head_weights(values: Float[Tensor, "R A m d"], projection: Float[Tensor, "D E"]) -> Float[Tensor, "R A m"]:
    """Return each head's weight at m pixels: its share of the output along the output itself, cut at 0; weights sum to 1.

    values: what each head reads from the prompt. projection: of the concatenated heads (D = A·d) to the output, without bias.
    """
    joined = values.transpose(1, 2).flatten(2)
    back = ((joined @ projection) @ projection.mT).unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
    along = (values * back).sum(-1).clamp_min(0)
    return along / along.sum(1, keepdim=True).clamp_min(torch.finfo(along.dtype).tiny)


def _matrix_of(project: Callable[[Tensor], Tensor], like: Float[Tensor, "R L D"]) -> Float[Tensor, "D E"]:
    """Return the matrix of an affine map of tokens like these, so that x @ matrix is the map without its bias."""
    unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    return (project(unit) - project(torch.zeros_like(unit[:1]))).float()


@dataclass
class Aggregated:
    """Sums over a set of layers: weighted attention to words, and the attention between image tokens.

    words: the share of each of the prompt's N tokens in each word.
    """

    words: Float[Tensor, "R C N"]
    layer_weights: str
    temperature: float
    refinements: int
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    between: Tensor = field(default_factory=lambda: torch.zeros(()))
    weight: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, found: StreamActivations) -> None:
        """Add one layer."""
        prompt, keys = found.text_keys.shape[1], found.joint_keys()
        queries, values = found.joint_queries()[:, :, prompt:], found.text_values.transpose(1, 2).float()
        if self.between.ndim == 0:
            self.between = self.words.new_zeros(len(queries), queries.shape[2], queries.shape[2])
        projection, unit = _matrix_of(found.project_image, found.image_outputs), normalize(found.image_outputs.float(), dim=-1)
        maps, agreement = [], self.words.new_zeros(len(queries))
        for part, attention in attention_by_head(queries, keys, keys.shape[-1] ** -0.5):
            to_prompt, mean = attention[..., :prompt], attention.mean(1)[..., prompt:]
            weights = head_weights(to_prompt @ values, projection)
            maps.append(self.words @ (weights[..., None] * to_prompt).sum(1).mT)
            self.between[:, part] += mean
            likeness = ((unit[:, part] @ unit.mT) / self.temperature).softmax(-1)
            agreement += cosine_similarity(mean, likeness, dim=-1).sum(1)
        weight = torch.ones_like(agreement) if self.layer_weights == "even" else agreement / queries.shape[2]
        self.total = self.total.to(weight) + weight[:, None, None] * torch.cat(maps, -1)
        self.weight = self.weight.to(weight) + weight

    def maps(self, space: str) -> Float[Tensor, "R C L"]:
        """Return the maps of a space."""
        maps = self.total / self.weight[:, None, None]
        if space == "aggregated":
            return maps
        tiny = torch.finfo(maps.dtype).tiny
        maps = maps / maps.sum(1, keepdim=True).clamp_min(tiny)
        low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
        maps = (maps - low) / (high - low).clamp_min(tiny)
        for _ in range(self.refinements):
            maps = maps @ self.between.mT / self.between.sum(-1)[:, None]
        return maps


class GoCA(AcrossLayers, PromptCrossAttention):
    """The prompt is the task's words, joined by blanks; space "rescaled" is the method.

    layer_weights: "agreement" of a layer's attention between image tokens with the softmax of its outputs' cosines over
    `temperature`, or "even". refinements: how often maps are averaged along the attention between image tokens.
    noise, posterior, guidance, seed: as for ConceptAttention.
    """

    version = 1

    def __init__(
        self,
        backbone: MultiModalBackbone | Loaded,
        layer_weights: str = "agreement",
        temperature: float = 0.1,
        refinements: int = 1,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, noise=noise, posterior=posterior, guidance=guidance, seed=seed)
        one_of("extractor.layer_weights", layer_weights, ("agreement", "even"))
        real_number("extractor.temperature", temperature, 1e-6)
        whole_number("extractor.refinements", refinements, 0, 1000)
        self.layer_weights, self.temperature, self.refinements = layer_weights, temperature, refinements

    def axes(self) -> Axes:
        return Axes(spaces=tuple(SPACES), layers=self.backbone.layers, has_timesteps=True, has_vectors=False)

    def gathering(self, concepts: ConceptTokens) -> Aggregated:
        assert concepts.words is not None
        return Aggregated(concepts.words.to(torch.float32), self.layer_weights, self.temperature, self.refinements)
