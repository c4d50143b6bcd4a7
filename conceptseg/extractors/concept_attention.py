"""ConceptAttention on multi-modal diffusion transformers (Helbling et al. 2025, arXiv:2502.04320).

Concept tokens travel beside the text of a stock transformer; a concept's map is the dot product of its attention output
with the image tokens' attention outputs. The published rows add, per layer and noise draw, a linear normalisation over
concepts and a softmax over concepts, then take the mean. Every switch is a view setting (what is read off) or an argument
below (what is run).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from conceptseg.backbones.base import sample_noise, sample_seed, shared_noise, stack_images
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.backbones.transformers.concept_stream import (
    SPACES,
    STANDARDIZED,
    ConceptStream,
    ConceptTokens,
    StreamActivations,
)
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError, DataError, one_of, real_number, whole_number
from conceptseg.extractors.base import Extractor
from conceptseg.extractors.explaining import checked_size
from conceptseg.extractors.explanation import Explanation, as_pixels, remarks_on
from conceptseg.saliency.cells import CellStore, background_words, cell_scores, kinds_by_layer
from conceptseg.saliency.normalize import linear_over_concepts, unit_length
from conceptseg.saliency.views import Axes, CellKind, Normalize, View
from conceptseg.types import Batch, Concepts, SaliencyMaps, Task


class ConceptAttention(Extractor):
    """Reads real images noised to a level t, in as many forward passes as there are timesteps; or images while they are made.

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
        backbone: MultiModalBackbone | Loaded,
        concept_cross_attention: bool = True,
        concept_self_attention: bool = True,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.backbone = backbone_from(backbone)
        if not isinstance(self.backbone, MultiModalBackbone):
            raise ConfigError(
                f"extractor.backbone is a {type(self.backbone).__name__}, and {type(self).__name__} reads a multi-modal "
                f"diffusion transformer. Choose one of its sheets, such as backbone@extractor.backbone=lab_flux."
            )
        self.cross_attention, self.self_attention = concept_cross_attention, concept_self_attention
        one_of("extractor.noise", noise, ("per_sample", "shared"))
        one_of("extractor.posterior", posterior, ("mode", "sample"))
        real_number("extractor.guidance", guidance)
        whole_number("extractor.seed", seed, -(2**63))
        self.noise, self.posterior, self.guidance, self.seed = noise, posterior, guidance, seed

    def axes(self) -> Axes:
        return Axes(spaces=self.backbone.spaces, layers=self.backbone.layers, has_timesteps=True)

    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        backbone = self.backbone
        images = stack_images([task.image for task in batch.tasks], backbone.size, backbone.resize, backbone.device)
        generators = None
        if self.posterior == "sample":
            generators = [torch.Generator().manual_seed(sample_seed(self.seed, key, "posterior")) for key in batch.keys]
        prompts, concepts = self.encoded(batch)
        latents = backbone.latents(images, generators)
        background = background_words(batch)
        cells = self.read_cells(latents, prompts, concepts, batch.keys, views, background)
        for view in views:
            maps = cells.read(view, backbone.grid(latents), background)
            # A video model reads a still image as one frame.
            yield SaliencyMaps(view.key, maps.flatten(2, 3) if maps.ndim == 5 else maps, self.comparable)

    def texts(self, batch: Batch) -> set[str]:
        """Every text that is encoded for a batch."""
        return {text for task in batch.tasks for text in self.backbone.texts_of(task.caption, task.concepts.names)}

    def encode_texts(self, tasks: Iterable[Task]) -> None:
        """All at once where encoders are released, so that they are read once and let go of before the transformer is read."""
        if self.backbone.releases_text_encoders:
            self.backbone.encode_all(set().union(*(self.texts(Batch((task,))) for task in tasks)))

    def encoded(self, batch: Batch) -> tuple[Prompts, ConceptTokens]:
        """Return a batch's encoded captions (tokens [B N d]) and its concept tokens [B T d]."""
        return self.backbone.prompts(batch.captions), self.backbone.concepts([c.names for c in batch.concepts])

    def read_cells(
        self,
        latents: Float[Tensor, "B *c H W"],
        prompts: Prompts,
        concepts: ConceptTokens,
        keys: Sequence[str],
        views: Sequence[View],
        background: Bool[Tensor, "B C"] | None = None,
    ) -> CellStore:
        """Fill every cell that the views read: one forward pass per timestep, with all noise draws in one batch.

        latents: scaled, of B images. keys: the samples' keys, which seed the noise.
        """
        cells = CellStore()
        for level in sorted({t for view in views for t in view.timesteps}):
            asked = [view for view in views if level in view.timesteps]
            draws = max(view.draws for view in asked)
            stream = self.concept_stream(concepts.repeated(draws), asked, level, draws, cells, background)
            noisy, t = self.noised(latents, level, keys, draws)
            self.backbone.denoise(noisy, t, prompts.repeated(draws), stream, self.guidance)
        return cells

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
        """The stream of one forward pass, which puts every cell of this level that the views read into the store."""
        wanted = kinds_by_layer(asked)
        always = None if background is None else background.to(concepts.tokens.device).repeat_interleave(draws, 0)

        def score(layer: int, found: StreamActivations) -> None:
            vectors: dict[tuple[str, Normalize], tuple[Tensor, Tensor]] = {}
            for kind in wanted.get(layer, ()):
                name = (kind.space, kind.normalize)
                if name not in vectors:
                    vectors[name] = _vectors(found, kind, concepts)
                scores = cell_scores(*vectors[name], kind, always, standardized=kind.space in STANDARDIZED)
                for draw in range(draws):  # copies of an image stand side by side
                    cells.put(kind, layer, level, draw, scores[draw::draws])

        return ConceptStream(
            concepts.tokens, self.backbone.concept_pooled(len(concepts.tokens)), score, last_layer=max(wanted),
            cross_attention=self.cross_attention, self_attention=self.self_attention, present=concepts.present, **options,
        )  # fmt: skip

    # ------------------------------------------------------------ maps while an image is made

    def generate(
        self,
        captions: Sequence[str],
        concepts: Sequence[Sequence[str]],
        views: Sequence[View],
        steps: int = 4,
        size: tuple[int, int] | None = None,
        guidance: float = 0.0,
        negative: str = "",
        read_steps: Sequence[int] | None = None,
    ) -> tuple[Float[Tensor, "B *f 3 H W"], list[SaliencyMaps]]:
        """Make one image (or video) per caption and read each view on the way, over all steps or those in `read_steps`.

        A view's own timesteps are replaced by the levels of the steps that are read. Image b starts from noise of seed + b, on
        the CPU in float32. guidance: the input of a guidance-distilled model, or, in families with classifier-free guidance, its
        strength (on above 1; concepts accompany the conditional half). Raises ConfigError for a size that tokens do not tile.
        Source: Helbling et al. 2025, arXiv:2502.04320, section 4; helblazer811/ConceptAttention at db30c4d,
        concept_attention/flux/pipeline.py.
        """
        backbone, cells = self.backbone, CellStore()
        prompts, tokens = backbone.generation_prompts(captions), backbone.concepts(concepts)
        halves = guidance > 1 and backbone.classifier_free
        both = prompts.after(backbone.generation_prompts([negative] * len(captions))) if halves else prompts
        shape = backbone.latent_shape(*(size or backbone.size))
        generators = [torch.Generator().manual_seed(self.seed + b) for b in range(len(captions))]
        x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(backbone.device)
        grid = backbone.grid(x)
        levels = backbone.levels(steps, prod(grid))
        read = range(steps) if read_steps is None else sorted({range(steps)[k] for k in read_steps})
        asked = [replace(view, timesteps=tuple(levels[k] for k in read), draws=1) for view in views]
        rows = slice(len(captions), None) if halves else slice(None)
        for step, level in enumerate(levels[:-1]):
            stream = self.concept_stream(tokens, asked, level, 1, cells, rows=rows, stop=False) if step in read else None
            answer = backbone.denoise(torch.cat([x, x]) if halves else x, level, both, stream, guidance)
            assert answer is not None
            if halves:
                without, with_caption = answer.float().chunk(2)
                answer = backbone.guided(without, with_caption, guidance)
            x = backbone.stepped(x, backbone.as_latents(answer.float(), grid), levels, step, generators)
        maps = [SaliencyMaps(view.key, cells.read(view, grid), self.comparable) for view in asked]
        return backbone.images(x), maps

    # ------------------------------------------------------------ for people

    @property
    def reads_caption(self) -> bool:
        """The caption is the prompt."""
        return True

    def _scores(
        self, pictures: Sequence[np.ndarray], concepts: Concepts, caption: str, size: tuple[int, int] | None, view: View
    ) -> Float[Tensor, "B C *f h w"]:
        if not any(picture.ndim == 4 for picture in pictures):
            return super()._scores(pictures, concepts, caption, size, view)
        if len(self.backbone.grid(torch.zeros(1, *self.backbone.latent_shape(*self.backbone.size)))) != 3:
            return super()._scores(pictures, concepts, caption, size, view)  # which says that it reads single images
        if self.posterior == "sample":
            raise ConfigError("explain: posterior=sample is drawn for still images only. Set posterior=mode to read frames.")
        assert size is not None
        found = []
        for frames in pictures:
            stacked = stack_images([frame.astype(np.float32) / 255 for frame in frames], size, self.backbone.resize)
            prompts, tokens = self.backbone.prompts([caption]), self.backbone.concepts([concepts.names])
            latents = self.backbone.latents(rearrange(stacked, "F c H W -> 1 c F H W"))
            cells = self.read_cells(latents, prompts, tokens, ["explained"], [view])
            found.append(cells.read(view, self.backbone.grid(latents))[0])
        return torch.stack(found)

    def _explained_prompt(
        self,
        prompt: str,
        names: tuple[str, ...],
        competing: tuple[str, ...],
        size: Any,
        steps: Any,
        guidance: Any,
        view: View,
        notes: Sequence[str],
    ) -> Explanation:
        steps = whole_number("explain: steps", 4 if steps is None else steps, 1, 100_000)
        guidance = real_number("explain: guidance", 0.0 if guidance is None else guidance, 0)
        shown = None if size is None else checked_size(size)
        if shown is not None:
            self.backbone.check_size(*shown)
        images, (maps,) = self.generate([prompt], [[*names, *competing]], [view], steps, shown, guidance)
        if not bool(images.isfinite().all()):
            raise DataError("the image that was made holds NaN or infinity. Try dtype=float32 or bfloat16.")
        scores = maps.scores[0].float().cpu()
        notes = (*notes, *remarks_on([*names, *competing], scores))
        about = {**self._about(view, prompt=prompt, steps=steps, guidance=guidance), "view": maps.view}
        others = scores[len(names) :] if competing else None
        return Explanation(names, scores[: len(names)], as_pixels(images[0]), about, None, self.comparable, tuple(notes), others)

    # ------------------------------------------------------------ noise

    def noised(
        self, latents: Float[Tensor, "B *c H W"], level: float, keys: Sequence[str], draws: int
    ) -> tuple[Float[Tensor, "R *c H W"], float]:
        """Return t · noise + (1 - t) · latents for every image and draw (R = B·N, draws fastest), and the model's t in 0..1."""
        if self.noise == "per_sample":
            noise = torch.stack([sample_noise(latents.shape[1:], self.seed, keys, d) for d in range(draws)], dim=1).to(latents)
            return rearrange(self.backbone.mix(noise, latents[:, None], level), "B N ... -> (B N) ..."), level
        dtype = torch.bfloat16 if self.backbone.dtype == torch.float32 else self.backbone.dtype
        noise = torch.stack(
            [shared_noise(latents.shape[1:], self.seed, d, self.backbone.device, dtype) for d in range(draws)], dim=1
        )
        mixed = self.backbone.mix(noise, latents[:, None].to(dtype), level)
        return rearrange(mixed, "B N ... -> (B N) ..."), float(torch.tensor(level, dtype=dtype))


def _vectors(found: StreamActivations, kind: CellKind, concepts: ConceptTokens) -> tuple[Tensor, Tensor]:
    """Vectors of words and of image tokens in one space, the words' in float32 and normalised."""
    token_vectors, image_vectors = SPACES[kind.space][1](found)
    concept_vectors = concepts.by_word(token_vectors.float())
    if kind.normalize is Normalize.LINEAR:
        concept_vectors = linear_over_concepts(concept_vectors)
    elif kind.normalize is Normalize.UNIT:
        concept_vectors = unit_length(concept_vectors)
    return concept_vectors, image_vectors
