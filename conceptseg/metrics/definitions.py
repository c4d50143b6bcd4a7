"""Definitions of every reported number: a finishing function of a sum over images, so that a bootstrap is a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.metrics.installed import MapMetric
from conceptseg.metrics.measured import known, names
from conceptseg.metrics.released import BACKGROUND, iou_from_accuracy
from conceptseg.types import PER_IMAGE

Statistics = Float[np.ndarray, "n K"]
Sums = Float[np.ndarray, "... K"]
Values = Float[np.ndarray, "..."]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one view and one segmenter as arrays, sorted by sample; counts are pixels, void excluded as in `Counts`."""

    samples: tuple[str, ...]
    classes: tuple[int, ...]
    """Every class that some row counts; a row that does not offer a class has zeros there."""
    inter: Int64[np.ndarray, "n C"]
    pred: Int64[np.ndarray, "n C"]
    label: Int64[np.ndarray, "n C"]
    pred_void: Int64[np.ndarray, "n C"]
    valid: Int64[np.ndarray, " n"]
    correct: Int64[np.ndarray, " n"]
    void: Int64[np.ndarray, " n"]
    per_image: Mapping[str, Float[np.ndarray, " n"]]
    """Numbers of each image that counts can't give, under `PER_IMAGE` (the stored field `ap`, in 0..1) and under the names of
    installed metrics (`measured`); NaN where undefined or not measured."""
    words: tuple[tuple[str, ...], ...]
    """Class words of each image, in the order of its foreground classes; () if a row does not have them."""
    present: Bool[np.ndarray, "n C"]
    """Whether the row offers the class."""
    seconds: Float[np.ndarray, " n"]
    """Wall time of each image's share of its batch; NaN where not recorded."""

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], classes: tuple[int, ...] | None = None) -> Rows:
        """Rows from stored dicts. `classes` fixes the class axis; otherwise it is the union of all rows' classes, ascending.

        A damaged, failed or repeated row is an error: no row is left out in silence.
        """
        ordered = sorted(records, key=lambda record: str(record["sample"]))
        samples = tuple(str(record["sample"]) for record in ordered)
        _check_records(ordered, samples)
        present = sorted({index for record in ordered for index in record["classes"]})
        offered = tuple(present) if classes is None else classes
        if missing := sorted(set(present) - set(offered)):
            raise ConfigError(
                f"Cannot pool rows that count classes {missing} into classes {offered}; pass classes= with all of them."
            )

        column = {index: place for place, index in enumerate(offered)}
        tables = np.zeros((4, len(ordered), len(offered)), np.int64)
        given = np.zeros((len(ordered), len(offered)), np.bool_)
        for row, record in enumerate(ordered):
            places = [column[index] for index in record["classes"]]
            given[row, places] = True
            for table, name in zip(tables, ("inter", "pred", "label", "pred_void"), strict=True):
                if len(record[name]) != len(places):
                    raise DataError(
                        f'Row "{record["sample"]}" has {len(record[name])} values in "{name}" for {len(places)} classes.'
                    )
                table[row, places] = record[name]
        totals = np.array([[record[name] for name in ("valid", "correct", "void")] for record in ordered], np.int64)
        valid, correct, void = totals.reshape(-1, 3).T
        # float64 turns None into NaN.
        per_image = {name: np.array([record["ap"].get(name) for record in ordered], np.float64) for name in PER_IMAGE}
        for name in sorted({name for record in ordered for name in record.get("measured", ())}):
            values = [record.get("measured", {}).get(name) for record in ordered]
            per_image[name] = np.array(values, np.float64)
        inter, pred, label, pred_void = tables
        words = tuple(tuple(map(str, record.get("words", ()))) for record in ordered)
        seconds = np.array([record.get("seconds") for record in ordered], np.float64)
        return cls(samples, offered, inter, pred, label, pred_void, valid, correct, void, per_image, words, given, seconds)

    def at(self, places: Sequence[int]) -> Rows:
        """The rows at these places, in that order; the class axis stays."""
        chosen = np.asarray(places, np.intp)
        return Rows(
            tuple(self.samples[i] for i in chosen), self.classes, self.inter[chosen], self.pred[chosen], self.label[chosen],
            self.pred_void[chosen], self.valid[chosen], self.correct[chosen], self.void[chosen],
            {name: values[chosen] for name, values in self.per_image.items()}, tuple(self.words[i] for i in chosen),
            self.present[chosen], self.seconds[chosen],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def union(self) -> Int64[np.ndarray, "n C"]:
        """Return the pixels of each row and class that are predicted as the class or labelled with it, void left out."""
        return np.asarray(self.pred + self.label - self.inter)


def _check_records(ordered: list[Mapping[str, Any]], samples: tuple[str, ...]) -> None:
    if failed := [record["sample"] for record in ordered if record["status"] != "ok"]:
        raise DataError(
            f'Cannot score {len(failed)} rows whose status is not "ok", {failed[0]} the first; leave them out and say so.'
        )
    if len(mixed := {(record["view"], record["segmenter"]) for record in ordered}) > 1:
        raise DataError(f"Cannot pool rows of {len(mixed)} views and segmenters into one number: {sorted(mixed)[:4]}.")
    if repeated := sorted({first for first, second in pairwise(samples) if first == second}):
        raise DataError(f"Cannot score: {len(repeated)} samples have more than one row, {repeated[0]} the first.")


@dataclass(frozen=True, slots=True)
class Definition:
    """A reported number: finish(sum over rows of statistics(row)), in 0..1, NaN where undefined."""

    name: str
    label: str
    """Column head."""
    percent: bool
    """Printed times 100."""
    higher_is_better: bool
    statistics: Callable[[Rows], Statistics]
    finish: Callable[[Sums], Values]
    text: str
    """One sentence, printed beside every table."""
    source: str

    def value(self, rows: Rows) -> float:
        return float(self.finish(self.statistics(rows).sum(axis=0)))


def entering(statistics: Statistics) -> Bool[np.ndarray, " n"]:
    """Mark the n rows that enter a metric: statistics that are all zero (for AP, an image without foreground) change no sum."""
    return np.asarray(statistics.any(axis=-1))


def ratio(top: Values, bottom: Values) -> Values:
    """top / bottom, NaN where bottom is 0."""
    top, bottom = np.broadcast_arrays(top, bottom)
    return np.asarray(np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0))


