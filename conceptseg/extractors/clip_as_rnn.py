"""CLIPasRNN (Sun et al. 2024, arXiv:2312.07661): one CLIP proposes masks, another strikes words off, until none goes.

Source: google-research/google-research, clip_as_rnn; SAM matching, an option of its, is left out. ConceptAttention's set-up
for its row is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from conceptseg.backbones.base import stack_images
from conceptseg.backbones.encoders.image_text import ImageTextEncoder
from conceptseg.backbones.encoders.tower import Tower, tap_block, tap_normed
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.sheets import CLIP
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError
from conceptseg.extractors.dense_crf import DenseCRF
from conceptseg.extractors.image_model import ImageModelMethod, needs_gradient, needs_text
from conceptseg.types import BACKGROUND, Batch, Task, check_distinct, checked_word, folded

PROPOSAL_PROMPTS = ("a clean origami {}.",)
CRF = DenseCRF(
    appearance_weight=4.0, appearance_xy=67.0, appearance_rgb=3.0, smoothness_weight=3.0, smoothness_xy=1.0, iterations=10
)  # fmt: skip
"""Source: google-research/google-research, clip_as_rnn/configs/default.yaml."""


class CLIPasRNN(ImageModelMethod):
    """The class words' refined GradCAM after a dense CRF; words that fail the judge stay at 0, background words have no map.

    backbone: proposes (ViT-B/16 in the paper); judge: scores what is inside a red ellipse (ViT-L/14).
    background: words that compete in the proposal, beside the task's own.
    mask_level (η), keep (θ), box_level (λ): the paper's 0.4, 0.6 and 0.4 on VOC.
    prompts: of proposal and judge; the lab's tokenizer does not know the paper's.
    crf_iterations: of the dense CRF at the proposer's image size, 10 in the paper, against a background of 1 - the greatest
        map; 0 leaves it out, and maps stay on the patch grid.
    """

    version = 2
    told = "true name"
    comparable = False
    family = CLIP
    backbone: ImageTextEncoder

    def __init__(
        self,
        backbone: ImageTextEncoder | Loaded,
        judge: ImageTextEncoder | Loaded,
        background: Sequence[Any],
        prompts: Sequence[str] = PROPOSAL_PROMPTS,
        mask_level: float = 0.4,
        keep: float = 0.6,
        box_level: float = 0.4,
        crf_iterations: int = 10,
    ) -> None:
        super().__init__(needs_text(backbone))
        self.judge, self.prompts = needs_text(judge), tuple(prompts)
        self.background = tuple(checked_word(word, f"extractor.background.{k}") for k, word in enumerate(background))
        check_distinct(self.background, "extractor.background", ConfigError)
        self.mask_level, self.keep, self.box_level = mask_level, keep, box_level
        self.crf_iterations = crf_iterations

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        proposing = _Proposals(self.backbone, batch)
        rows = []
        for number, (task, concepts) in enumerate(zip(batch.tasks, batch.concepts, strict=True)):
            classes = [c for c, label in enumerate(concepts.labels) if label != BACKGROUND]
            words = [concepts.names[c] for c in classes]
            beside = [n for n, label in zip(concepts.names, concepts.labels, strict=True) if label == BACKGROUND]
            taken = {folded(word) for word in words}
            behind = {folded(w): w for w in reversed([*self.background, *beside])}  # of two spellings the first
            ground = [behind[one] for one in dict.fromkeys(map(folded, (*self.background, *beside))) if one not in taken]
            kept = list(range(len(words)))
            while True:
                asked = [words[k] for k in kept]
                maps = proposing.refined(number, asked, ground, self.prompts, self.box_level)
                scores = self._judged(task, asked, [m > self.mask_level for m in maps])
                # At least the best word stays, so there is always one to segment.
                left = [i for i, s in enumerate(scores) if s > self.keep] or [int(scores.argmax())]
                if len(left) == len(kept):
                    break
                kept = [kept[i] for i in left]
            if self.crf_iterations:
                maps = self._smoothed(task, maps)
            row = torch.zeros(len(concepts), *maps.shape[-2:]).to(maps)
            for k, found in zip(kept, maps, strict=True):
                row[classes[k]] = found
            rows.append(row)
        return torch.stack(rows)

    def _smoothed(self, task: Task, maps: Float[Tensor, "n h w"]) -> Float[Tensor, "n H W"]:
        """Probability of each word after the CRF, at the size that the proposer is shown."""
        size = self.backbone.image_size
        large = interpolate(maps[None], size=size, mode="bilinear")[0]
        labels = torch.cat([large, 1 - large.amax(0, keepdim=True)])
        image = stack_images([task.image], size, self.backbone.resize)[0].to(labels)
        return replace(CRF, iterations=self.crf_iterations)(labels[None], image)[0, :-1]

    def _judged(self, task: Task, words: Sequence[str], masks: Sequence[Bool[Tensor, "h w"]]) -> Float[Tensor, " n"]:
        """Each word's probability for its own mask: softmax over the words, prompt by prompt, averaged over prompts."""
        shown = Batch(tuple(replace(task, image=outlined(task.image, mask.cpu().numpy())) for mask in masks))
        with torch.no_grad():
            vectors = normalize(self.judge.run(self.judge.images(shown.tasks)), dim=-1)
            scale = self.judge.logit_scale
            found = [(scale * vectors @ self.judge.text_vectors(words, [p]).T).softmax(-1).diagonal() for p in self.prompts]
        return torch.stack(found).mean(0)


