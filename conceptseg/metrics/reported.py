"""The definitions as torchmetrics, for Lightning and other users of rows; reports read the definitions themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from conceptseg.metrics.definitions import DEFINITIONS, Definition, Rows, definition_of, entering


class CountMetric(Metric):
    """finish(sum of statistics) of one `Definition`, fed with row dicts; in 0..1, NaN where undefined.

    `classes` is every class that a row may count, (0, 1) for single-class protocols.
    """

    definition: ClassVar[Definition]
    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    sums: Tensor
    n: Tensor
    """Images that enter the value."""

    def __init__(self, classes: tuple[int, ...] = (0, 1), **settings: Any) -> None:
        super().__init__(**settings)
        self.classes = classes
        width = self.definition.statistics(Rows.from_records([], classes)).shape[-1]
        self.add_state("sums", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, records: Iterable[Mapping[str, Any]]) -> None:
        statistics = self.definition.statistics(Rows.from_records(records, self.classes))
        self.sums += torch.from_numpy(statistics.sum(axis=0)).to(self.sums.device)
        self.n += int(entering(statistics).sum())

    def compute(self) -> Float[Tensor, ""]:
        """Return the metric over all records so far, a scalar; a share in 0..1 for the usual metrics, NaN without records."""
        return torch.as_tensor(self.definition.finish(self.sums.cpu().numpy()))


class PixelAccuracy(CountMetric):
    definition = DEFINITIONS["accuracy"]


class MeanIoU(CountMetric):
    definition = DEFINITIONS["miou_dataset"]


class ImageMeanIoU(CountMetric):
    definition = DEFINITIONS["miou_image"]


class ForegroundIoU(CountMetric):
    definition = DEFINITIONS["foreground_iou"]


class ImageAveragePrecision(CountMetric):
    definition = DEFINITIONS["ap_image"]


class ImageF1(CountMetric):
    definition = DEFINITIONS["f1_image"]


class ReleasedF1OverRows(CountMetric):
    definition = DEFINITIONS["released_f1_rowwise"]


class ReleasedMeanIoUFromAccuracy(CountMetric):
    definition = DEFINITIONS["released_miou_from_accuracy"]


class ReleasedTwoChannelAveragePrecision(CountMetric):
    definition = DEFINITIONS["released_ap_two_channel"]


class ReleasedTwoChannelMinmaxAveragePrecision(CountMetric):
    definition = DEFINITIONS["released_ap_two_channel_minmax"]


class ReleasedAccuracyVoidHalf(CountMetric):
    definition = DEFINITIONS["released_accuracy_void_half"]


class ReleasedMeanIoUVoidInUnion(CountMetric):
    definition = DEFINITIONS["released_miou_void_in_union"]


METRICS: dict[str, type[CountMetric]] = {kind.definition.name: kind for kind in CountMetric.__subclasses__()}


def metric(name: str, classes: tuple[int, ...] = (0, 1)) -> CountMetric:
    """A fresh metric under the name of its definition, one of an installed package included. Raises ConfigError."""
    definition = definition_of(name, "metric")
    kind = METRICS.get(definition.name) or type(definition.name, (CountMetric,), {"definition": definition})
    return kind(classes)
