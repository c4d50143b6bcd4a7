"""Base class of methods that read a diffusion U-Net's cross-attention on real images: noising, forward passes, folding.

A method defines the U-Net's prompts (`asked`) and how maps are read from a layer's attention (`reader`); see `daam` and `ovam`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from conceptseg.backbones.base import sample_noise, sample_seed, shared_noise, stack_images
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.backbones.sheets import UNET
from conceptseg.backbones.unets.attention_maps import (
    UPSAMPLINGS,
    Attended,
    CrossAttention,
    CrossAttentionTap,
    UNetTap,
    grid_factor,
    kept_heads,
    map_size,
)
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.backbones.word_tokens import PlacedText
from conceptseg.errors import ConfigError, ViewError, one_of
from conceptseg.extractors.base import Extractor
from conceptseg.saliency.cells import Layers, background_words, softmax_of_cell, softmax_of_fold
from conceptseg.saliency.normalize import gaussian_blur
from conceptseg.saliency.views import IN_CELLS, Axes, Fold, View
from conceptseg.types import Batch, SaliencyMaps, Task

NORMALIZE_FLOOR = 1e-6  # of the reference's normalize


@dataclass(frozen=True, slots=True)
class Asked:
    """One encoded prompt: its text, the words (None: no map is needed), and the text in which they are looked up."""

    prompt: str
    words: tuple[str | None, ...]
    looked_up: PlacedText

    @property
    def indexed(self) -> str:
        """The text in which words are looked up."""
        return self.looked_up.text


@dataclass(frozen=True, slots=True)
class Kind:
    """Which maps a view reads: of attention probabilities or of logits, and of all heads or of one."""

    softmax: bool = True
    head: int | None = None


@runtime_checkable
class Reader(Protocol):
    """Reads S maps per row from a layer's attention: those of the words, and last the sum over the prompt's tokens."""

    def repeated(self, times: int) -> Reader:
        """For the same rows, over and over."""

    def maps(
        self, attended: Attended, heads: slice, size: tuple[int, int], how: str, softmax: bool
    ) -> Float[Tensor, "R a S X Y"]:
        """Return maps of S words for some heads at the size (X, Y)."""


@dataclass(frozen=True, slots=True)
class LayerSum:
    """Maps of one layer summed over heads, [R S X Y], how many were summed, and the layer's grid."""

    maps: Float[Tensor, "R S X Y"]
    pairs: int
    grid: tuple[int, int]


LayerSums = dict[tuple[Layers, Kind, float], LayerSum]
"""By layer (or layers that yield one sum together), kind and noise level."""
SELF = Kind(head=-1)
"""Kind of what is read of the image's self-attention."""


