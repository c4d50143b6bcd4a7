"""DAAM on real images: cross-attention of a diffusion U-Net to the words of a prompt (Tang et al. 2023, arXiv:2210.04885).

An image is noised to a level t and goes through a stock U-Net once. A word's map is the attention that pixels pay to the word's
tokens, every (layer, head) map brought to one size (bicubic, cut at 0) and averaged. Generated images: see `conceptseg.trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from conceptseg.backbones.base import sample_noise, sample_seed, shared_noise, stack_images
from conceptseg.backbones.cross_attention import (
    CFG_ROWS,
    UPSAMPLINGS,
    Attended,
    CrossAttentionTap,
    grid_factor,
    kept_heads,
    map_size,
    upsample,
)  # fmt: skip
from conceptseg.backbones.unet import UNetBackbone
from conceptseg.backbones.word_tokens import POSITION_RULES, positions_of, prompt_length
from conceptseg.errors import ConfigError, DataError, ViewError, did_you_mean
from conceptseg.extractors.base import Extractor, Provenance
from conceptseg.saliency.normalize import gaussian_blur, softmax_over_concepts, softmax_over_tokens
from conceptseg.saliency.views import Axes, Fold, Softmax, View
from conceptseg.types import BACKGROUND, Batch, Concepts, SaliencyMaps, Task

SPACES = {
    "words": "mean over all (layer, head) maps of the mean over a word's tokens: the method",
    "words_by_grid": "the same, every grid size with one weight however many layers and heads it has",
    "words_normalized": "words over the sum of the maps of all tokens of the prompt (the reference's normalize)",
    "words_standardized": "each word's map less its own mean, over its own deviation, so that a word's share of mass is no prior",
}
NORMALIZE_FLOOR = 1e-6  # of the reference's normalize


@dataclass(frozen=True, slots=True)
class Asked:
    """One encoded prompt: its text, the text in which words are looked up, and the words (None: no map is asked for)."""

    prompt: str
    indexed: str
    words: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class TokenShares:
    """What is read off each row's attention: token positions [R K], and what share each has in each of S maps, [R S K]."""

    positions: Int[Tensor, "R K"]
    shares: Float[Tensor, "R S K"]

    def repeated(self, times: int) -> TokenShares:
        """The same rows, over and over."""
        return TokenShares(self.positions.repeat(times, 1), self.shares.repeat(times, 1, 1))

    def maps(self, attended: Attended, heads: slice, size: tuple[int, int], how: str) -> Float[Tensor, "R a S X Y"]:
        """Maps of some heads at the common size. Tokens are enlarged one by one: the cut at 0 does not commute with means."""
        probabilities = attended.probabilities(slice(None), heads)
        at = repeat(self.positions, "R K -> R a N K", a=probabilities.shape[1], N=probabilities.shape[2])
        tokens = rearrange(probabilities.gather(-1, at), "R a (h w) K -> R a K h w", h=attended.grid[0])
        return torch.einsum("rsk,rakxy->rasxy", self.shares, upsample(tokens, size, how))


@dataclass(frozen=True, slots=True)
class LayerSum:
    """Maps of one layer summed over heads, [R S X Y], how many were summed, and the layer's grid."""

    maps: Float[Tensor, "R S X Y"]
    pairs: int
    grid: tuple[int, int]


LayerSums = dict[tuple[int, int | None, float], LayerSum]
"""By layer, head (None: all) and noise level."""


