"""OVAM on real images: attention of a diffusion U-Net's queries to a text of its own (Marcos-Manchón et al., arXiv:2403.14291).

The U-Net's prompt is the caption. The words are in an attribution text, which may differ. Attention of the image's
queries to that text's keys, with a softmax over its few tokens (or none), is enlarged bilinearly and summed. Tokens may be
optimised beforehand (`conceptseg-study optimise-token`), maps may be refined by self-attention and cut out by a dense CRF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from conceptseg.backbones.base import stack_images
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttention, CrossAttentionTap, UNetTap, grid_factor, upsample
from conceptseg.backbones.unets.optimised_tokens import digest_of, read_tokens
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.backbones.word_tokens import PlacedText, placed, positions_of
from conceptseg.errors import ConfigError, DataError, one_of
from conceptseg.extractors.dense_crf import DenseCRF
from conceptseg.extractors.unet_maps import SELF, Asked, Kind, LayerSum, LayerSums, UNetMaps, check_template
from conceptseg.saliency.views import View
from conceptseg.types import Batch, Task, folded

SPACES = {
    "token_softmax": "softmax over the tokens of the attribution text: the method",
    "linear": "no softmax: the paper's linear variant",
}


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "clamp": lambda scores: scores.clamp(0, 1),
}  # fmt: skip
"""Activations of a head's scores, by the name that settings use."""


CRF = DenseCRF(
    appearance_weight=10.0, appearance_xy=80.0, appearance_rgb=13.0, smoothness_weight=3.0, smoothness_xy=3.0, iterations=5
)  # fmt: skip
"""Source: vpulab/ovam at 12afd87, ovam/base/daam_module.py."""
SURE = 0.99
"""Confidence of the CRF in a mask: SimpleCRF, which the released code calls, keeps probabilities within 0.01 .. 0.99."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """Attribution texts of each row, G of them: states [R G T d], which are tokens [R G T], and shares of maps [R G S T]."""

    states: Float[Tensor, "R G T d"]
    present: Bool[Tensor, "R G T"]
    shares: Float[Tensor, "R G S T"]
    activation: str = "none"

    def repeated(self, times: int) -> Attribution:
        """The same rows, over and over."""
        return replace(
            self, states=self.states.repeat(times, 1, 1, 1), present=self.present.repeat(times, 1, 1),
            shares=self.shares.repeat(times, 1, 1, 1),
        )  # fmt: skip

    def maps(
        self, attended: Attended, heads: slice, size: tuple[int, int], how: str, softmax: bool
    ) -> Float[Tensor, "R a S X Y"]:
        """Return maps of some heads at the common size (X, Y); the last one, a sum over the prompt's tokens in DAAM, is empty."""
        found = []
        # forward(), not a call: the hooks on the host's own keys must not run again.
        project = attended.attention.get_submodule("to_k").forward
        for group in range(self.states.shape[1]):
            keys = project(self.states[:, group].to(attended.queries.dtype))
            keys = rearrange(keys, "R T (A d) -> R A T d", A=attended.queries.shape[1])
            scores = attended.probabilities(slice(None), heads, keys, softmax=False)
            if softmax:
                scores = scores.masked_fill(~self.present[:, group, None, None], float("-inf")).softmax(-1)
            scores = ACTIVATIONS[self.activation](scores)
            words = torch.einsum("rst,rant->rasn", self.shares[:, group], scores)
            found.append(upsample(rearrange(words, "R a S (h w) -> R a S h w", h=attended.grid[0]), size, how))
        maps = torch.stack(found, dim=2).flatten(2, 3)
        return torch.cat([maps, torch.zeros_like(maps[:, :, :1])], dim=2)


