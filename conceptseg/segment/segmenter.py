"""Segmenters: a decision, the grid it is taken on, and how the answer reaches the size of the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from conceptseg.errors import ConfigError, in_range, one_of, real_number
from conceptseg.metrics.released import colliding_relabel
from conceptseg.segment.refine import pamr
from conceptseg.segment.resize import bilinear, nearest_floor
from conceptseg.segment.threshold import above_level, above_mean, above_otsu, above_quantile, from_share
from conceptseg.types import Concepts, Prediction


@dataclass(frozen=True, slots=True)
class Segmenter:
    """Turns the maps of one task into labels and scores at the size of its truth.

    decision: "mean" (the target's map above its own mean), "otsu", "level" (share `level` between its least and greatest
        value), "share" (at least share `level` of its greatest value, DAAM's rule), "quantile" (share `level` of its pixels
        lie below the cut), "argmax" (the concept with the greatest score wins each pixel), or "argmax_above" (as argmax, but
        a pixel whose greatest score is below `level` is background: the rule of SCLIP and NACLIP on VOC21).
    cut: "grid" decides on the map's own grid and enlarges the answer; "mask" enlarges the scores first.
    enlarge: "nearest" (torch's rule) or "bilinear".
    relabel: "right", or "colliding" for the in-place relabelling of the released multi-class VOC script, which moves
        pixels twice where class indices meet.
    score_grid: scores are first brought to a square this wide, the answer is not: what is ranked is coarser than what is cut, as
        in the released script with --downscale_for_eval. Needs cut "grid".
    pamr_steps: rounds of PAMR on the enlarged scores (see `pamr`); 0 for none. pamr_dilations: distances of the neighbours in
        pixels; 8 and 16 in SCLIP's code. Needs cut "mask".
    logit_scale: scores become shares: the softmax over concepts of so many times the enlarged (and refined) scores; None leaves
        them alone. SCLIP's code takes 40 times the cosines. Needs cut "mask".
    """

    decision: str
    cut: str = "mask"
    enlarge: str = "bilinear"
    level: float = 0.5
    relabel: str = "right"
    score_grid: int | None = None
    pamr_steps: int = 0
    pamr_dilations: Sequence[int] = (8, 16)
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        for value, key, choices in (
            (self.decision, "decision", ("mean", "otsu", "level", "share", "quantile", "argmax", "argmax_above")),
            (self.cut, "cut", ("grid", "mask")),
            (self.enlarge, "enlarge", ("nearest", "bilinear")),
            (self.relabel, "relabel", ("right", "colliding")),
        ):
            one_of(f"protocol.segmenters.{key}", value, choices)
        if self.score_grid is not None and (self.cut != "grid" or self.score_grid < 1):
            raise ConfigError(
                f'protocol.segmenters.score_grid is {self.score_grid} with cut "{self.cut}"; wanted a width of 1 or more, with '
                f'cut "grid", since "mask" would cut the coarse scores.'
            )
        in_range("protocol.segmenters.pamr_steps", self.pamr_steps, 0, 1000)
        object.__setattr__(self, "pamr_dilations", tuple(self.pamr_dilations))
        if not self.pamr_dilations:
            raise ConfigError("protocol.segmenters.pamr_dilations is empty; wanted distances in pixels, such as [8,16].")
        for distance in self.pamr_dilations:
            in_range("protocol.segmenters.pamr_dilations", distance, 1, 1000)
        if self.logit_scale is not None:
            real_number("protocol.segmenters.logit_scale", self.logit_scale, least=1e-6)
        if self.cut == "grid" and (self.pamr_steps or self.logit_scale is not None):
            raise ConfigError(
                f'protocol.segmenters: pamr_steps is {self.pamr_steps} and logit_scale {self.logit_scale} with cut "grid", which '
                f'decides on the map\'s own grid, before either. Set cut "mask".'
            )
        if not 0 <= self.level < 1:
            raise ConfigError(f"protocol.segmenters.level is {self.level:g}; wanted a share from 0 to below 1, such as 0.5.")

    @property
    def key(self) -> str:
        """For example "mean@grid/nearest"; stable, since rows are filed under it."""
        decision = self.decision + (f"{self.level:g}" if self.decision in ("level", "share", "quantile", "argmax_above") else "")
        coarse = f"/scores{self.score_grid}" if self.score_grid else ""
        distances = ",".join(map(str, self.pamr_dilations))
        refined = f"/pamr{self.pamr_steps}d{distances}" if self.pamr_steps else ""
        shares = "" if self.logit_scale is None else f"/softmaxx{self.logit_scale:g}"
        return (
            f"{decision}@{self.cut}/{self.enlarge}"
            + ("/colliding" if self.relabel == "colliding" else "")
            + coarse
            + refined
            + shares
        )

    @property
    def way(self) -> tuple[object, ...]:
        """The settings that `scores` depends on."""
        return self.enlarge, self.score_grid, self.pamr_steps, self.pamr_dilations, self.logit_scale

    def scores(
        self, maps: Float[np.ndarray, "C h w"], size: tuple[int, int], image: Float[np.ndarray, "I J 3"] | None = None
    ) -> Float[np.ndarray, "C H W"]:
        """Enlarge the maps of C concepts to the ground truth's (H, W), for ranking pixels; then refine them and form shares.

        image: in 0..1, of any size; read by PAMR alone. Raises ConfigError where PAMR is asked for without one.
        """
        resize = nearest_floor if self.enlarge == "nearest" else bilinear
        scores = resize(resize(maps, (self.score_grid, self.score_grid)) if self.score_grid else maps, size)
        if self.pamr_steps:
            if image is None:
                raise ConfigError(
                    f"protocol.segmenters.pamr_steps is {self.pamr_steps}, but no image was given to refine by. Set it to 0 here."
                )
            shown = image if image.shape[:2] == size else bilinear(image.transpose(2, 0, 1), size).transpose(1, 2, 0)
            scores = pamr(scores, shown, self.pamr_steps, self.pamr_dilations)
        if self.logit_scale is not None:
            raised = np.exp(self.logit_scale * (scores - scores.max(0)))
            scores = raised / raised.sum(0)
        return scores

    def __call__(
        self,
        maps: Float[np.ndarray, "C h w"],
        scores: Float[np.ndarray, "C H W"],
        concepts: Concepts,
        classes: tuple[int, ...],
    ) -> Prediction:
        """maps on their own grid, and the same enlarged by `scores`."""
        size = (scores.shape[-2], scores.shape[-1])
        ground = maps if self.cut == "grid" else scores
        labels = self._decide(ground, concepts, classes)
        return Prediction(labels if self.cut == "mask" else nearest_floor(labels, size), scores)

    def _decide(self, maps: Float[np.ndarray, "C H W"], concepts: Concepts, classes: tuple[int, ...]) -> np.ndarray:
        if self.decision in ("argmax", "argmax_above"):
            winner = maps.argmax(0)
            if self.relabel == "colliding":
                background = concepts.labels.count(0)
                return colliding_relabel(winner, background, concepts.labels[background:]).astype(np.uint8)
            won = np.asarray(concepts.labels, np.uint8)[winner]
            return won if self.decision == "argmax" else np.where(maps.max(0) < self.level, 0, won).astype(np.uint8)
        if concepts.target is None:
            raise ConfigError(
                f'protocol.segmenters.decision "{self.decision}" cuts one target map, but this protocol asks for several '
                f'classes at once. Use "argmax".'
            )
        target = maps[concepts.target]
        rules = {
            "mean": above_mean, "otsu": above_otsu, "level": lambda m: above_level(m, self.level),
            "share": lambda m: from_share(m, self.level), "quantile": lambda m: above_quantile(m, self.level),
        }  # fmt: skip
        inside = rules[self.decision](target)
        return (inside * classes[-1]).astype(np.uint8)
