"""The bootstrap: the same as a slow loop, deterministic, of honest coverage, fast."""

import math
import time

import numpy as np
import pytest

from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics import intervals
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.intervals import bootstrap, paired_difference

ACCURACY, MIOU, AP = (DEFINITIONS[name] for name in ("accuracy", "miou_dataset", "ap_image"))


def records(n, seed=0, right=0.8, pixels=100, prefix=""):
    """Rows of n images whose pixels are right with a chance drawn around `right` per image."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        foreground = int(generator.integers(10, 60))
        chance = np.clip(right + generator.normal(0, 0.1), 0, 1)
        hits = int(generator.binomial(foreground, chance))
        rejections = int(generator.binomial(pixels - foreground, chance))
        rows.append(
            {
                "sample": f"{prefix}{i:05d}", "view": "output", "segmenter": "mean", "status": "ok", "classes": [0, 1],
                "inter": [rejections, hits],
                "pred": [rejections + foreground - hits, hits + pixels - foreground - rejections],
                "label": [pixels - foreground, foreground],
                "pred_void": [0, 0], "valid": pixels, "correct": hits + rejections, "void": 0,
                "ap": {"foreground": None if i % 5 == 4 else float(chance)},
            }
        )  # fmt: skip
    return rows


def literal_bootstrap(definition, rows, resamples, seed):
    """One resample at a time, each a list of rows scored from scratch."""
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = [rows[i] for i in generator.integers(len(rows), size=len(rows))]
        values.append(definition.value(Rows.from_records([row | {"sample": str(i)} for i, row in enumerate(drawn)])))
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.parametrize("definition", [ACCURACY, MIOU, AP], ids=lambda definition: definition.name)
def test_equals_a_literal_loop(definition):
    rows = [row for row in records(12) if row["ap"]["foreground"] is not None]
    interval = bootstrap(definition, Rows.from_records(rows), resamples=40, seed=3)
    np.testing.assert_allclose([interval.low, interval.high], literal_bootstrap(definition, rows, 40, 3), atol=1e-12)
    assert interval.value == definition.value(Rows.from_records(rows))


def test_is_deterministic_and_independent_of_the_chunks(monkeypatch):
    rows = Rows.from_records(records(30))
    first = bootstrap(MIOU, rows, resamples=500, seed=1)
    assert bootstrap(MIOU, rows, resamples=500, seed=1) == first
    assert bootstrap(MIOU, rows, resamples=500, seed=2) != first
    monkeypatch.setattr(intervals, "CELLS_AT_ONCE", 30 * 7)
    chunked = bootstrap(MIOU, rows, resamples=500, seed=1)
    np.testing.assert_allclose([chunked.low, chunked.high], [first.low, first.high], atol=1e-12)


def test_a_95_percent_interval_holds_the_truth_about_95_times_in_100():
    truth = ACCURACY.value(Rows.from_records(records(20_000, seed=99)))
    inside = 0
    for seed in range(200):
        interval = bootstrap(ACCURACY, Rows.from_records(records(60, seed=seed)), resamples=400, seed=seed)
        inside += interval.low <= truth <= interval.high
    assert 178 <= inside <= 199  # binomial(200, 0.94), three standard deviations


def test_agrees_with_the_normal_interval_of_a_mean():
    rows = Rows.from_records(records(400))
    interval = bootstrap(AP, rows)
    values = rows.per_image["foreground"][~np.isnan(rows.per_image["foreground"])]
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.n == len(values) == 320
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * 2 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * 2 * half)


def test_one_image_has_a_value_and_no_interval_and_none_has_neither():
    one = bootstrap(ACCURACY, Rows.from_records(records(1)))
    assert one.n == 1 and one.value > 0 and math.isnan(one.low) and math.isnan(one.high)
    none = bootstrap(ACCURACY, Rows.from_records([], classes=(0, 1)))
    assert none.n == 0 and math.isnan(none.value) and math.isnan(none.low)


def test_a_method_against_itself_differs_by_nothing():
    rows = Rows.from_records(records(20))
    difference = paired_difference(MIOU, rows, rows, resamples=200)
    assert (difference.interval.value, difference.interval.low, difference.interval.high, difference.p) == (0, 0, 0, 1)


def test_pairing_sees_a_small_steady_gain_that_separate_intervals_miss():
    worse = records(80)
    better = [row | {"correct": row["correct"] + 1 + i % 2} for i, row in enumerate(worse)]
    a, b = Rows.from_records(better), Rows.from_records(worse)
    separate = bootstrap(ACCURACY, a), bootstrap(ACCURACY, b)
    assert separate[0].low < separate[1].high
    difference = paired_difference(ACCURACY, a, b)
    assert difference.interval.low > 0 and difference.p < 0.001
    assert difference.interval.value == pytest.approx(0.015)
    mirrored = paired_difference(ACCURACY, b, a)
    assert mirrored.interval.high == pytest.approx(-difference.interval.low) and mirrored.p == difference.p


def test_p_is_about_uniform_when_nothing_differs():
    small = [
        paired_difference(ACCURACY, Rows.from_records(records(50, 2 * s)), Rows.from_records(records(50, 2 * s + 1)), 300).p < 0.1
        for s in range(150)
    ]
    assert 4 <= sum(small) <= 29  # binomial(150, 0.11), three standard deviations


def test_pairs_are_matched_by_sample_and_n_says_how_many():
    rows = records(12)
    difference = paired_difference(ACCURACY, Rows.from_records(rows[:8]), Rows.from_records(rows[5:][::-1]), resamples=50)
    assert difference.interval.n == 3 and difference.interval.value == 0
    with pytest.raises(DataError, match="share no sample"):
        paired_difference(ACCURACY, Rows.from_records(rows), Rows.from_records(records(3, prefix="other/")))


def test_one_pair_has_no_p():
    rows = Rows.from_records(records(1))
    assert math.isnan(paired_difference(ACCURACY, rows, rows).p)


def test_senseless_settings_are_refused():
    rows = Rows.from_records(records(3))
    with pytest.raises(ConfigError, match="resamples=0"):
        bootstrap(ACCURACY, rows, resamples=0)
    with pytest.raises(ConfigError, match=r"level=95"):
        bootstrap(ACCURACY, rows, level=95)


def test_a_whole_data_set_takes_a_few_seconds():
    rows = Rows.from_records(records(4276))
    start = time.process_time()
    assert bootstrap(MIOU, rows).n == 4276
    assert time.process_time() - start < 10


def test_an_image_on_which_only_one_method_says_something_is_a_pair():
    silent, false_alarm = records(3), records(3)
    silent[1] |= {"inter": [100, 0], "pred": [100, 0], "label": [100, 0]}
    false_alarm[1] |= {"inter": [60, 0], "pred": [60, 40], "label": [100, 0]}
    for pair in ((silent, false_alarm), (false_alarm, silent)):
        difference = paired_difference(DEFINITIONS["foreground_iou"], *map(Rows.from_records, pair), resamples=50)
        assert difference.interval.n == 3
