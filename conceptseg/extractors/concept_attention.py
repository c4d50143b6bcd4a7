"""ConceptAttention on multi-modal diffusion transformers (Helbling et al. 2025, arXiv:2502.04320).

Concept tokens travel beside the text of a stock transformer; a concept's map is the dot product of its attention output
with the image tokens' attention outputs. The published rows add, per layer and noise draw, a linear normalisation over
concepts and a softmax over concepts, then take the mean. Every switch is a view setting (what is read off) or an argument
below (what is run).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from conceptseg.backbones.base import GREATEST_SIDE, sample_noise, sample_seed, shared_noise, stack_images
from conceptseg.backbones.sheets import backbone_of
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptStream, ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError, DataError, one_of, real_number, whole_number
from conceptseg.extractors.base import Extractor
from conceptseg.extractors.explanation import Explanation, as_pixels, checked_maps, read_pixels
from conceptseg.saliency.cells import CellStore, background_words, cell_scores, kinds_by_layer
from conceptseg.saliency.normalize import linear_over_concepts, unit_length
from conceptseg.saliency.views import Axes, CellKind, Normalize, Softmax, View, expand_views
from conceptseg.types import Batch, SaliencyMaps, Task, check_distinct, checked_word


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
                scores = cell_scores(*vectors[name], kind, always)
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

    @classmethod
    def from_pretrained(cls, path: str, revision: str | None = None, device: str = "cpu", **settings: Any) -> ConceptAttention:
        """ConceptAttention on a hub repository, a folder, "lab:<name>", or a sheet of conf/backbone.

        settings: of the backbone or of this class. Repositories that conf/backbone knows need no revision. No weights are read.
        """
        own = {k: settings.pop(k) for k in list(settings) if k in signature(cls).parameters}
        return cls(backbone_of(path, revision, device, **settings), **own)

    def explain(
        self,
        image_or_prompt: Image.Image | np.ndarray | Path | str,
        concepts: Sequence[Any],
        caption: str | None = None,
        size: Any = None,
        steps: int = 4,
        guidance: float = 0.0,
        **view: Any,
    ) -> Explanation:
        """Map each concept in an image, or in the image that the model makes of a prompt.

        image_or_prompt: a PIL image, RGB array ([H W 3], uint8, or float in 0..1) or Path to read; for a video model also frames
        [F H W 3], whose maps are [C f h w]; a string is a prompt.
        caption: describes a real image; by default "a x and a y" of the concepts. size: (height, width) of the model's input;
        by default the image's own proportions at the area of the backbone's image size. steps, guidance: for prompts.
        view: settings of the view: space, layers, timesteps, draws, normalize, softmax, fold, blur; by default the paper's:
        output space, upper half of the layers, t = 0.5 (prompts: all steps), softmax over concepts (none for a single concept).
        Raises ConfigError or ViewError for a setting, before the model runs; DataError for an image or word that can't be
        explained, and for maps that hold NaN or are the same number everywhere.
        """
        names = _checked_concepts(concepts)
        softmax = "per_cell" if len(names) > 1 else "none"
        chosen = {"space": "output", "layers": "last half", "timesteps": [0.5], "softmax": softmax, **view}
        views = list(expand_views({"view": chosen}, self.axes()).values())
        if len(views) != 1:
            raise ConfigError(f"explain: {len(views)} views are selected, one is wanted; name one space, and leave out each.")
        (one,) = views
        if len(names) == 1 and (
            one.softmax in (Softmax.PER_CELL, Softmax.OF_MEAN, Softmax.SHAPLEY) or one.normalize is Normalize.LINEAR
        ):
            raise ConfigError(
                f'explain: "{names[0]}" is the only concept, and softmax={one.softmax}, normalize={one.normalize} compare '
                f"concepts: its map would be the same everywhere. Name a second one, or set softmax=none and normalize=none."
            )
        size = None if size is None else self._checked_size(size)
        steps = whole_number("explain: steps", steps, 1, 100_000)
        guidance = real_number("explain: guidance", guidance, 0)
        about = {"backbone": self.backbone.identity(), "provenance": self.provenance}
        if isinstance(image_or_prompt, str):
            images, (maps,) = self.generate([image_or_prompt], [names], [one], steps, size, guidance)
            if not bool(images.isfinite().all()):
                raise DataError("the image that was made holds NaN or infinity. Try dtype=float32 or bfloat16.")
            return Explanation(
                names,
                checked_maps(names, maps.scores[0]),
                as_pixels(images[0]),
                {**about, "prompt": image_or_prompt, "view": maps.view},
            )
        image = read_pixels(image_or_prompt)
        size = size or self.backbone.fitting_size(image.shape[-3], image.shape[-2])
        frames = list(image) if image.ndim == 4 else [image]
        shown = stack_images([frame.astype(np.float32) / 255 for frame in frames], size, self.backbone.resize)
        if image.ndim == 4:
            shown = rearrange(shown, "F c H W -> 1 c F H W")
        said = " and ".join(f"a {name}" for name in names) if caption is None else caption
        prompts, tokens = self.backbone.prompts([said]), self.backbone.concepts([names])
        latents = self.backbone.latents(shown)
        found = self.read_cells(latents, prompts, tokens, ["explained"], [one]).read(one, self.backbone.grid(latents))[0]
        return Explanation(names, checked_maps(names, found), image, {**about, "caption": said, "view": one.key})

    def _checked_size(self, size: Any) -> tuple[int, int]:
        """Raises ConfigError for what is no (height, width) that the model can be shown."""
        if isinstance(size, str) or not isinstance(size, Sequence) or len(size) != 2:
            raise ConfigError(f"explain: size is {size!r}; wanted [height, width] in pixels, such as [512, 768].")
        height, width = (whole_number("explain: size", side, 1, GREATEST_SIDE) for side in size)
        self.backbone.check_size(height, width)
        return height, width

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


def _checked_concepts(concepts: Sequence[Any]) -> tuple[str, ...]:
    """Raises ConfigError for what is no list of words, and for a word that is empty or given twice."""
    if isinstance(concepts, str) or not isinstance(concepts, Sequence) or not concepts:
        raise ConfigError(f"explain: wanted a list of concepts, such as ['dragon', 'rock'], but got {concepts!r}.")
    names = tuple(checked_word(word, f"concepts.{k}") for k, word in enumerate(concepts))
    check_distinct(names, "concepts", ConfigError)
    return names


def _vectors(found: StreamActivations, kind: CellKind, concepts: ConceptTokens) -> tuple[Tensor, Tensor]:
    """Vectors of words and of image tokens in one space, the words' in float32 and normalised."""
    token_vectors, image_vectors = SPACES[kind.space][1](found)
    concept_vectors = concepts.by_word(token_vectors.float())
    if kind.normalize is Normalize.LINEAR:
        concept_vectors = linear_over_concepts(concept_vectors)
    elif kind.normalize is Normalize.UNIT:
        concept_vectors = unit_length(concept_vectors)
    return concept_vectors, image_vectors