def _columns(*columns: np.ndarray) -> Statistics:
    return np.stack(columns, axis=-1).astype(np.float64)


def _pooled_ratio(sums: Sums) -> Values:
    return ratio(sums[..., 0], sums[..., 1])


def _ious(sums: Sums) -> tuple[Values, Values]:
    """Sum of the defined class IoUs and how many there are, from inter and union side by side."""
    inter, union = np.split(sums, 2, axis=-1)
    return np.where(union > 0, ratio(inter, union), 0.0).sum(axis=-1), (union > 0).sum(axis=-1).astype(np.float64)


def _mean_iou(sums: Sums) -> Values:
    return ratio(*_ious(sums))


def _correct_of_valid(rows: Rows) -> Statistics:
    return _columns(rows.correct, rows.valid)


def _inter_union(rows: Rows) -> Statistics:
    return np.concatenate([rows.inter, rows.union], axis=-1).astype(np.float64)


def _inter_union_foreground(rows: Rows) -> Statistics:
    foreground = [index != BACKGROUND for index in rows.classes]
    return np.concatenate([rows.inter[:, foreground], rows.union[:, foreground]], axis=-1).astype(np.float64)


def _inter_union_with_void(rows: Rows) -> Statistics:
    return np.concatenate([rows.inter, rows.union + rows.pred_void], axis=-1).astype(np.float64)


def _mean_iou_epsilon(sums: Sums) -> Values:
    """The released script divides the sum of IoUs by their number + 1e-6."""
    total, defined = _ious(sums)
    return np.where(defined > 0, total / (defined + 1e-6), np.nan)


