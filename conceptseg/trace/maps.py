"""Results of a trace: heat maps of a prompt's tokens and words, as masks, overlays and overlaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from conceptseg.backbones.word_tokens import reference_positions, token_ids, word_spans
from conceptseg.errors import ViewError

MaskRule = Literal["paper", "released", "mean"]


@dataclass(frozen=True)
class WordMap:
    """The heat map of one word. values: float [X Y], larger where the word is; the scale grows with the number of steps."""

    word: str
    values: Float[Tensor, "X Y"]

    def expanded(self, size: tuple[int, int], absolute: bool = False, threshold: float | None = None) -> Float[Tensor, "H W"]:
        """Resize the map to (rows, columns), bicubic and not cut at 0; scaled to 0..1 unless `absolute`; 0 or 1 with a threshold.

        Source: castorini/daam at 09564e0, daam/heatmap.py, which hands (width, height) to (rows, columns);
        a cut of 0 is no cut there.
        """
        flat = self.values[None, None].float()
        wide = torch.nn.functional.interpolate(flat, size=size, mode="bicubic")[0, 0]
        if not absolute:
            wide = (wide - wide.min()) / (wide.max() - wide.min() + 1e-8)
        return (wide > threshold).float() if threshold else wide

    def mask(self, size: tuple[int, int], threshold: float = 0.4, rule: MaskRule = "paper") -> Float[Tensor, "H W"]:
        """Return the word's mask at (rows, columns), 0 or 1.

        rule: "paper": at least threshold · greatest value; "released": above the threshold after min-max scaling; "mean": above
        the map's own mean.
        """
        wide = self.expanded(size, absolute=True)
        if rule == "released":
            return self.expanded(size, threshold=threshold)
        return (wide > wide.mean() if rule == "mean" else wide >= threshold * wide.max()).float()

    def overlay(self, image: Image.Image | np.ndarray) -> Image.Image:
        """Draw the map in colours under the picture, which is the more opaque the less the word is there.

        image: a picture, or an array [H W 3] in 0..255.
        """
        from matplotlib import colormaps

        photo = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
        heat = self.expanded((photo.shape[0], photo.shape[1])).cpu().numpy()[..., None]
        colours = 255 * colormaps["jet"](heat[..., 0])[..., :3].astype(np.float32)
        return Image.fromarray(np.clip((1 - heat) * photo + heat * colours, 0, 255).astype(np.uint8))

    def intersection_share(self, other: WordMap) -> float:
        """Soft share of this map's mass that lies in the other: sum(a · b) / sum(a). The reference's compute_ioa."""
        return float((self.values * other.values).sum() / (self.values.sum() + 1e-8))


@dataclass(frozen=True)
class PromptMaps:
    """Heat maps of a prompt's tokens for one image. maps: float [K X Y], in the tokenizer's order, special tokens included.

    CLIP's has a start and an end token, T5's an end token, Gemma's a start token.
    """

    maps: Float[Tensor, "K X Y"]
    prompt: str | None
    tokenizer: Any
    token_match: str = "exact"
    converted: Callable[[str], str] = str
    """Map a text to the text that is encoded for it. The two differ for a textual inversion of several vectors."""
    length: int | None = None
    """Tokens that the model was given, padding included; None for the tokenizer's own limit."""

    def token_map(self, positions: Sequence[int], name: str = "") -> WordMap:
        """Mean of the maps of some token positions, from 0 (CLIP's start token). Raises ViewError for one without a map."""
        if beyond := [p for p in positions if not 0 <= p < len(self.maps)]:
            raise ViewError(f"token position {beyond[0]} has no map: there are {len(self.maps)}, special tokens included.")
        if not positions:
            raise ViewError("token_map: no position given.")
        return WordMap(name, self.maps[list(positions)].mean(0))

    def word_map(self, word: str, occurrence: int | None = None) -> WordMap:
        """Mean over a word's tokens and occurrences, or one occurrence, from 0. Raises DataError if it is not there."""
        if self.prompt is None:
            raise ViewError(
                f'word_map("{word}"): the pipeline was given embeddings, so words are not known. Say trace(pipe, prompt="...") '
                f"with the text that was embedded, or ask by position: token_map([...])."
            )
        encoded, wanted = self.converted(self.prompt), self.converted(word)
        if self.token_match == "reference":
            return self.token_map(reference_positions(self.tokenizer, encoded, wanted), word)
        spans = word_spans(self.tokenizer, encoded, wanted, self.length)
        if occurrence is not None and not 0 <= occurrence < len(spans):
            raise ViewError(f'word_map("{word}", occurrence={occurrence}): it occurs {len(spans)} times; count from 0.')
        chosen = spans if occurrence is None else spans[occurrence : occurrence + 1]
        return self.token_map(sorted({p for span in chosen for p in span}), word)

    def cut_to(self, prompt: str) -> PromptMaps:
        """Keep as many rows as a (shorter) prompt has tokens with its special ones, as the reference does for another prompt."""
        return replace(self, maps=self.maps[: len(token_ids(self.tokenizer, self.converted(prompt)))], prompt=prompt)

    def normalized(self) -> PromptMaps:
        """Every map over the sum of those of the words' tokens (special tokens not counted), plus 1e-6."""
        words = self.maps[1:-1]  # of given embeddings, CLIP's layout
        if self.prompt is not None:
            encoded = self.tokenizer(
                self.converted(self.prompt), truncation=False, verbose=False, return_special_tokens_mask=True
            )
            words = self.maps[[k for k, special in enumerate(encoded.special_tokens_mask[: len(self.maps)]) if not special]]
        return replace(self, maps=self.maps / (words.sum(0, keepdim=True) + 1e-6))
