"""Metrics that ask a method's classifier again, for every view and sample; they run in the thread of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def run(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B k"]:
        """Return the model's outputs."""

    def class_logits(self, output: Float[Tensor, "B k"], words: Sequence[str]) -> Float[Tensor, "B K"]:
        """Return one logit per class; a zero-shot classifier has the words among its classes."""

    def class_of(self, word: str, words: Sequence[str]) -> int:
        """Return the place of a word among the classes."""


def classifier_of(extractor: Extractor, metrics: Sequence[MapMetric]) -> Classifier:
    """The classifier that a method reads. Raises ConfigError for a method that has none; no weights are read."""
    backbone: Any = extractor.parts().get("backbone")
    if not getattr(backbone, "classifies", False):
        raise ConfigError(
            f"protocol.measures names {', '.join(m.name for m in metrics)}, which ask a classifier again, and "
            f"{type(extractor).__name__} has none. Leave them out, or choose a method on a supervised ViT or on CLIP, such as "
            f"extractor=transinterp or textspan."
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
        words = _present(task)
        if extractor.told in WITHOUT_WORDS:  # the map of any class word is that of the predicted class
            given = []
            asked = [(next(iter(words), 0), int(backbone.class_logits(backbone.run(shown), ()).argmax(1)))]
        else:
            given = list(words.values())
            asked = [(channel, backbone.class_of(word, given)) for channel, word in words.items()]
        found: dict[str, dict[str, float]] = {}
        for view, scores in maps.items():
            enlarged = bilinear(scores, backbone.image_size)
            found[view] = {}
            for metric in metrics:
                values = [
                    AGAIN[metric.name](shown[0], enlarged[channel], partial(_probability, backbone, index, given), task.key)
                    for channel, index in asked
                ]
                found[view][metric.name] = float(np.mean(values))
    return found


def _present(task: Task) -> dict[int, str]:
    """Channel -> class word, of those whose class is in the image."""
    named = enumerate(zip(task.concepts.names, task.concepts.labels, strict=True))
    return {c: word for c, (word, label) in named if label != BACKGROUND and c not in task.concepts.distractors}


def _probability(backbone: Classifier, index: int, words: Sequence[str], images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, " N"]:
    return torch.softmax(backbone.class_logits(backbone.run(images), words).float(), dim=1)[:, index]