def _of_image(values: Float[np.ndarray, " n"]) -> Statistics:
    """Per-image values whose mean is wanted; images where the value is NaN are left out."""
    return _columns(np.nan_to_num(values), ~np.isnan(values))


def _image_mean_iou(rows: Rows) -> Statistics:
    return _of_image(_mean_iou(_inter_union(rows)))


def _ap_foreground(rows: Rows) -> Statistics:
    return _of_image(rows.per_image["foreground"])


def _f1_of_image(rows: Rows) -> Statistics:
    foreground = [index != BACKGROUND for index in rows.classes]
    inter, pred, label = (t[:, foreground].sum(1).astype(np.float64) for t in (rows.inter, rows.pred, rows.label))
    return _of_image(np.divide(2 * inter, pred + label, out=np.zeros_like(inter), where=pred + label > 0))


def _f1_rowwise(rows: Rows) -> Statistics:
    return _of_image(rows.per_image["f1_rowwise"])


def _ap_two_channel(rows: Rows) -> Statistics:
    return _of_image(rows.per_image["two_channel"])


def _ap_two_channel_minmax(rows: Rows) -> Statistics:
    return _of_image(rows.per_image["two_channel_minmax"])


def _accuracy_void_half(rows: Rows) -> Statistics:
    return _columns(2 * rows.correct, 2 * rows.valid + rows.void)


def _iou_from_accuracy(sums: Sums) -> Values:
    return iou_from_accuracy(_pooled_ratio(sums))


_CONCEPTATTENTION = "ConceptAttention (arXiv:2502.04320), released code, "

