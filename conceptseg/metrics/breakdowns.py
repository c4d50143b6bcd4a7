"""The same numbers for parts of a data set: per word, per class, per size of the object, and for the worst images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics.definitions import DEFINITIONS, Definition, Rows, entering, ratio
from conceptseg.metrics.intervals import Interval, bootstrap_all
from conceptseg.metrics.released import BACKGROUND

SIZE_EDGES = (0.0, 0.05, 0.15, 0.3, 1.0)
"""Foreground share of the pixels that are not void, that separate small, medium, large and huge objects."""
SIZE_NAMES = ("small", "medium", "large", "huge")


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a breakdown. An image may belong to several parts (its words), or to none."""

    name: str
    n: int
    values: Mapping[str, Interval]
    """Metric -> value; undefined metrics are left out."""


def clusters_by_word(rows: Rows) -> dict[str, str]:
    """Sample -> its words joined, the cluster that a bootstrap by class draws. Raises DataError for rows without words."""
    if missing := [sample for sample, words in zip(rows.samples, rows.words, strict=True) if not words]:
        raise DataError(f"Cannot cluster by word: {len(missing)} rows name no word, {missing[0]} the first.")
    return {sample: ", ".join(sorted(words)) for sample, words in zip(rows.samples, rows.words, strict=True)}


def by_word(rows: Rows, definitions: Sequence[Definition], resamples: int, level: float) -> list[Part]:
    """Images that hold each word, words in alphabetical order. In multi-class data the other classes of an image count too."""
    words = sorted({word for named in rows.words for word in named})
    return _parts(
        rows, {w: [i for i, named in enumerate(rows.words) if w in named] for w in words}, definitions, resamples, level
    )


def by_size(rows: Rows, definitions: Sequence[Definition], resamples: int, level: float) -> list[Part]:
    """Images by the share of their scored pixels that is foreground, in four bins (`SIZE_EDGES`, upper ends included)."""
    shares = foreground_share(rows)
    places = np.clip(np.digitize(shares, SIZE_EDGES[1:-1], right=True), 0, len(SIZE_NAMES) - 1)
    bins = {
        f"{name} ({100 * low:g}-{100 * high:g} %)": np.flatnonzero(places == i).tolist()
        for i, (name, low, high) in enumerate(zip(SIZE_NAMES, SIZE_EDGES[:-1], SIZE_EDGES[1:], strict=True))
    }
    return _parts(rows, bins, definitions, resamples, level)


def foreground_share(rows: Rows) -> Float[np.ndarray, " n"]:
    """Return each row's foreground pixels of the ground truth over its pixels that are not void, 0..1."""
    foreground = [index != BACKGROUND for index in rows.classes]
    return np.nan_to_num(ratio(rows.label[:, foreground].sum(axis=1).astype(np.float64), rows.valid.astype(np.float64)))


def by_class(rows: Rows, resamples: int, level: float) -> list[Part]:
    """IoU of each class pooled over the images, background first; for multi-class protocols, where a class is a class.

    An image enters where it offers the class; a class that occurs neither in truth nor in prediction has no line.
    """
    names = class_names(rows)
    found = []
    for column, index in enumerate(rows.classes):
        offering = rows.at(np.flatnonzero(rows.present[:, column]).tolist())
        definition = _iou_of(column)
        kept = int(entering(definition.statistics(offering)).sum())
        if kept:
            interval = bootstrap_all([(definition, offering)], resamples, level=level)[0]
            found.append(Part(names[index], kept, {"iou": interval}))
    return found


def class_names(rows: Rows) -> dict[int, str]:
    """Class index -> word. Raises DataError where a row's words do not match its classes."""
    names = {BACKGROUND: "background"}
    for sample, words, given in zip(rows.samples, rows.words, rows.present, strict=True):
        indices = [index for index, here in zip(rows.classes, given, strict=True) if here and index != BACKGROUND]
        if len(words) != len(indices):
            raise DataError(f"{sample}: {len(words)} words for {len(indices)} foreground classes; cannot name the classes.")
        names.update(zip(indices, words, strict=True))
    return names


def _iou_of(column: int) -> Definition:
    def statistics(rows: Rows) -> Float[np.ndarray, "n 2"]:
        return np.stack([rows.inter[:, column], rows.union[:, column]], axis=-1).astype(np.float64)

    whole = DEFINITIONS["miou_dataset"]
    return Definition(
        "iou", "IoU", True, True, statistics, lambda sums: ratio(sums[..., 0], sums[..., 1]),
        "Intersection over union of one class, pooled over the images that offer it.", whole.source,
    )  # fmt: skip


def worst_images(rows: Rows, definition: Definition, share: float) -> tuple[float, int]:
    """Mean of a metric over the worst `share` of the images (at least one), image by image, and how many those are.

    Source: the idea of worst-case averages is that of fine-grained mIoUs (arXiv:2310.19252); the shares are ours.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"worst share is {share:g}; wanted more than 0 and at most 1, such as 0.05.")
    values = definition.finish(definition.statistics(rows))
    ordered = np.sort(values[~np.isnan(values)])
    if not definition.higher_is_better:
        ordered = ordered[::-1]
    count = min(len(ordered), max(1, round(share * len(ordered))))
    return (float(ordered[:count].mean()) if count else float("nan")), count


def _parts(
    rows: Rows, groups: Mapping[str, Sequence[int]], definitions: Sequence[Definition], resamples: int, level: float
) -> list[Part]:
    chosen = {name: rows.at(list(places)) for name, places in groups.items() if len(places)}
    wanted = [(definition, part) for part in chosen.values() for definition in definitions]
    intervals = iter(bootstrap_all(wanted, resamples, level=level))
    found = []
    for name, part in chosen.items():
        values = {definition.name: next(intervals) for definition in definitions}
        found.append(Part(name, len(part), {metric: v for metric, v in values.items() if not np.isnan(v.value)}))
    return found
