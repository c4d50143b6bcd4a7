"""Segmenters: a decision, the grid it is taken on, and how the answer reaches the size of the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from conceptseg.errors import ConfigError, one_of
from conceptseg.metrics.released import colliding_relabel
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
    """

    decision: str
    cut: str = "mask"
    enlarge: str = "bilinear"
    level: float = 0.5
    relabel: str = "right"
    score_grid: int | None = None

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
        if not 0 <= self.level < 1:
            raise ConfigError(f"protocol.segmenters.level is {self.level:g}; wanted a share from 0 to below 1, such as 0.5.")

    @property
    def key(self) -> str:
        """For example "mean@grid/nearest"; stable, since rows are filed under it."""
        decision = self.decision + (f"{self.level:g}" if self.decision in ("level", "share", "quantile", "argmax_above") else "")
        coarse = f"/scores{self.score_grid}" if self.score_grid else ""
        return f"{decision}@{self.cut}/{self.enlarge}" + ("/colliding" if self.relabel == "colliding" else "") + coarse

    def scores(self, maps: Float[np.ndarray, "C h w"], size: tuple[int, int]) -> Float[np.ndarray, "C H W"]:
        """Enlarge the maps of C concepts to the ground truth's (H, W), for ranking pixels."""
        resize = nearest_floor if self.enlarge == "nearest" else bilinear
        return resize(resize(maps, (self.score_grid, self.score_grid)) if self.score_grid else maps, size)

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
