"""Metrics that ask a method's classifier again, for every view and sample; they run in the thread of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.errors import ConfigError
from conceptseg.extractors.base import WITHOUT_WORDS, Extractor
from conceptseg.metrics.installed import MapMetric
from conceptseg.metrics.perturbation import AGAIN
from conceptseg.segment.resize import bilinear
from conceptseg.types import BACKGROUND, Task


class Classifier(Protocol):
    """A backbone with `classifies`, as the loop asks it again. Named here, so that runs do not answer for a model's code."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images that it is shown."""

    def images(self, tasks: Sequence[Task]) -> Float[Tensor, "B 3 H W"]:
        """Return normalised images."""

    def run(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        """Return one logit per class."""

    def named(self, names: Sequence[str]) -> Any:
        """Return the classes of words."""


def classifier_of(extractor: Extractor, metrics: Sequence[MapMetric]) -> Classifier:
    """The classifier that a method reads. Raises ConfigError for a method that has none; no weights are read."""
    backbone: Any = extractor.parts().get("backbone")
    if not getattr(backbone, "classifies", False):
        raise ConfigError(
            f"protocol.measures names {', '.join(m.name for m in metrics)}, which ask a classifier again, and "
            f"{type(extractor).__name__} has none. Leave them out, or choose a method on a supervised ViT, such as "
            f"extractor=transinterp or attnlrp."
        )
    found: Classifier = backbone
    return found


def perturbed(
    extractor: Extractor, task: Task, maps: Mapping[str, Float[np.ndarray, "C h w"]], metrics: Sequence[MapMetric]
) -> dict[str, dict[str, float]]:
    """View -> name -> the metric's mean over the words of a task, or its value for the class that the model itself predicts."""
    backbone = classifier_of(extractor, metrics)
    with torch.no_grad():
        shown = backbone.images([task])
        asked = list(_explained(extractor, backbone, task, shown))
        found: dict[str, dict[str, float]] = {}
        for view, scores in maps.items():
            enlarged = bilinear(scores, backbone.image_size)
            found[view] = {
                metric.name: float(
                    np.mean(
                        [
                            AGAIN[metric.name](shown[0], enlarged[c], partial(_probability, backbone, k), task.key)
                            for c, k in asked
                        ]
                    )
                )
                for metric in metrics
            }
    return found


def _explained(extractor: Extractor, backbone: Classifier, task: Task, shown: Tensor) -> Iterator[tuple[int, int]]:
    """(channel, class) pairs: the predicted class for a method that is given no word, else each present word's."""
    if extractor.told in WITHOUT_WORDS:
        yield 0, int(backbone.run(shown).argmax(1))
        return
    for channel, (word, label) in enumerate(zip(task.concepts.names, task.concepts.labels, strict=True)):
        if label != BACKGROUND and channel not in task.concepts.distractors:
            index = backbone.named([word]).index
            assert index is not None
            yield channel, int(index)


def _probability(backbone: Classifier, index: int, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, " N"]:
    return torch.softmax(backbone.run(images).float(), dim=1)[:, index]
