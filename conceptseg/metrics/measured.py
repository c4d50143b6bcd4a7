"""Metrics of one image's maps and prediction, measured where `protocol.measures` names them: what counts of pixels can't give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.metrics import installed
from conceptseg.metrics.installed import MapMetric, Measure
from conceptseg.types import BACKGROUND, VOID, Task

BOUNDARY = 0.02
"""Width of a boundary as a share of the image's diagonal (Cheng et al. 2021, section 5; boundary-iou-api's `dilation_ratio`)."""


def pointing_game(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the share, 0..1, of the image's words whose greatest score lies on their object; None if no object is there.

    Void pixels are left out. Where several pixels share the greatest score, the share of them that lies on the object counts, so
    that a constant map has its object's share of the image.
    """
    return _mean(inside[score == score.max()].mean() for score, inside in _words(task, scores))


def mass_accuracy(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the share, 0..1, of each word's positive map mass that lies on its object, void left out; mean over words.

    A map without positive mass has 0. None if no object is there.
    """
    return _mean(_share(_positive(score), inside) or 0.0 for score, inside in _words(task, scores))


def auroc(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the chance, 0..1, that a pixel of a word's object scores above one beside it, ties half; mean over words.

    A word whose object covers every pixel that is not void has none. None if no word has one.
    """
    return _mean(
        _area_under_roc(score[inside], score[~inside]) for score, inside in _words(task, scores) if not bool(inside.all())
    )


def boundary_iou(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the IoU, 0..1, of the boundaries of prediction and truth; mean over foreground classes found in either.

    A boundary is the part of a mask within d pixels of its edge, d = 2 % of the image's diagonal; the image's edge counts as one.
    Both masks lose their void pixels first. None if no class is in either.

    Source: Cheng et al. 2021, Boundary IoU (arXiv:2103.16562), section 4.
    """
    valid = task.truth != VOID
    width = max(1, round(BOUNDARY * float(np.hypot(*task.truth.shape))))
    found = []
    for index in task.classes:
        there, said = (task.truth == index) & valid, (labels == index) & valid
        if index != BACKGROUND and (there.any() or said.any()):
            first, second = _boundary(there, width), _boundary(said, width)
            found.append((first & second).sum() / (first | second).sum())
    return _mean(found)


def leakage(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the share, 0..1, of a present word's positive map mass that lies on other named objects; mean over words.

    Void pixels are left out. None unless two named objects are there and a map has positive mass.
    """
    named = _named(task)
    present = [int(v) for v in np.unique(task.truth[named])]
    if len(present) < 2:
        return None
    return _leaked(task, scores, {c: named & (task.truth != v) for c, v in enumerate(task.concepts.labels) if v in present})


def leakage_absent(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    """Return the share, 0..1, of an absent word's positive map mass that lies on named objects; mean over absent words.

    Void pixels are left out. None without absent words, named objects or positive mass; see `GivenNames` for how absent words
    are given.
    """
    named = _named(task)
    return _leaked(task, scores, dict.fromkeys(task.concepts.distractors, named)) if named.any() else None


def _words(task: Task, scores: Float[np.ndarray, "C H W"]) -> Iterator[tuple[Float[np.ndarray, " P"], Bool[np.ndarray, " P"]]]:
    """(scores, whether on the object) of the P pixels that are not void, for each word whose object is there."""
    valid = task.truth != VOID
    for channel, label in enumerate(task.concepts.labels):
        inside = task.truth[valid] == label
        if label != BACKGROUND and inside.any():
            yield scores[channel][valid], inside


def _named(task: Task) -> Bool[np.ndarray, "H W"]:
    """Pixels of objects that a word names."""
    return np.isin(task.truth, [label for label in task.concepts.labels if label != BACKGROUND])


def _leaked(task: Task, scores: Float[np.ndarray, "C H W"], others: dict[int, Bool[np.ndarray, "H W"]]) -> float | None:
    """Mean over channels of the share of positive mass that lies on the channel's `others`."""
    valid = task.truth != VOID
    shares = (_share(_positive(scores[channel][valid]), other[valid]) for channel, other in others.items())
    return _mean(share for share in shares if share is not None)


def _positive(score: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    return np.maximum(score.astype(np.float64), 0)


def _share(mass: Float[np.ndarray, " P"], inside: Bool[np.ndarray, " P"]) -> float | None:
    total = float(mass.sum())
    return float(mass[inside].sum()) / total if total > 0 else None


def _area_under_roc(positives: Float[np.ndarray, " P"], negatives: Float[np.ndarray, " N"]) -> float:
    """Mann and Whitney's U over P · N."""
    ordered = np.sort(negatives)
    below, up_to = np.searchsorted(ordered, positives, "left"), np.searchsorted(ordered, positives, "right")
    return float((below + up_to).sum() / (2 * positives.size * negatives.size))


def _boundary(mask: Bool[np.ndarray, "H W"], width: int) -> Bool[np.ndarray, "H W"]:
    """The mask without what is left of it after `width` erosions by 3 x 3 pixels."""
    from scipy.ndimage import minimum_filter

    return np.asarray(mask & ~minimum_filter(mask, size=2 * width + 1, mode="constant", cval=0))


def _mean(values: Iterator[float] | Sequence[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _metric(name: str, label: str, measure: Measure, text: str, source: str, higher: bool = True) -> MapMetric:
    return MapMetric(name, label, 1, measure, text, source, higher_is_better=higher)


MEASURES: dict[str, MapMetric] = {
    metric.name: metric
    for metric in (
        _metric(
            "pointing_game", "pointing", pointing_game,
            "Share of words whose greatest score lies on their object, ties by their share; mean over images.",
            "Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop (arXiv:1608.00507), without its 15 pixels of "
            "tolerance.",
        ),
        _metric(
            "mass_accuracy", "mass", mass_accuracy,
            "Share of a word's positive map mass that lies on its object, 0 without such mass; mean over words, then images. "
            "It depends on where the scale of a map has its zero.",
            "Relevance mass accuracy, Arras et al. 2022, CLEVR-XAI (arXiv:2003.07258).",
        ),
        _metric(
            "auroc", "AUROC", auroc,
            "Chance that a pixel of the object scores above one beside it, ties half; mean over words, then images.",
            "Area under the ROC curve by Mann and Whitney's U (1947).",
        ),
        _metric(
            "boundary_iou", "boundary IoU", boundary_iou,
            "IoU of the parts of prediction and truth within 2 % of the image's diagonal of their edges; mean over foreground "
            "classes found in either, then images.",
            "Cheng et al. 2021, Boundary IoU (arXiv:2103.16562), section 4.",
        ),
        _metric(
            "leakage", "leakage", leakage,
            "Share of a present word's positive map mass that lies on other named objects; mean over words, then the images with "
            "two or more named objects. Less is better.",
            "Defined here, after the misplaced attention that AnchorDiff (arXiv:2605.26460) sets out to remove.", higher=False,
        ),
        _metric(
            "leakage_absent", "leakage of absent words", leakage_absent,
            "Share of an absent word's positive map mass that lies on named objects; mean over absent words, then images. Less "
            "is better.",
            "Defined here; as leakage, for words that the image does not hold.", higher=False,
        ),
    )
}  # fmt: skip
"""Name -> metric of those that this package has."""


def _not_of_maps(task: Task, scores: Float[np.ndarray, "C H W"], labels: UInt8[np.ndarray, "H W"]) -> float | None:
    raise AssertionError("deletion and insertion ask the classifier again, which the loop does")


ASKING: dict[str, MapMetric] = {
    metric.name: metric
    for metric in (
        MapMetric(
            "deletion", "deletion", 1, _not_of_maps,
            "Area under the explained class's probability while pixels go to the mean colour, those of greatest score first; "
            "mean over words, then images. Less is better.",
            "Petsiuk et al. 2018, RISE (arXiv:1806.07421), section 4.1; 16 steps, equal scores in a drawn order.",
            higher_is_better=False, asks_again=True,
        ),
        MapMetric(
            "insertion", "insertion", 1, _not_of_maps,
            "Area under the explained class's probability while pixels return to a blurred image, those of greatest score first; "
            "mean over words, then images.",
            "Petsiuk et al. 2018, RISE (arXiv:1806.07421), section 4.1; 16 steps, blur of 11 pixels and deviation 5.",
            asks_again=True,
        ),
    )
}  # fmt: skip
"""Name -> metric of those that ask a classifier again: 17 images of a forward pass each, for every word and view."""


def names() -> list[str]:
    """Names of the metrics that are measured from maps here or added by installed packages."""
    return sorted({*MEASURES, *ASKING, *installed.names()})


def known(name: str) -> Any:
    """The metric of that name that is measured here or that an installed package adds; None where there is none."""
    return MEASURES.get(name) or ASKING.get(name) or installed.installed(name)


def map_metrics(asked: Sequence[str], where: str) -> tuple[MapMetric, ...]:
    """The metrics of these names. Raises ConfigError, which names the setting `where`, for one that is not measured from maps."""
    found = []
    for name in asked:
        metric = known(name)
        if not isinstance(metric, MapMetric):
            raise ConfigError(
                f'{where}: no metric "{name}" is measured from maps. {did_you_mean(name, names())} '
                "Metrics from counts need no measuring."
            )
        found.append(metric)
    return tuple(found)