class OVAM(UNetMaps):
    """Reads real images noised to a level t, with one forward pass per timestep for any number of words.

    prompt: the U-Net's prompt, with {caption}; "" is the unconditional pass, which the released code reads by default.
    attribution, concept, join: the text whose tokens compete, with {caption} and {concepts}.
    attribute: "joint" lets all words compete in one text, "separate" gives every word a text of its own.
    context: whether the text's other words compete too, or were only read by the text encoder; start_token, end_token: likewise.
    The start token stands for everything that is not named: without it and alone in its text, a word is everywhere.
    activation: done to the scores of every head before they are averaged (see ACTIVATIONS; for the linear variant).
    self_attention_floor: maps are multiplied by the image's self-attention, scaled to this floor .. 1 (see `refined`); null: not.
    crf_level: a word's mask, where its map is above this share of its maximum before self-attention (paper: 0.4, 0.75 with
        optimised tokens), goes through the dense CRF at the size that the model is shown, and the map is its probability; null:
        not. Every word is cut out alone, so words can't be compared.
    tokens: a file of optimised tokens; a word in it has these two for its attribution text, others have their own.
    Source: arXiv:2403.14291 and vpulab/ovam at 12afd87, ovam/base/daam_module.py.
    """

    version = 2

    def __init__(
        self,
        backbone: UNetBackbone | Loaded,
        prompt: str = "{caption}",
        attribution: str = "{concepts}",
        concept: str = "{concept}",
        join: str = " ",
        attribute: str = "joint",
        context: bool = True,
        start_token: bool = True,
        end_token: bool = True,
        activation: str = "none",
        self_attention_floor: float | None = None,
        crf_level: float | None = None,
        tokens: str | None = None,
        exclude_factor: int | None = None,
        include_mid: bool = False,
        upsampling: str = "bilinear",
        map_side: int | None = None,
        noise: str = "per_sample",
        posterior: str = "mode",
        seed: int = 0,
    ) -> None:
        one_of("extractor.attribute", attribute, ("joint", "separate"))
        one_of("extractor.activation", activation, tuple(ACTIVATIONS))
        check_template(prompt, "prompt", ("caption",))
        check_template(attribution, "attribution", ("caption", "concepts"))
        check_template(concept, "concept", ("concept",))
        if attribute == "separate" and not (context or start_token or end_token):
            raise ConfigError(
                "extractor.attribute is separate and neither start_token, end_token nor context competes: a lone token takes all "
                "attention everywhere. Keep extractor.start_token=true."
            )
        if tokens is not None and attribute != "separate":
            raise ConfigError("extractor.tokens brings a background of its own for every word: use extractor.attribute=separate.")
        if self_attention_floor is not None and not 0 <= self_attention_floor <= 1:
            raise ConfigError(f"extractor.self_attention_floor is {self_attention_floor}; wanted 0 to 1 (the paper's: 0.85).")
        if crf_level is not None and not 0 < crf_level < 1:
            raise ConfigError(f"extractor.crf_level is {crf_level}; wanted a share of a map's maximum (the paper's: 0.4).")
        super().__init__(backbone, "conditional", exclude_factor, include_mid, upsampling, map_side, noise, posterior, seed)
        self.prompt, self.attribution, self.concept, self.join = prompt, attribution, concept, join
        self.attribute, self.context, self.start_token, self.end_token = attribute, context, start_token, end_token
        self.activation, self.self_attention_floor = activation, self_attention_floor
        self.crf_level, self.comparable = crf_level, crf_level is None
        self.tokens_file = None if tokens is None else Path(tokens)
        self.tokens = {} if self.tokens_file is None else read_tokens(self.tokens_file, self.backbone.checkpoint.identity())

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **({} if self.tokens_file is None else {"tokens": digest_of(self.tokens_file)})}

    @property
    def reads_caption(self) -> bool:
        """Only where a template names it."""
        return any("{caption}" in template for template in (self.prompt, self.attribution))

    def spaces(self, most_heads: int) -> tuple[str, ...]:
        return tuple(SPACES)

    def kind(self, space: str) -> Kind:
        return Kind(softmax=space == "token_softmax")

    def asked(self, task: Task) -> list[Asked]:
        names = task.concepts.names
        return [Asked(self.prompt.format(caption=task.caption), names, PlacedText(task.caption, names, ((),) * len(names)))]

    def attributions(self, asked: Asked) -> list[PlacedText]:
        """Attribution texts of one task, each with its words."""
        words = [word for word in asked.words if word is not None]
        groups = [words] if self.attribute == "joint" else [[word] for word in words]
        return [placed(self.attribution, asked.indexed, group, self.concept, self.join, words) for group in groups]

    def strings(self, asked: Asked) -> set[str]:
        return {asked.prompt} | {one.text for one in self.attributions(asked) if not self._optimised(one.words)}

    def reader(self, asked: Sequence[Asked], totals: bool) -> Attribution:
        """Attribution texts, encoded without padding; tokens that do not compete are dropped after encoding."""
        texts = [self.attributions(one) for one in asked]
        held = {text: self._attribution(text) for text in dict.fromkeys(text for row in texts for text in row)}
        rows = [[held[text] for text in row] for row in texts]
        longest = max(len(states) for row in rows for states, _ in row)

        def padded(tensor: Tensor, axis: int) -> Tensor:
            room = list(tensor.shape)
            room[axis] = longest - tensor.shape[axis]
            return torch.cat([tensor, tensor.new_zeros(room)], dim=axis)

        states = torch.stack([torch.stack([padded(one, 0) for one, _ in row]) for row in rows])
        shares = torch.stack([torch.stack([padded(share, 1) for _, share in row]) for row in rows])
        lengths = torch.tensor([[len(one) for one, _ in row] for row in rows], device=states.device)
        present = torch.arange(longest, device=states.device) < lengths[..., None]
        return Attribution(states, present, shares, self.activation)

    def _attribution(self, one: PlacedText) -> tuple[Float[Tensor, "T d"], Float[Tensor, "S T"]]:
        backbone, text, words = self.backbone, one.text, one.words
        if optimised := self._optimised(words):
            return optimised[0].to(backbone.device, backbone.dtype), torch.tensor([[0.0, 1.0]], device=backbone.device)
        states = backbone.unpadded_text(text)
        places = positions_of("exact", backbone.tokenizer, one)
        last = len(states) - 1
        if any(position >= last for found in places for position in found):
            raise DataError(
                f'the attribution text "{text[:120]}" has words past token {last}, the last that is encoded. Shorten '
                f"extractor.attribution, or use extractor.attribute=separate."
            )
        said = {position for found in places for position in found} | (set(range(1, last)) if self.context else set())
        kept = sorted(said | ({0} if self.start_token else set()) | ({last} if self.end_token else set()))
        shares = torch.zeros(len(words), len(kept), device=states.device)
        for number, found in enumerate(places):
            shares[number, [kept.index(position) for position in found]] = 1 / len(found)
        return states[kept], shares

    def _optimised(self, words: Sequence[str]) -> list[Float[Tensor, "2 d"]]:
        held = {folded(word): token for word, token in self.tokens.items()}
        return [held[folded(word)] for word in words if folded(word) in held]

    # ------------------------------------------------------------ self-attention

    def further_taps(
        self, layers: Sequence[CrossAttention], views: Sequence[View], level: float, size: tuple[int, int], sums: LayerSums
    ) -> list[UNetTap]:
        if self.self_attention_floor is None:
            return []

        def on_layer(attended: Attended) -> None:
            if grid_factor(size, attended.queries.shape[2]) != self.exclude_factor:
                maps = upsample(attended.received()[:, None], size, "bilinear")
                sums[attended.layer.index, SELF, level] = LayerSum(maps, 1, attended.grid)

        return [CrossAttentionTap([one.self_attention for one in layers], on_layer)]

    def fold(
        self, sums: LayerSums, view: View, images: int, prompts: int, background: Bool[Tensor, "B C"] | None = None
    ) -> Float[Tensor, "B C X Y"]:
        maps = super().fold(sums, view, images, prompts, background)
        if self.crf_level is not None:
            maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        if self.self_attention_floor is None:
            return maps
        keys = [(layer, SELF, level) for level in view.timesteps for layer in view.layers]
        received = torch.stack([sums[key].maps for key in keys if key in sums]).mean(0)
        received = rearrange(received, "(B n) 1 X Y -> B n X Y", B=images)[:, : view.draws].mean(1)
        return refined(maps, received, self.self_attention_floor)

    def finish(self, maps: Float[Tensor, "B C X Y"], batch: Batch) -> Float[Tensor, "B C H W"]:
        if self.crf_level is None:
            return maps
        size = self.backbone.size
        images = stack_images([task.image for task in batch.tasks], size, self.backbone.resize).to(maps)
        masks = interpolate(maps, size=size, mode="bilinear") > self.crf_level
        words = torch.where(masks, SURE, 1 - SURE).to(maps)
        return torch.stack([CRF(torch.stack([1 - one, one], 1), image)[:, 1] for one, image in zip(words, images, strict=True)])


def refined(maps: Float[Tensor, "B C X Y"], self_attention: Float[Tensor, "B X Y"], floor: float) -> Float[Tensor, "B C X Y"]:
    """Multiply maps by the self-attention map, scaled to floor .. 1 (paper: 0.85, 0.95 to 0.99 with optimised tokens).

    self_attention: attention that each position receives, mean over heads and layers, bilinear. arXiv:2403.14291 names an
    aggregate self-attention map without saying which; the released code sums each query's softmax over keys, which is 1
    everywhere but for rounding, so its numbers can't be reproduced.
    """
    low, high = self_attention.amin((-2, -1), keepdim=True), self_attention.amax((-2, -1), keepdim=True)
    scaled = (self_attention - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps * (floor + (1 - floor) * scaled)[:, None]