class _Proposals:
    """CLIP-ES: GradCAM of a text at the last block, spread by the last blocks' attention; one forward pass per batch."""

    def __init__(self, backbone: ImageTextEncoder | Loaded, batch: Batch) -> None:
        tower = backbone.tower
        depth = len(tower.blocks)
        self.backbone, self.tower = backbone, tower
        self.affinities: list[Tensor] = []
        self.normed: list[Tensor] = []
        stream: list[Tensor] = []
        with torch.enable_grad(), TapSet(backbone.model) as taps:
            for layer in range(max(0, depth - 8), depth):
                tap_normed(taps, tower, layer, partial(_add_attention, tower, layer, self.affinities))
            tap_normed(taps, tower, depth - 1, self.normed.append)
            tap_block(taps, tower, depth - 1, stream.append)
            backbone.run(needs_gradient(backbone.images(batch.tasks)), taps)
            self.vectors = normalize(backbone.project(stream[0][:, tower.prefix :].mean(1)), dim=-1)
        self.affinity = torch.stack([sinkhorn(a / min(8, depth)) for a in self.affinities[0]])

    def refined(
        self, number: int, words: Sequence[str], ground: Sequence[str], prompts: Sequence[str], box_level: float
    ) -> Float[Tensor, "n h w"]:
        """A map in 0..1 for each word of one image."""
        texts = self.backbone.text_vectors([*words, *ground], prompts)
        scale = self.backbone.logit_scale
        maps = []
        for index in range(len(words)):
            cam = self._cam(number, texts, index, scale)
            if not cam.any():  # the background words took everything: ask again without them
                cam = self._cam(number, texts[: len(words)], index, scale)
            spread = self.affinity[number] @ (cam * _box(self.tower.maps(cam[None])[0] > box_level * cam.max()).flatten())
            maps.append(self.tower.maps(minmax(spread)[None])[0])
        return torch.stack(maps)

    def _cam(self, number: int, texts: Float[Tensor, "n k"], index: int, scale: Tensor) -> Float[Tensor, " L"]:
        """ReLU of features weighted by the spatial mean of d probability / d feature, min-maxed."""
        with torch.enable_grad():
            target = (scale * self.vectors[number] @ texts.T).softmax(-1)[index]
            (gradient,) = torch.autograd.grad(target, self.normed[0], retain_graph=True)
        weights = gradient[number, self.tower.prefix :].mean(0)
        return minmax((self.normed[0][number, self.tower.prefix :].detach() @ weights).clamp(min=0))


def _add_attention(tower: Tower, layer: int, sums: list[Tensor], normed: Tensor) -> None:
    patches = tower.attention(layer, normed.detach()).mean(1)[:, tower.prefix :, tower.prefix :]
    sums[:] = [sums[0] + patches if sums else patches]


def sinkhorn(affinity: Float[Tensor, "L L"], rounds: int = 3) -> Float[Tensor, "L L"]:
    """Divide columns, then rows, of an affinity between L tokens by their sums, `rounds` times; symmetrise and square it."""
    for _ in range(rounds):
        affinity = affinity / affinity.sum(0, keepdim=True)
        affinity = affinity / affinity.sum(1, keepdim=True)
    affinity = (affinity + affinity.T) / 2
    return affinity @ affinity


def minmax(values: Float[Tensor, " L"]) -> Float[Tensor, " L"]:
    """Scale one value per token to 0..1; a constant becomes 0."""
    low, high = values.min(), values.max()
    return torch.zeros_like(values) if high == low else (values - low) / (high - low)


def _box(inside: Bool[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """1 within the box around everything that is inside, or everywhere if nothing is."""
    found = torch.zeros(inside.shape, device=inside.device)
    if not inside.any():
        return found + 1
    rows, columns = (torch.where(inside.any(axis))[0] for axis in (1, 0))
    found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    return found


def outlined(image: Float[np.ndarray, "H W 3"], mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "H W 3"]:
    """Draw the visual prompt on an image in 0..1: a red ellipse, one pixel thin, around the mask, and a blur outside it."""
    height, width = image.shape[:2]
    picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
    large = interpolate(torch.from_numpy(mask)[None, None].float(), size=(height, width), mode="nearest")[0, 0].numpy() > 0
    if not large.any():
        return image
    rows, columns = np.where(large.any(1))[0], np.where(large.any(0))[0]
    around = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    within = Image.new("L", (width, height), 0)
    ImageDraw.Draw(within).ellipse(around, fill=255)
    shown = Image.composite(picture, picture.filter(ImageFilter.BoxBlur(7)), within)
    ImageDraw.Draw(shown).ellipse(around, outline=(255, 0, 0), width=1)
    return np.asarray(shown, dtype=np.float32) / 255
