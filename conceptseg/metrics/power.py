"""Images that a paired comparison needs: from the images of two methods that were run."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import Definition, Rows
from conceptseg.metrics.intervals import paired_statistics


def paired_deviation(definition: Definition, rows_a: Rows, rows_b: Rows) -> float:
    """Return the standard deviation of one image's share in the difference of a and b, in the metric's unit; NaN below 3 images.

    By the jackknife, so that it holds for pooled metrics too; for a mean over images it is that of the differences per image.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 11. Raises DataError where they share no image.
    """
    a, b, _ = paired_statistics(definition, rows_a, rows_b)
    if len(a) < 3:
        return math.nan
    left_out = definition.finish(a.sum(axis=0) - a) - definition.finish(b.sum(axis=0) - b)
    return float(np.sqrt((len(a) - 1) * np.square(left_out - left_out.mean()).sum()))


def images_needed(deviation: float, difference: float, power: float = 0.8, level: float = 0.95) -> int | None:
    """Return the images with which a two-sided paired test finds a true `difference` with probability `power`; None for NaN.

    deviation: see `paired_deviation`, in the unit of `difference`. The sum is ((z(1 - alpha/2) + z(power)) deviation /
    difference)^2, alpha = 1 - level, and at least 2.

    >>> images_needed(0.2, 0.05)
    126

    Source: the normal approximation, as in Chow, Shao and Wang 2008, Sample Size Calculations in Clinical Research, section 3.1.
    Raises ConfigError for a difference of 0 or below.
    """
    if not difference > 0:
        raise ConfigError(f"--power is {100 * difference:g} points; wanted a difference above 0.")
    if math.isnan(deviation):
        return None
    z = float(norm.ppf((1 + level) / 2) + norm.ppf(power))
    return max(2, math.ceil((z * deviation / difference) ** 2))
