"""ConceptAttention on multi-modal diffusion transformers (Helbling et al. 2025, arXiv:2502.04320).

Concept tokens travel beside the text of a stock transformer; a concept's map is the dot product of its attention output
with the image tokens' attention outputs. The published rows add, per layer and noise draw, a linear normalisation over
concepts and a softmax over concepts, then take the mean. Every switch is a view setting (what is read off) or an argument
below (what is run).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.base import sample_noise, sample_seed, shared_noise, stack_images
from conceptseg.backbones.concept_stream import SPACES, BlockActivations, ConceptStream, ConceptTokens
from conceptseg.backbones.mmdit import MultiModalBackbone, Prompts
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.extractors.base import Extractor, Provenance
from conceptseg.saliency.cells import CellStore, cell_scores, kinds_by_layer
from conceptseg.saliency.normalize import linear_over_concepts, unit_length
from conceptseg.saliency.views import Axes, CellKind, Normalize, View
from conceptseg.types import Batch, SaliencyMaps


class ConceptAttention(Extractor):
    """Reads real images noised to a level t, in as many forward passes as there are timesteps.

    concept_cross_attention, concept_self_attention: what concepts attend to (the paper's Table 4; both on is the method).
    noise: "per_sample" depends on (seed, sample, draw) alone; "shared" is the reference's: one noise for all images from
        seed + draw, in the model's dtype on its device, mixed in that dtype.
    posterior: "mode" takes the autoencoder's mean; "sample" draws from it, as the reference does (there unseeded).
    guidance: embedded guidance of dev models; the reference encodes with 0.
    """

    version = 1
    told = "name and prompt"
    trained_on = "images and captions"

    def __init__(
        self,
        backbone: MultiModalBackbone,
        concept_cross_attention: bool = True,
        concept_self_attention: bool = True,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone
        self.cross_attention, self.self_attention = concept_cross_attention, concept_self_attention
        for value, key, choices in ((noise, "noise", ["per_sample", "shared"]), (posterior, "posterior", ["mode", "sample"])):
            if value not in choices:
                raise ConfigError(f'extractor.{key}: unknown "{value}". {did_you_mean(value, choices)}')
        self.noise, self.posterior, self.guidance, self.seed = noise, posterior, guidance, seed

    def axes(self) -> Axes:
        return Axes(spaces=self.backbone.spaces, layers=self.backbone.layers, has_timesteps=True)

    @property
    def provenance(self) -> Provenance:
        return self.backbone.provenance

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "backbone": self.backbone.identity()}

    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        backbone = self.backbone
        images = stack_images([task.image for task in batch.tasks], backbone.size, backbone.resize)
        generators = None
        if self.posterior == "sample":
            generators = [torch.Generator().manual_seed(sample_seed(self.seed, key, "posterior")) for key in batch.keys]
        prompts = backbone.prompts(batch.captions)
        concepts = backbone.concepts([c.names for c in batch.concepts])
        latents = backbone.latents(images, generators)
        cells = self.read_cells(latents, prompts, concepts, batch.keys, views)
        for view in views:
            yield SaliencyMaps(view.key, cells.read(view, backbone.grid(latents)), self.comparable)

    def read_cells(
        self,
        latents: Float[Tensor, "B *c H W"],
        prompts: Prompts,
        concepts: ConceptTokens,
        keys: Sequence[str],
        views: Sequence[View],
    ) -> CellStore:
        """Fill every cell that the views ask for: one forward pass per timestep, with all noise draws side by side."""
        cells = CellStore()
        for level in sorted({t for view in views for t in view.timesteps}):
            asked = [view for view in views if level in view.timesteps]
            draws = max(view.draws for view in asked)
            stream = self.concept_stream(concepts.repeated(draws), asked, level, draws, cells)
            noisy, t = self.noised(latents, level, keys, draws)
            self.backbone.denoise(noisy, t, prompts.repeated(draws), stream, self.guidance)
        return cells

    def concept_stream(
        self, concepts: ConceptTokens, asked: Sequence[View], level: float, draws: int, cells: CellStore, **options: Any
    ) -> ConceptStream:
        """The stream of one forward pass, which puts every cell of this level that the views ask for into the store."""
        wanted = kinds_by_layer(asked)

        def score(layer: int, found: BlockActivations) -> None:
            vectors: dict[tuple[str, Normalize], tuple[Tensor, Tensor]] = {}
            for kind in wanted.get(layer, ()):
                name = (kind.space, kind.normalize)
                if name not in vectors:
                    vectors[name] = _vectors(found, kind, concepts)
                scores = rearrange(cell_scores(*vectors[name], kind), "(B N) C L -> N B C L", N=draws)
                for draw in range(draws):
                    cells.put(kind, layer, level, draw, scores[draw])

        return ConceptStream(
            concepts.tokens, self.backbone.concept_pooled(len(concepts.tokens)), score, last_layer=max(wanted),
            cross_attention=self.cross_attention, self_attention=self.self_attention, present=concepts.present, **options,
        )  # fmt: skip

    def noised(
        self, latents: Float[Tensor, "B *c H W"], level: float, keys: Sequence[str], draws: int
    ) -> tuple[Float[Tensor, "R *c H W"], float]:
        """t · noise + (1 - t) · latents for every image and draw (draws fastest), and the t that the model is told."""
        if self.noise == "per_sample":
            noise = torch.stack([sample_noise(latents.shape[1:], self.seed, keys, d) for d in range(draws)], dim=1).to(latents)
            return rearrange(level * noise + (1 - level) * latents[:, None], "B N ... -> (B N) ..."), level
        dtype = torch.bfloat16 if self.backbone.dtype == torch.float32 else self.backbone.dtype
        noise = torch.stack(
            [shared_noise(latents.shape[1:], self.seed, d, self.backbone.device, dtype) for d in range(draws)], dim=1
        )
        mixed = level * noise + (1 - level) * latents[:, None].to(dtype)
        return rearrange(mixed, "B N ... -> (B N) ..."), float(torch.tensor(level, dtype=dtype))


def _vectors(found: BlockActivations, kind: CellKind, concepts: ConceptTokens) -> tuple[Tensor, Tensor]:
    """Vectors of words and of image tokens in one space, the words' in float32 and normalised."""
    token_vectors, image_vectors = SPACES[kind.space][1](found)
    concept_vectors = concepts.by_word(token_vectors.float())
    if kind.normalize is Normalize.LINEAR:
        concept_vectors = linear_over_concepts(concept_vectors)
    elif kind.normalize is Normalize.UNIT:
        concept_vectors = unit_length(concept_vectors)
    return concept_vectors, image_vectors