def check_template(template: str, key: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a template that names what is not known, or formats it."""
    try:
        slots = [(field, spec, conversion) for _, field, spec, conversion in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigError(
            f'extractor.{key} "{template}" can\'t be filled in: {error}. It may name: {", ".join(known)}.'
        ) from error
    for field, spec, conversion in slots:
        if field not in known or spec or conversion:
            raise ConfigError(
                f'extractor.{key} "{template}" can\'t be filled in: "{field}". It may name: {", ".join(known)}, each in braces '
                f"and without a format."
            )


class UNetMaps(Extractor):
    """Reads real images noised to a level t, in as many forward passes as there are timesteps.

    cfg_rows, exclude_factor, include_mid, upsampling, map_side: see `daam.DAAM`; noise, posterior, seed: as in ConceptAttention.
    """

    told = "name and prompt"
    trained_on = "images and captions"
    family = UNET

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        cfg_rows: str,
        exclude_factor: int | None,
        include_mid: bool,
        upsampling: str,
        map_side: int | None,
        noise: str,
        posterior: str,
        seed: int,
    ) -> None:
        one_of("extractor.upsampling", upsampling, UPSAMPLINGS)
        one_of("extractor.noise", noise, ("per_sample", "shared"))
        one_of("extractor.posterior", posterior, ("mode", "sample"))
        self.backbone, self.cfg_rows = backbone_from(backbone), cfg_rows
        if not isinstance(self.backbone, UNetBackbone):
            raise ConfigError(
                f"extractor.backbone is a {type(self.backbone).__name__}, and {type(self).__name__} reads a diffusion U-Net. "
                f"Choose one of its sheets, such as backbone@extractor.backbone=lab_sd."
            )
        self.exclude_factor, self.include_mid = exclude_factor, include_mid
        self.upsampling, self.map_side = upsampling, map_side
        self.noise, self.posterior, self.seed = noise, posterior, seed

    @abstractmethod
    def asked(self, task: Task) -> list[Asked]:
        """The prompts that one task is turned into, as many for every task of a batch."""

    @abstractmethod
    def reader(self, asked: Sequence[Asked], totals: bool) -> Reader:
        """Reads the maps of each row; with `totals`, the last one is the sum over the prompt's tokens, else it is empty."""

    @abstractmethod
    def kind(self, space: str) -> Kind:
        """Which maps a space is made of."""

    @abstractmethod
    def spaces(self, most_heads: int) -> tuple[str, ...]:
        """Names of the spaces on offer, for a U-Net with layers of up to so many heads."""

    def finish(self, maps: Float[Tensor, "B C X Y"], batch: Batch) -> Float[Tensor, "B C X Y"]:
        """Apply the last step to the maps of a view."""
        return maps

    def strings(self, asked: Asked) -> set[str]:
        """Every text that is encoded for one prompt."""
        return {asked.prompt}

    def texts(self, batch: Batch) -> set[str]:
        """Every text that is encoded for a batch."""
        return {text for task in batch.tasks for one in self.asked(task) for text in self.strings(one)}

    def further_taps(
        self, layers: Sequence[CrossAttention], views: Sequence[View], level: float, size: tuple[int, int], sums: LayerSums
    ) -> list[UNetTap]:
        """Return further taps of a method for a forward pass of these views. They may add maps of their own to `sums`."""
        return []

    def refine(self, maps: Float[Tensor, "R S X Y"], view: View, level: float, sums: LayerSums) -> Float[Tensor, "R S x y"]:
        """Apply what a method does to the maps of a view at one noise level, before words compete; by default nothing."""
        return maps

    @property
    def layers(self) -> list[CrossAttention]:
        """Layers on offer."""
        return [one for one in self.backbone.layers if self.include_mid or not one.path.startswith("mid")]

    def axes(self) -> Axes:
        most = max(len(kept_heads(layer.heads, self.cfg_rows)) for layer in self.layers)
        indices = tuple(one.index for one in self.layers)
        return Axes(spaces=self.spaces(most), layers=indices, has_timesteps=True, has_vectors=False)

    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        asked = [self.asked(task) for task in batch.tasks]
        sums = self.read_layers(batch, asked, views)
        for view in views:
            maps = self.fold(sums, view, len(batch), len(asked[0]), background_words(batch))
            yield SaliencyMaps(view.key, self.finish(maps, batch), self.comparable)

    # ------------------------------------------------------------ forward passes

    def read_layers(self, batch: Batch, asked: Sequence[Sequence[Asked]], views: Sequence[View]) -> LayerSums:
        """One forward pass for every noise level, with draws and prompts side by side; rows are (image, draw, prompt)."""
        backbone, sums = self.backbone, LayerSums()
        images = stack_images([task.image for task in batch.tasks], backbone.size, backbone.resize, backbone.device)
        totals = any(view.space == "words_normalized" for view in views)
        for level in sorted({t for view in views for t in view.timesteps}):
            now = [view for view in views if level in view.timesteps]
            draws = max(view.draws for view in now)
            clean = torch.stack([self.clean_latents(images, batch.keys, draw) for draw in range(draws)], dim=1)
            noise = torch.stack([self.draw_noise(clean.shape[2:], batch.keys, draw) for draw in range(draws)], dim=1)
            step = backbone.step_of(level)
            noisy = backbone.noised(clean, noise.to(clean).expand_as(clean), step)
            rows = [one for prompts in asked for _ in range(draws) for one in prompts]
            reader = self.reader(rows, totals)
            self.read_level(
                sums, level, step, repeat(noisy, "B n c h w -> (B n G) c h w", G=len(asked[0])), [one.prompt for one in rows],
                reader, now,
            )  # fmt: skip
        return sums

    def clean_latents(self, images: Float[Tensor, "B 3 H W"], keys: Sequence[str], draw: int) -> Float[Tensor, "B c h w"]:
        """Return the clean latents of one draw for images in 0..1."""
        if self.posterior == "mode":
            return self.backbone.latents(images)
        seeds = [sample_seed(self.seed, key, "posterior", draw) for key in keys]
        return self.backbone.latents(images, [torch.Generator().manual_seed(seed) for seed in seeds])

    def draw_noise(self, shape: Sequence[int], keys: Sequence[str], draw: int) -> Float[Tensor, "_ c h w"]:
        """Return the noise of one draw: one per image, or one for all."""
        if self.noise == "per_sample":
            return sample_noise(shape, self.seed, keys, draw)
        return shared_noise(shape, self.seed, draw, self.backbone.device, self.backbone.dtype).float()

    def read_level(
        self,
        sums: LayerSums,
        level: float,
        step: int,
        noisy: Float[Tensor, "R c h w"],
        prompts: Sequence[str],
        reader: Reader,
        views: Sequence[View],
    ) -> None:
        """Run one forward pass and add the maps that the views need of every layer to `sums`."""
        backbone, rows = self.backbone, len(noisy)
        pixels = noisy.shape[-2] * backbone.pixels_per_latent, noisy.shape[-1] * backbone.pixels_per_latent
        text, conditions = backbone.text(prompts), backbone.conditions(prompts, pixels)
        if self.cfg_rows == "all":
            empty = backbone.unconditional(rows, pixels)
            text = torch.cat([empty[0], text])
            if conditions is not None and empty[1] is not None:
                conditions = {name: torch.cat([empty[1][name], value]) for name, value in conditions.items()}
            noisy, reader = noisy.repeat(2, 1, 1, 1), reader.repeated(2)
        size = map_size((noisy.shape[-2], noisy.shape[-1]), self.map_side or backbone.map_side)
        wanted = {
            layer: {self.kind(view.space) for view in views if layer in view.layers} for view in views for layer in view.layers
        }
        passes = 2 if self.cfg_rows == "all" else 1

        def on_layer(attended: Attended) -> None:
            layer = attended.layer
            if grid_factor(size, attended.queries.shape[2]) == self.exclude_factor:
                return
            heads = kept_heads(layer.heads, self.cfg_rows)
            for softmax in sorted({kind.softmax for kind in wanted[layer.index]}):
                total = torch.zeros(())
                for chunk in attended.head_chunks(heads, len(noisy)):
                    maps = reader.maps(attended, chunk, size, self.upsampling, softmax)
                    maps = rearrange(maps, "(p R) a S X Y -> R p a S X Y", p=passes)
                    total = total.to(maps) + maps.sum((1, 2))
                    for number in range(maps.shape[2]):
                        kind = Kind(softmax, chunk.start - heads.start + number)
                        if kind in wanted[layer.index]:
                            sums[layer.index, kind, level] = LayerSum(maps[:, :, number].sum(1), passes, attended.grid)
                sums[layer.index, Kind(softmax), level] = LayerSum(total, passes * len(heads), attended.grid)

        layers = [layer for layer in backbone.layers if layer.index in wanted]
        further = self.further_taps(layers, views, level, size, sums)
        backbone.denoise(noisy, step, text, conditions, *further, CrossAttentionTap(layers, on_layer, stop=True))

    # ------------------------------------------------------------ reading views

    def fold(
        self, sums: LayerSums, view: View, images: int, prompts: int, background: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C X Y"]:
        """Fold one view: layers and heads by their mean, then timesteps and draws by the view's fold.

        Softmax "per_cell" is taken in every layer, timestep and draw (heads averaged), "of_mean" and "shapley" after all folding.
        background: True for background words, which "shapley" treats apart; None for none.
        Raises ViewError if the view's layers hold nothing.
        """
        folded: list[Float[Tensor, "B n C X Y"]] = []
        for level in view.timesteps:
            keys = [(layer, self.kind(view.space), level) for layer in view.layers]
            found = [sums[key] for key in keys if key in sums]
            if not found:
                raise ViewError(
                    f'view "{view.key}": its layers have no maps here. Either their grid is narrower than the map by the factor '
                    f"that extractor.exclude_factor leaves out (now {self.exclude_factor}), or they have no such head."
                )
            weighted = list(zip(found, self._weights(found, view.space), strict=True))
            units = [[pair] for pair in weighted] if view.softmax in IN_CELLS else [weighted]
            parts = []
            for unit in units:
                share = sum(one.pairs * weight for one, weight in unit)
                mean = torch.stack([one.maps * (weight / share) for one, weight in unit]).sum(0)
                parts.append(_cell(self.refine(mean, view, level, sums), view, images, prompts, background) * share)
            whole = torch.stack(parts).sum(0)
            folded.append(whole[:, : view.draws])
        stacked = torch.cat(folded, dim=1)
        maps = stacked.sum(1) if view.fold is Fold.SUM else stacked.mean(1)
        maps = softmax_of_fold(maps.flatten(-2), view, background).unflatten(-1, maps.shape[-2:])
        return gaussian_blur(maps, view.blur) if view.blur else maps

    @staticmethod
    def _weights(found: Sequence[LayerSum], space: str) -> list[float]:
        """Weight of every single (layer, head) map; weights of all maps sum to 1."""
        if space != "words_by_grid":
            return [1 / sum(one.pairs for one in found)] * len(found)
        grids = {one.grid: sum(other.pairs for other in found if other.grid == one.grid) for one in found}
        return [1 / (grids[one.grid] * len(grids)) for one in found]


def _cell(
    mean: Float[Tensor, "R S X Y"], view: View, images: int, prompts: int, background: Bool[Tensor, "B C"] | None
) -> Float[Tensor, "B n C X Y"]:
    """Maps of all words of an image, which lie in one row or in several. The last map of a row is the sum over its tokens."""
    maps, total = mean[:, :-1], mean[:, -1:]
    if view.space == "words_normalized":
        maps = maps / (total + NORMALIZE_FLOOR)
    elif view.space == "words_standardized":
        spread = maps.std((-2, -1), correction=0, keepdim=True)
        maps = (maps - maps.mean((-2, -1), keepdim=True)) / spread.clamp_min(torch.finfo(maps.dtype).tiny)
    maps = rearrange(maps, "(B n G) S X Y -> B n (G S) X Y", B=images, G=prompts)
    return softmax_of_cell(maps.flatten(-2), view.cell, background).view_as(maps)
