"""DAAM on real images: cross-attention of a diffusion U-Net to the words of a prompt (Tang et al. 2023, arXiv:2210.04885).

An image is noised to a level t and goes through a stock U-Net once. A word's map is the attention that pixels pay to the word's
tokens, every (layer, head) map brought to one size (bicubic, cut at 0) and averaged. Generated images: see `conceptseg.trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import CFG_ROWS, Attended, upsample
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.backbones.word_tokens import POSITION_RULES, placed, positions_of, prompt_length
from conceptseg.errors import ConfigError, DataError, one_of, real_number, whole_number
from conceptseg.extractors.explaining import checked_size
from conceptseg.extractors.explanation import Explanation, remarks_on
from conceptseg.extractors.unet_maps import Asked, Kind, UNetMaps, check_template
from conceptseg.saliency.views import Softmax, View
from conceptseg.trace.tracer import Trace
from conceptseg.types import BACKGROUND, Batch, Concepts, Task

SPACES = {
    "words": "mean over all (layer, head) maps of the mean over a word's tokens: the method",
    "words_by_grid": "the same, every grid size with one weight however many layers and heads it has",
    "words_normalized": "words over the sum of the maps of all tokens of the prompt (the reference's normalize)",
    "words_standardized": "each word's map less its own mean, over its own deviation, so that a word's share of mass is no prior "
    "where words compete; on one object cut at the mean it equals words",
}


@dataclass(frozen=True, slots=True)
class TokenShares:
    """Token positions read in each row's attention, [R K], and the share of each in each of S maps, [R S K]."""

    positions: Int[Tensor, "R K"]
    shares: Float[Tensor, "R S K"]

    def repeated(self, times: int) -> TokenShares:
        """The same rows, over and over."""
        return TokenShares(self.positions.repeat(times, 1), self.shares.repeat(times, 1, 1))

    def maps(
        self, attended: Attended, heads: slice, size: tuple[int, int], how: str, softmax: bool
    ) -> Float[Tensor, "R a S X Y"]:
        """Return maps of some heads at one size. Tokens are enlarged one by one: the cut at 0 does not commute with means."""
        probabilities = attended.probabilities(slice(None), heads, softmax=softmax)
        at = repeat(self.positions, "R K -> R a N K", a=probabilities.shape[1], N=probabilities.shape[2])
        tokens = rearrange(probabilities.gather(-1, at), "R a (h w) K -> R a K h w", h=attended.grid[0])
        return torch.einsum("rsk,rakxy->rasxy", self.shares, upsample(tokens, size, how))