class DAAM(Extractor):
    """Reads real images noised to a level t, in as many forward passes as there are timesteps.

    prompt: what is encoded, with {caption} and {concepts}; concept, join: how the words become {concepts}.
    encode: "joint" puts all words into one prompt, "separate" gives every word its own.
    background: "prompt" asks for background words like any other; "complement" leaves them out of the prompt, scales each class
        word's map to 0..1, and gives all background words what is left of the greatest.
    indexed_prompt: the text in which words are looked up, where it is not the encoded one (a defect of the released SD2 rows).
    token_match: "exact" finds words by their characters, "reference" by pieces of tokens.
    cfg_rows: "conditional"; "all" adds the maps of the unconditional pass (first release); "legacy_half_of_heads" drops the
        first half of every layer's heads, as the reference does without guidance.
    exclude_factor: grids this many times narrower than the map are left out, none if null; include_mid: offer the mid block.
    upsampling: "bicubic_clamped" (the reference) or "bilinear". map_side: null is the reference's rule (64, or 96 for 768 px).
    noise, posterior, seed: as in ConceptAttention.
    """

    version = 1
    told = "name and prompt"
    trained_on = "images and captions"

    def __init__(
        self,
        backbone: UNetBackbone,
        prompt: str = "{concepts}",
        concept: str = "a {concept}",
        join: str = ", ",
        encode: str = "joint",
        background: str = "prompt",
        indexed_prompt: str | None = None,
        token_match: str = "exact",
        cfg_rows: str = "conditional",
        exclude_factor: int | None = 8,
        include_mid: bool = False,
        upsampling: str = "bicubic_clamped",
        map_side: int | None = None,
        noise: str = "per_sample",
        posterior: str = "mode",
        seed: int = 0,
    ) -> None:
        for value, key, choices in (
            (encode, "encode", ("joint", "separate")), (background, "background", ("prompt", "complement")),
            (token_match, "token_match", tuple(POSITION_RULES)), (cfg_rows, "cfg_rows", CFG_ROWS),
            (upsampling, "upsampling", UPSAMPLINGS), (noise, "noise", ("per_sample", "shared")),
            (posterior, "posterior", ("mode", "sample")),
        ):  # fmt: skip
            if value not in choices:
                raise ConfigError(f'extractor.{key}: unknown "{value}". {did_you_mean(value, choices)}')
        if encode == "separate" and background == "complement":
            raise ConfigError('extractor.background "complement" asks for class words only, in one prompt: use encode=joint.')
        for template, key, known in ((prompt, "prompt", "caption, concepts"), (concept, "concept", "concept")):
            try:
                template.format(caption="", concepts="", concept="")
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(f'extractor.{key} "{template}" can\'t be filled in: {error}. It may name: {known}.') from error
        self.backbone = backbone
        self.prompt, self.concept, self.join, self.encode, self.background = prompt, concept, join, encode, background
        self.indexed_prompt, self.token_match = indexed_prompt, token_match
        self.cfg_rows, self.exclude_factor, self.include_mid = cfg_rows, exclude_factor, include_mid
        self.upsampling, self.map_side = upsampling, map_side
        self.noise, self.posterior, self.seed = noise, posterior, seed

    def axes(self) -> Axes:
        layers = [one for one in self.backbone.layers if self.include_mid or not one.path.startswith("mid")]
        most = max(len(kept_heads(layer.heads, self.cfg_rows)) for layer in layers)
        heads = tuple(f"head_{number}" for number in range(most))
        return Axes(spaces=(*SPACES, *heads), layers=tuple(one.index for one in layers), has_timesteps=True, has_vectors=False)

    @property
    def provenance(self) -> Provenance:
        return self.backbone.provenance

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "backbone": self.backbone.identity()}

    def stream(self, batch: Batch, views: Sequence[View]) -> Iterator[SaliencyMaps]:
        asked = [self.asked(task) for task in batch.tasks]
        sums = self.read_layers(batch, asked, views)
        for view in views:
            maps = self.fold(sums, view, len(batch), len(asked[0]))
            if self.background == "complement":
                maps = _with_complement(maps, batch.concepts)
            yield SaliencyMaps(view.key, maps, self.comparable)

    # ------------------------------------------------------------ what the model is told

    def asked(self, task: Task) -> list[Asked]:
        """The prompts that one task is turned into: one, or one for every word."""
        words: list[str | None] = [
            None if self.background == "complement" and label == BACKGROUND else name
            for name, label in zip(task.concepts.names, task.concepts.labels, strict=True)
        ]
        groups = [words] if self.encode == "joint" else [[word] for word in words]
        found = []
        for group in groups:
            listed = self.join.join(self.concept.format(concept=word) for word in group if word is not None)
            prompt = self.prompt.format(caption=task.caption, concepts=listed)
            indexed = prompt
            if self.indexed_prompt is not None:
                indexed = self.indexed_prompt.format(caption=task.caption, concepts=listed)
            found.append(Asked(prompt, indexed, tuple(group)))
        return found

    def texts(self, batch: Batch) -> set[str]:
        """Every text that is encoded for a batch."""
        return {one.prompt for task in batch.tasks for one in self.asked(task)}

    def token_shares(self, asked: Sequence[Asked], totals: bool) -> TokenShares:
        """Where each row's words are, and as the last map the sum over the prompt's tokens (left empty unless `totals`)."""
        tokenizer, length = self.backbone.tokenizer, self.backbone.text_length
        found: list[tuple[list[int], list[tuple[int, ...]]]] = []
        for one in asked:
            said = iter(positions_of(self.token_match, tokenizer, one.indexed, [w for w in one.words if w is not None]))
            maps = [() if word is None else next(said) for word in one.words]
            maps.append(tuple(range(1, prompt_length(tokenizer, one.indexed) + 1)) if totals else ())
            tokens = sorted({position for places in maps for position in places})
            if tokens and tokens[-1] >= length:
                raise DataError(
                    f'the prompt "{one.indexed[:120]}" has words past token {length - 1}, the last that is encoded. Ask for '
                    f"fewer words, shorten extractor.prompt and extractor.concept, or use extractor.encode=separate."
                )
            found.append((tokens, maps))
        most = max(1, max(len(tokens) for tokens, _ in found))
        positions = torch.zeros(len(found), most, dtype=torch.long)
        shares = torch.zeros(len(found), len(found[0][1]), most)
        for row, (tokens, maps) in enumerate(found):
            positions[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            for number, places in enumerate(maps):
                at = [tokens.index(position) for position in places]
                shares[row, number, at] = 1.0 if number == len(maps) - 1 else 1 / max(1, len(at))
        return TokenShares(positions.to(self.backbone.device), shares.to(self.backbone.device))

    # ------------------------------------------------------------ forward passes

    def read_layers(self, batch: Batch, asked: Sequence[Sequence[Asked]], views: Sequence[View]) -> LayerSums:
        """One forward pass for every noise level, with draws and prompts side by side; rows are (image, draw, prompt)."""
        backbone, sums = self.backbone, LayerSums()
        images = stack_images([task.image for task in batch.tasks], backbone.size, backbone.resize)
        totals = any(view.space == "words_normalized" for view in views)
        for level in sorted({t for view in views for t in view.timesteps}):
            now = [view for view in views if level in view.timesteps]
            draws = max(view.draws for view in now)
            clean = torch.stack([self.clean_latents(images, batch.keys, draw) for draw in range(draws)], dim=1)
            noise = torch.stack([self.draw_noise(clean.shape[2:], batch.keys, draw) for draw in range(draws)], dim=1)
            step = backbone.step_of(level)
            noisy = backbone.noised(clean, noise.to(clean).expand_as(clean), step)
            rows = [one for prompts in asked for _ in range(draws) for one in prompts]
            shares = self.token_shares(rows, totals)
            self.read_level(
                sums, level, step, repeat(noisy, "B n c h w -> (B n G) c h w", G=len(asked[0])), [one.prompt for one in rows],
                shares, now,
            )  # fmt: skip
        return sums

    def clean_latents(self, images: Float[Tensor, "B 3 H W"], keys: Sequence[str], draw: int) -> Float[Tensor, "B c h w"]:
        """Latents of one draw."""
        if self.posterior == "mode":
            return self.backbone.latents(images)
        seeds = [sample_seed(self.seed, key, "posterior", draw) for key in keys]
        return self.backbone.latents(images, [torch.Generator().manual_seed(seed) for seed in seeds])

    def draw_noise(self, shape: Sequence[int], keys: Sequence[str], draw: int) -> Float[Tensor, "_ c h w"]:
        """Noise of one draw: for every image its own, or one for all."""
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
        shares: TokenShares,
        views: Sequence[View],
    ) -> None:
        """One forward pass: put what the views need of every layer into `sums`."""
        backbone, rows = self.backbone, len(noisy)
        pixels = noisy.shape[-2] * backbone.pixels_per_latent, noisy.shape[-1] * backbone.pixels_per_latent
        text, conditions = backbone.text(prompts), backbone.conditions(prompts, pixels)
        if self.cfg_rows == "all":
            empty = backbone.unconditional(rows, pixels)
            text = torch.cat([empty[0], text])
            if conditions is not None and empty[1] is not None:
                conditions = {name: torch.cat([empty[1][name], value]) for name, value in conditions.items()}
            noisy, shares = noisy.repeat(2, 1, 1, 1), shares.repeated(2)
        size = map_size((noisy.shape[-2], noisy.shape[-1]), self.map_side or backbone.map_side)
        wanted = {layer: {_head(view.space) for view in views if layer in view.layers} for view in views for layer in view.layers}

        def on_layer(attended: Attended) -> None:
            if grid_factor(size, attended.queries.shape[2]) == self.exclude_factor:
                return
            heads = kept_heads(attended.layer.heads, self.cfg_rows)
            total, asked = torch.zeros(()), wanted[attended.layer.index]
            for chunk in attended.head_chunks(heads, len(noisy)):
                maps = shares.maps(attended, chunk, size, self.upsampling)
                if self.cfg_rows == "all":
                    maps = rearrange(maps, "(two R) a S X Y -> R (two a) S X Y", two=2)
                total = total.to(maps) + maps.sum(1)
                for number in range(chunk.start - heads.start, chunk.stop - heads.start):
                    if number in asked:
                        alone = maps[:, number + heads.start - chunk.start :: chunk.stop - chunk.start]
                        sums[attended.layer.index, number, level] = LayerSum(alone.sum(1), alone.shape[1], attended.grid)
            pairs = len(heads) * (2 if self.cfg_rows == "all" else 1)
            sums[attended.layer.index, None, level] = LayerSum(total, pairs, attended.grid)

        layers = [layer for layer in backbone.layers if layer.index in wanted]
        backbone.denoise(noisy, step, text, conditions, CrossAttentionTap(layers, on_layer, stop=True))

    # ------------------------------------------------------------ reading views

    def fold(self, sums: LayerSums, view: View, images: int, prompts: int) -> Float[Tensor, "B C X Y"]:
        """One view: layers and heads by their mean, then timesteps and draws by the view's fold.

        Softmax "per_cell" is taken in every layer, timestep and draw (heads averaged), "of_mean" after all folding.
        Raises ViewError if the view's layers hold nothing.
        """
        folded: list[Float[Tensor, "B n C X Y"]] = []
        for level in view.timesteps:
            found = [sums[layer, _head(view.space), level] for layer in view.layers if (layer, _head(view.space), level) in sums]
            if not found:
                raise ViewError(
                    f'view "{view.key}": its layers have no maps here. Either their grid is narrower than the map by the factor '
                    f"that extractor.exclude_factor leaves out (now {self.exclude_factor}), or they have no such head."
                )
            weighted = list(zip(found, self._weights(found, view.space), strict=True))
            units = [[pair] for pair in weighted] if view.softmax in (Softmax.PER_CELL, Softmax.TOKENS) else [weighted]
            parts = []
            for unit in units:
                share = sum(one.pairs * weight for one, weight in unit)
                mean = torch.stack([one.maps * (weight / share) for one, weight in unit]).sum(0)
                parts.append(_cell(mean, view, images, prompts) * share)
            whole = torch.stack(parts).sum(0)
            folded.append(whole[:, : view.draws])
        stacked = torch.cat(folded, dim=1)
        maps = stacked.sum(1) if view.fold is Fold.SUM else stacked.mean(1)
        if view.softmax is Softmax.OF_MEAN:
            maps = _over_pixels(softmax_over_concepts, maps, view.temperature)
        return gaussian_blur(maps, view.blur) if view.blur else maps

    @staticmethod
    def _weights(found: Sequence[LayerSum], space: str) -> list[float]:
        """Weight of every single (layer, head) map; weights of all maps sum to 1."""
        if space != "words_by_grid":
            return [1 / sum(one.pairs for one in found)] * len(found)
        grids = {one.grid: sum(other.pairs for other in found if other.grid == one.grid) for one in found}
        return [1 / (grids[one.grid] * len(grids)) for one in found]


