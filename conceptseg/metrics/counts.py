"""One prediction against one truth, as integers."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from conceptseg.errors import ConfigError, DataError
from conceptseg.types import VOID, Counts


def count(labels: UInt8[np.ndarray, "H W"], truth: UInt8[np.ndarray, "H W"], classes: tuple[int, ...]) -> Counts:
    """Count pixels of prediction against ground truth for `classes`; void pixels (255) of the ground truth are kept apart.

    >>> count(np.uint8([[1, 0, 1]]), np.uint8([[1, 1, 255]]), (0, 1)).inter
    (0, 1)
    """
    if labels.shape != truth.shape:
        raise DataError(f"Cannot count: the prediction is {labels.shape} and the truth {truth.shape}; both must be one size.")
    if labels.dtype != np.uint8 or truth.dtype != np.uint8:
        raise DataError(f"Cannot count: got {labels.dtype} labels against {truth.dtype} truth; both must be uint8.")
    if len(set(classes)) != len(classes) or not all(0 <= index < VOID for index in classes):
        raise ConfigError(f"Cannot count classes {classes}: wanted distinct indices in 0..254 (255 is void).")

    cells = np.bincount(truth.ravel().astype(np.intp) * 256 + labels.ravel(), minlength=256 * 256).reshape(256, 256)
    in_truth, in_labels = np.flatnonzero(cells.sum(axis=1)), np.flatnonzero(cells.sum(axis=0))
    if strange := sorted(set(in_truth.tolist()) - {*classes, VOID}):
        raise DataError(f"Cannot count: the truth holds {strange}, but the task's classes are {classes} (and 255 for void).")
    if strange := sorted(set(in_labels.tolist()) - set(classes)):
        raise ConfigError(f"Cannot count: the segmenter predicted {strange}, but the task's classes are {classes}.")

    kept = list(classes)
    inter = cells[kept, kept]
    scored = cells[:VOID]
    void = int(cells[VOID].sum())
    return Counts(
        classes=classes,
        inter=tuple(inter.tolist()),
        pred=tuple(scored[:, kept].sum(axis=0).tolist()),
        label=tuple(cells[kept].sum(axis=1).tolist()),
        pred_void=tuple(cells[VOID, kept].tolist()),
        valid=truth.size - void,
        correct=int(inter.sum()),
        void=void,
    )