class DAAM(UNetMaps):
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

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
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
        one_of("extractor.encode", encode, ("joint", "separate"))
        one_of("extractor.background", background, ("prompt", "complement"))
        one_of("extractor.token_match", token_match, POSITION_RULES)
        one_of("extractor.cfg_rows", cfg_rows, CFG_ROWS)
        if encode == "separate" and background == "complement":
            raise ConfigError('extractor.background "complement" asks for class words only, in one prompt: use encode=joint.')
        check_template(prompt, "prompt", ("caption", "concepts"))
        check_template(concept, "concept", ("concept",))
        if indexed_prompt is not None:
            check_template(indexed_prompt, "indexed_prompt", ("caption", "concepts"))
        super().__init__(backbone, cfg_rows, exclude_factor, include_mid, upsampling, map_side, noise, posterior, seed)
        self.prompt, self.concept, self.join, self.encode, self.background = prompt, concept, join, encode, background
        self.indexed_prompt, self.token_match = indexed_prompt, token_match

    @property
    def reads_caption(self) -> bool:
        """Only where a template names it."""
        return any("{caption}" in template for template in (self.prompt, self.indexed_prompt or ""))

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
        """Trace the pipeline that is in memory while it makes the image, as DAAM does (see `conceptseg.trace`)."""
        pipe = getattr(self.backbone, "pipeline", None)
        if pipe is None:
            raise ConfigError(
                "explain: to make images DAAM needs the pipeline itself: DAAM(pipe).explain(prompt=...), with "
                "pipe = StableDiffusionPipeline.from_pretrained(...)."
            )
        if view.space != "words" or view.softmax is not Softmax.NONE or view.blur:
            raise ConfigError(
                f'explain: of a prompt DAAM reads space="words" as it is, not {view.key}. Leave out space and softmax.'
            )
        options: dict[str, Any] = {} if size is None else dict(zip(("height", "width"), checked_size(size), strict=True))
        if guidance is not None:
            options["guidance_scale"] = real_number("guidance", guidance, 0)
        if steps is not None:
            options["num_inference_steps"] = whole_number("steps", steps, 1, 100_000)
        with Trace(
            pipe, cfg_rows=self.cfg_rows, exclude_factor=self.exclude_factor, upsampling=self.upsampling, layers=view.layers,
            token_match=self.token_match, map_side=self.map_side,
        ) as traced:  # fmt: skip
            generator = torch.Generator().manual_seed(self.seed)
            made = pipe(prompt, generator=generator, output_type="np", **options).images[0]
        found = torch.stack([traced.word_map(word).values for word in (*names, *competing)])
        scores = found.float().cpu()
        notes = (*notes, *remarks_on((*names, *competing), scores))
        about = self._about(view, prompt=prompt, **options)
        others = scores[len(names) :] if competing else None
        image = np.round(255 * np.clip(made, 0, 1)).astype(np.uint8)
        return Explanation(names, scores[: len(names)], image, about, None, self.comparable, tuple(notes), others)

    def spaces(self, most_heads: int) -> tuple[str, ...]:
        return (*SPACES, *(f"head_{number}" for number in range(most_heads)))

    def kind(self, space: str) -> Kind:
        return Kind(head=int(space.removeprefix("head_"))) if space.startswith("head_") else Kind()

    def finish(self, maps: Float[Tensor, "B C X Y"], batch: Batch) -> Float[Tensor, "B C X Y"]:
        return _with_complement(maps, batch.concepts) if self.background == "complement" else maps

    def asked(self, task: Task) -> list[Asked]:
        """The prompts that one task is turned into: one, or one for every word."""
        words: list[str | None] = [
            None if self.background == "complement" and label == BACKGROUND else name
            for name, label in zip(task.concepts.names, task.concepts.labels, strict=True)
        ]
        groups = [words] if self.encode == "joint" else [[word] for word in words]
        found = []
        for group in groups:
            said = [word for word in group if word is not None]
            prompt, indexed = (
                placed(template, task.caption, said, self.concept, self.join, task.concepts.names)
                for template in (self.prompt, self.prompt if self.indexed_prompt is None else self.indexed_prompt)
            )
            found.append(Asked(prompt.text, tuple(group), indexed))
        return found

    def reader(self, asked: Sequence[Asked], totals: bool) -> TokenShares:
        """Where each row's words are, and as the last map the sum over the prompt's tokens (left empty unless `totals`)."""
        held = {one: self._places(one, totals) for one in dict.fromkeys(asked)}  # images of a batch ask for the same words
        found = [held[one] for one in asked]
        most = max(1, max(len(tokens) for tokens, _ in found))
        positions = torch.zeros(len(found), most, dtype=torch.long)
        shares = torch.zeros(len(found), len(found[0][1]), most)
        for row, (tokens, maps) in enumerate(found):
            positions[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            for number, places in enumerate(maps):
                at = [tokens.index(position) for position in places]
                shares[row, number, at] = 1.0 if number == len(maps) - 1 else 1 / max(1, len(at))
        return TokenShares(positions.to(self.backbone.device), shares.to(self.backbone.device))

    def _places(self, one: Asked, totals: bool) -> tuple[list[int], list[tuple[int, ...]]]:
        """Every token position that some map of a prompt reads, and those that each map reads; the last map as in `reader`."""
        tokenizer, length = self.backbone.tokenizer, self.backbone.text_length
        said = iter(positions_of(self.token_match, tokenizer, one.looked_up))
        maps = [() if word is None else next(said) for word in one.words]
        maps.append(tuple(range(1, prompt_length(tokenizer, one.indexed) + 1)) if totals else ())
        tokens = sorted({position for places in maps for position in places})
        if tokens and tokens[-1] >= length:
            raise DataError(
                f'the prompt "{one.indexed[:120]}" has words past token {length - 1}, the last that is encoded. Ask for '
                f"fewer words, shorten extractor.prompt and extractor.concept, or use extractor.encode=separate."
            )
        return tokens, maps


def _with_complement(maps: Float[Tensor, "B C X Y"], concepts: Sequence[Concepts]) -> Float[Tensor, "B C X Y"]:
    """Class words' maps scaled to 0..1 each, and what is left of their greatest as the map of every background word."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    for row, one in enumerate(concepts):
        behind = torch.tensor([label == BACKGROUND for label in one.labels], device=maps.device)
        scaled[row, behind] = 1 - scaled[row, ~behind].amax(0)
    return scaled
