"""ResCLIP (Yang et al. 2025, arXiv:2411.15851): the last block's attention, mixed with middle blocks' and with its own answer.

Source: yvhangyang/ResCLIP at 6b082d9, clip/model.py (custom_attn, create_logit_temp, generate_attention_sfr), and
configs/cfg_voc20.py. Not checked against the original, which runs in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import conv1d, normalize, pad

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.backbones.encoders.tower import tap_normed
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, in_range, real_number
from conceptseg.extractors.image_model import PatchTextMethod, word_vectors
from conceptseg.extractors.naclip import neighbourhood
from conceptseg.segment.refine import pamr
from conceptseg.segment.resize import bilinear
from conceptseg.types import Batch, Task


def same_class(classes: Int[Tensor, "h w"], sigma: float) -> Float[Tensor, "L L"]:
    """Return the attention between patches of one class, before the softmax; its greatest entry is 1.

    classes: of each patch. Patches of one class get 1, or exp(-d / m) where the line from one to the other leaves the class: d is
    the greater of their distances by row and by column, and m the greatest d of the grid. As in the released code, m + 1 points
    are taken on each line and the first d + 1 of them are looked at, which is all of the line for the longest ones only. Each row
    is then smoothed by a Gaussian of deviation `sigma` over the patches in row-major order, and divided by its sum.
    """
    height, width = classes.shape
    at = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(classes.device)
    start, end = at[:, None], at[None]
    steps = (end - start).abs().amax(-1)
    share = torch.linspace(0, 1, int(steps.max()) + 1, device=at.device)
    line = (start[..., None, :] * (1 - share)[:, None] + end[..., None, :] * share[:, None]).round().long()
    flat = classes.flatten()
    inside = (classes[line[..., 0], line[..., 1]] == flat[:, None, None]) | (torch.arange(len(share)).to(at) > steps[..., None])
    alike = (flat[:, None] == flat[None]).float()
    alike = torch.where(inside.all(-1), alike, alike * torch.exp(-steps / max(int(steps.max()), 1)))
    size = min(height * width, int(6 * sigma + 1))
    size += 1 - size % 2
    kernel = torch.exp(-((torch.arange(size) - size // 2) ** 2) / (2 * sigma**2)).to(alike)
    smooth = conv1d(alike[:, None], (kernel / kernel.sum())[None, None], padding=size // 2)[:, 0]
    smooth = smooth / (smooth.sum(1, keepdim=True) + 1e-8)
    return smooth / smooth.max()


class ResCLIP(PatchTextMethod):
    """NACLIP's attention plus the mean of middle blocks'; a second read-out also looks where the first saw the same class.

    The attention of a read-out is t_r ((1 - l_r) softmax(s + neighbourhood) + l_r middle), where s is k kᵀ / √d, in the second
    read-out t_s ((1 - l_s) k kᵀ / √d + l_s same), and `same` comes from the first read-out's most probable word of each patch.
    middle: first and last of the blocks that are averaged, from 0; [5, 8] of 12 in the released code. middle_weights: (t_r, l_r).
    feedback_weights: (t_s, l_s); null leaves the second read-out out. threshold: a pixel whose greatest share is below it counts
    as the first word. logit_scale: of the shares. sigma: of the neighbourhood and of `same`, in patches. Defaults are VOC20's.
    """

    version = 1

    def __init__(
        self,
        backbone: ImageEncoder,
        middle: Sequence[int] = (5, 8),
        middle_weights: Sequence[float] = (2.0, 0.6),
        feedback_weights: Sequence[float] | None = (2.1, 0.6),
        threshold: float = 0.1,
        logit_scale: float = 40.0,
        sigma: float = 5.0,
        pamr_steps: int = 10,
    ) -> None:
        super().__init__(backbone)
        for name, pair in (("middle", middle), ("middle_weights", middle_weights), ("feedback_weights", feedback_weights)):
            if pair is not None and len(pair) != 2:
                raise ConfigError(f"extractor.{name} is {list(pair)}; wanted two numbers.")
        real_number("extractor.threshold", threshold, 0, 1)
        real_number("extractor.sigma", sigma, 1e-3, 1e3)
        in_range("extractor.pamr_steps", pamr_steps, 0, 100)
        self.middle, self.middle_weights, self.feedback_weights = tuple(middle), tuple(middle_weights), feedback_weights
        self.threshold, self.logit_scale, self.sigma, self.pamr_steps = threshold, logit_scale, sigma, pamr_steps

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        tower, backbone = self.backbone.tower, self.backbone
        first, last = self.middle
        if not 0 <= first <= last < len(tower.blocks) - 1:
            raise ConfigError(
                f"extractor.middle is [{first}, {last}]; wanted two of the blocks 0 to {len(tower.blocks) - 2} before the last."
            )
        normed: list[Tensor] = []
        middle: list[Tensor] = []
        with TapSet(backbone.model) as taps:
            for layer in range(first, last + 1):
                tap_normed(taps, tower, layer, partial(_add_attention, self, layer, middle))
            tap_normed(taps, tower, len(tower.blocks) - 1, normed.append)
            backbone.run(backbone.images(batch.tasks), taps)
        _, keys, values = tower.query_key_value(-1, normed[0])
        scores = keys @ keys.mT * keys.shape[-1] ** -0.5
        near = pad(neighbourhood(tower.grid, self.sigma), (tower.prefix, 0, tower.prefix, 0)).to(keys)
        between = middle[0] / (last - first + 1)

        def read(scores: Tensor) -> Float[Tensor, "B h w k"]:
            strength, share = self.middle_weights
            return self.read_out(strength * ((1 - share) * torch.softmax(scores + near, -1) + share * between) @ values)

        vectors = read(scores)
        if self.feedback_weights is None:
            return vectors
        words = word_vectors(backbone, batch)
        cosines = torch.einsum("bhwk,bck->bchw", normalize(vectors, dim=-1), words).float().cpu().numpy()
        maps = [self._same(task, one) for task, one in zip(batch.tasks, cosines, strict=True)]
        same = pad(torch.stack(maps), (tower.prefix, 0, tower.prefix, 0)).to(scores)[:, None]
        strength, share = self.feedback_weights
        return read(strength * ((1 - share) * scores + share * same))

    def _same(self, task: Task, cosines: Float[np.ndarray, "C h w"]) -> Float[Tensor, "L L"]:
        """`same_class` of the word that wins most pixels of each patch, after PAMR by the image as the model is shown it."""
        size = self.backbone.image_size
        image = bilinear(np.ascontiguousarray(task.image.transpose(2, 0, 1)), size).transpose(1, 2, 0)
        scores = pamr(bilinear(cosines, size), image, self.pamr_steps, (8, 16))
        shares = torch.softmax(torch.from_numpy(scores) * self.logit_scale, dim=0)
        greatest, winner = shares.max(0)
        winner = torch.where(greatest < self.threshold, 0, winner)
        rows, columns = self.backbone.tower.grid
        patches = rearrange(winner, "(h a) (w b) -> h w (a b)", h=rows, w=columns)
        return same_class(patches.mode(-1).values, self.sigma)


def _add_attention(method: ResCLIP, layer: int, sums: list[Tensor], normed: Tensor) -> None:
    attention = method.backbone.tower.attention(layer, normed)
    sums[:] = [sums[0] + attention if sums else attention]