def _cell(mean: Float[Tensor, "R S X Y"], view: View, images: int, prompts: int) -> Float[Tensor, "B n C X Y"]:
    """Maps of all words of an image, which lie in one row or in several. The last map of a row is the sum over its tokens."""
    maps, total = mean[:, :-1], mean[:, -1:]
    if view.space == "words_normalized":
        maps = maps / (total + NORMALIZE_FLOOR)
    elif view.space == "words_standardized":
        spread = maps.std((-2, -1), correction=0, keepdim=True)
        maps = (maps - maps.mean((-2, -1), keepdim=True)) / spread.clamp_min(torch.finfo(maps.dtype).tiny)
    maps = rearrange(maps, "(B n G) S X Y -> B n (G S) X Y", B=images, G=prompts)
    if view.softmax is Softmax.PER_CELL:
        return _over_pixels(softmax_over_concepts, maps, view.temperature)
    return _over_pixels(softmax_over_tokens, maps, view.temperature) if view.softmax is Softmax.TOKENS else maps


def _head(space: str) -> int | None:
    return int(space.removeprefix("head_")) if space.startswith("head_") else None


def _over_pixels(
    change: Callable[[Tensor, float], Tensor], maps: Float[Tensor, "*B C X Y"], temperature: float
) -> Float[Tensor, "*B C X Y"]:
    return change(maps.flatten(-2), temperature).unflatten(-1, maps.shape[-2:])


def _with_complement(maps: Float[Tensor, "B C X Y"], concepts: Sequence[Concepts]) -> Float[Tensor, "B C X Y"]:
    """Class words' maps scaled to 0..1 each, and what is left of their greatest as the map of every background word."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    for row, one in enumerate(concepts):
        behind = torch.tensor([label == BACKGROUND for label in one.labels], device=maps.device)
        scaled[row, behind] = 1 - scaled[row, ~behind].amax(0)
    return scaled