DEFINITIONS: dict[str, Definition] = {
    definition.name: definition
    for definition in (
        Definition(
            name="accuracy",
            label="acc",
            percent=True,
            higher_is_better=True,
            statistics=_correct_of_valid,
            finish=_pooled_ratio,
            text="Pixels predicted right over all pixels that are not void, pooled over the data set.",
            source="PASCAL VOC and ConceptAttention (arXiv:2502.04320).",
        ),
        Definition(
            name="miou_dataset",
            label="mIoU",
            percent=True,
            higher_is_better=True,
            statistics=_inter_union,
            finish=_mean_iou,
            text=(
                "Intersection over union per class, background included, counts pooled over the data set and void left out; "
                "mean over the classes that occur in truth or prediction."
            ),
            source="PASCAL VOC segmentation; also what ConceptAttention's VOC single-class script computes.",
        ),
        Definition(
            name="miou_image",
            label="mIoU per image",
            percent=True,
            higher_is_better=True,
            statistics=_image_mean_iou,
            finish=_pooled_ratio,
            text=(
                "Mean IoU within each image over the classes that occur in its truth or prediction, background included; "
                "mean over images."
            ),
            source="Per-image variant of miou_dataset.",
        ),
        Definition(
            name="foreground_iou",
            label="fg IoU",
            percent=True,
            higher_is_better=True,
            statistics=_inter_union_foreground,
            finish=_mean_iou,
            text="Intersection over union pooled over the data set; mean over the foreground classes that occur.",
            source="miou_dataset without class 0.",
        ),
        Definition(
            name="ap_image",
            label="mAP",
            percent=True,
            higher_is_better=True,
            statistics=_ap_foreground,
            finish=_pooled_ratio,
            text=(
                "Average precision of the foreground score within each image, ties entering together; mean over the images that "
                "have foreground."
            ),
            source="Step-wise average precision as in scikit-learn's average_precision_score.",
        ),
        Definition(
            name="f1_image",
            label="F1",
            percent=True,
            higher_is_better=True,
            statistics=_f1_of_image,
            finish=_pooled_ratio,
            text="F1 of the foreground's pixels within each image, 0 where nothing was there or found; mean over images.",
            source="The ordinary form of released_f1_rowwise.",
        ),
        Definition(
            name="released_f1_rowwise",
            label='released "F1" (over rows)',
            percent=True,
            higher_is_better=True,
            statistics=_f1_rowwise,
            finish=_pooled_ratio,
            text="Chefer's F1: the mean over the rows of each image of the row's own F1, undefined ones 0; mean over images.",
            source="Chefer et al. 2021 (arXiv:2012.09838), hila-chefer/Transformer-Explainability at c3e578f, utils/metrices.py.",
        ),
        Definition(
            name="released_miou_from_accuracy",
            label='released "mIoU" = acc/(2-acc)',
            percent=True,
            higher_is_better=True,
            statistics=_correct_of_valid,
            finish=_iou_from_accuracy,
            text="ConceptAttention's ImageNet mIoU: the IoU of stacked complementary masks, acc/(2-acc), never below mIoU.",
            source=_CONCEPTATTENTION + "experiments/imagenet_segmentation/run_experiment.py.",
        ),
        Definition(
            name="released_ap_two_channel",
            label='released "mAP" (1-s, s), raw',
            percent=True,
            higher_is_better=True,
            statistics=_ap_two_channel,
            finish=_pooled_ratio,
            text=(
                "Average precision of the pooled pixels of (1-s, s) against (1-t, t), s raw, void dropped; mean over images; "
                "depends on the scale of s."
            ),
            source=_CONCEPTATTENTION + "run_single_class_split_experiment.py.",
        ),
        Definition(
            name="released_ap_two_channel_minmax",
            label='released "mAP" (1-s, s), min-max',
            percent=True,
            higher_is_better=True,
            statistics=_ap_two_channel_minmax,
            finish=_pooled_ratio,
            text=(
                "Average precision of the pooled pixels of (1-s, s) against (1-t, t), s scaled to 0..1 by its own extremes, "
                "a constant map scored as 0; mean over images."
            ),
            source=_CONCEPTATTENTION + "experiments/imagenet_segmentation/run_experiment.py.",
        ),
        Definition(
            name="released_accuracy_void_half",
            label="released acc (void half wrong)",
            percent=True,
            higher_is_better=True,
            statistics=_accuracy_void_half,
            finish=_pooled_ratio,
            text="ConceptAttention's VOC single-class accuracy: 2 correct / (2 valid + void), every void pixel half an error.",
            source=_CONCEPTATTENTION + "run_single_class_split_experiment.py.",
        ),
        Definition(
            name="released_miou_void_in_union",
            label="released mIoU (void in union)",
            percent=True,
            higher_is_better=True,
            statistics=_inter_union_with_void,
            finish=_mean_iou_epsilon,
            text=(
                "ConceptAttention's VOC multi-class mIoU: pooled over the data set, void pixels kept in the union of the class "
                "predicted there, the sum of IoUs divided by their number + 1e-6."
            ),
            source=_CONCEPTATTENTION + "run_multi_class_seg_experiment.py.",
        ),
    )
}


def of_map_metric(metric: MapMetric) -> Definition:
    """The mean over images of a number that a protocol measured."""

    def statistics(rows: Rows) -> Statistics:
        return _of_image(rows.per_image.get(metric.name, np.full(len(rows), np.nan)))

    return Definition(
        metric.name, metric.label, metric.percent, metric.higher_is_better, statistics, _pooled_ratio, metric.text, metric.source
    )


def current_name(name: str) -> str:
    """A metric's name, given that or the one that it had while released definitions were called published.

    >>> current_name("published_f1_rowwise"), current_name("accuracy")
    ('released_f1_rowwise', 'accuracy')
    """
    return name.replace("published_", "released_", 1) if name.startswith("published_") else name


def definition_of(name: str, where: str) -> Definition:
    """Return the metric of a current or former name, or the one that an installed package offers under it.

    Raises ConfigError, which names the setting `where`.
    """
    name = current_name(name)
    if name in DEFINITIONS:
        return DEFINITIONS[name]
    found = known(name)
    if isinstance(found, MapMetric):
        return of_map_metric(found)
    if not isinstance(found, Definition):
        raise ConfigError(f'{where}: unknown metric "{name}". {did_you_mean(name, [*DEFINITIONS, *names()])}')
    return found
