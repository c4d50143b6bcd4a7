"""Images needed: the deviation of paired differences, and the power that so many images have in a simulation."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.power import images_needed, paired_deviation


def rows(precisions):
    return Rows.from_records(
        {
            "sample": f"s/{i:03d}", "view": "v", "segmenter": "m", "status": "ok", "classes": [0, 1], "inter": [1, 1],
            "label": [1, 1], "pred": [1, 1], "pred_void": [0, 0], "valid": 100, "void": 0, "correct": round(100 * p),
            "ap": {"foreground": p},
        }
        for i, p in enumerate(precisions)
    )  # fmt: skip


def test_the_deviation_is_that_of_differences_per_image_and_the_images_have_the_power():
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.3, 0.7, (2, 60)).round(2)
    for metric in ("ap_image", "accuracy"):  # a mean over images; a pooled ratio whose images are of one size
        deviation = paired_deviation(DEFINITIONS[metric], rows(a), rows(b))
        assert deviation == pytest.approx(np.std(a - b, ddof=1), rel=1e-9)
    for difference in (0.03, 0.06):
        n = images_needed(deviation, difference)
        drawn = generator.normal(difference, deviation, (4000, n))
        found = (ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
        assert found == pytest.approx(0.8, abs=0.03)
    assert np.isnan(paired_deviation(DEFINITIONS["ap_image"], rows(a[:2]), rows(b[:2])))
    assert images_needed(float("nan"), 0.1) is None
    with pytest.raises(ConfigError, match="wanted a difference above 0"):
        images_needed(0.2, 0)
