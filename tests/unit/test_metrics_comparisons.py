"""Paired tests against literal loops; breakdowns, thresholds, seeds and clusters against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from conceptseg.errors import DataError
from conceptseg.metrics.breakdowns import by_class, by_size, by_word, clusters_by_word, worst_images
from conceptseg.metrics.comparisons import compare, holm
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.intervals import bootstrap, bootstrap_all
from conceptseg.metrics.seeds import seed_spread
from conceptseg.metrics.thresholds import best_cuts, curve, sensitivity

ACCURACY, MIOU, AP = (DEFINITIONS[name] for name in ("accuracy", "miou_dataset", "ap_image"))
WORDS = ("cat", "dog", "cow")


def record(i, foreground, hits, rejections, pixels=100, word="", **more):
    """One image: of `foreground` object pixels `hits` are found, of the others `rejections` are left alone."""
    return {
        "sample": f"{i:03d}", "view": "v", "segmenter": "mean", "status": "ok", "classes": [0, 1],
        "words": [word or WORDS[i % 3]], "inter": [rejections, hits], "label": [pixels - foreground, foreground],
        "pred": [rejections + foreground - hits, hits + pixels - foreground - rejections], "pred_void": [0, 0],
        "valid": pixels, "correct": hits + rejections, "void": 0, "ap": {"foreground": hits / foreground}, **more,
    }  # fmt: skip


def rows(n, seed, right=0.7):
    generator, truth = np.random.default_rng(seed), np.random.default_rng(7)
    found = []
    for i in range(n):
        foreground = int(truth.integers(5, 60))
        hits, rejections = generator.binomial(foreground, right), generator.binomial(100 - foreground, right)
        found.append(record(i, foreground, int(hits), int(rejections)))
    return Rows.from_records(found)


# ------------------------------------------------------------ paired tests


def exact_sign_flip_p(definition, a, b):
    """Every exchange of the two methods' images, both metrics scored from scratch."""
    sides = definition.statistics(a), definition.statistics(b)

    def gap(exchanged):
        first = sum(sides[e][i] for i, e in enumerate(exchanged))
        second = sum(sides[1 - e][i] for i, e in enumerate(exchanged))
        return abs(float(definition.finish(first) - definition.finish(second)))

    gaps = [gap(e) for e in itertools.product((0, 1), repeat=len(a))]
    return np.mean([g >= gaps[0] - 1e-12 for g in gaps])


@pytest.mark.parametrize("definition", [ACCURACY, MIOU, AP], ids=lambda d: d.name)
def test_the_sign_flip_test_is_the_exact_one_up_to_sampling(definition):
    a, b = rows(9, 1, 0.75), rows(9, 2, 0.68)
    (found,) = compare([definition], b, {"a": a}, resamples=20_000)["a"]
    exact = exact_sign_flip_p(definition, a, b)
    assert 0.01 < exact < 0.9
    assert found.p_sign_flip == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 20_000))


def test_a_method_against_itself_is_no_difference():
    a = rows(20, 1)
    (found,) = compare([MIOU], a, {"same": a}, resamples=500)["same"]
    assert (found.difference.value, found.p_bootstrap, found.p_sign_flip, found.win_rate) == (0, 1, 1, 0.5)


def test_p_of_the_sign_flip_is_uniform_where_nothing_differs():
    ps = [compare([ACCURACY], rows(30, 2 * s), {"x": rows(30, 2 * s + 1)}, resamples=300)["x"][0].p_sign_flip for s in range(200)]
    assert 2 <= sum(p < 0.05 for p in ps) <= 20 and 0.4 < np.mean(ps) < 0.6  # binomial(200, 0.05), three deviations


def test_wins_ties_and_losses_are_counted_image_by_image():
    a = Rows.from_records([record(i, 10, h, 90) for i, h in enumerate((9, 5, 5, 1))])
    b = Rows.from_records([record(i, 10, h, 90) for i, h in enumerate((4, 5, 2, 2))])
    (found,) = compare([ACCURACY], b, {"a": a}, resamples=10)["a"]
    assert (found.wins, found.ties, found.losses, found.win_rate) == (2, 1, 1, 0.625)


def test_only_shared_images_are_compared_and_n_says_how_many():
    (found,) = compare([ACCURACY], rows(20, 1), {"short": rows(12, 2)}, resamples=50)["short"]
    assert found.difference.n == 12
    with pytest.raises(DataError, match="share no sample"):
        compare([ACCURACY], rows(5, 1), {"x": Rows.from_records([record(900, 10, 5, 50)])}, resamples=50)


def test_many_at_once_are_what_each_is_alone():
    base, others = rows(25, 1), {"a": rows(25, 2), "b": rows(25, 3, 0.8), "short": rows(11, 4)}
    together = compare([ACCURACY, AP], base, others, resamples=200)
    for name, one in others.items():
        for mine, alone in zip(together[name], compare([ACCURACY, AP], base, {name: one}, resamples=200)[name], strict=True):
            assert (mine.difference.low, mine.p_bootstrap) == pytest.approx((alone.difference.low, alone.p_bootstrap))


@pytest.mark.parametrize(
    ("ps", "wanted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the textbook example of four tests
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02, float("nan")], [0.02, float("nan")]),
    ],
)
def test_holm_steps_down(ps, wanted):
    assert holm(ps) == pytest.approx(wanted, nan_ok=True)


# ------------------------------------------------------------ clusters


def test_a_bootstrap_by_cluster_is_a_literal_one_over_groups_of_images():
    all_rows = rows(12, 3)
    clusters = [words[0] for words in all_rows.words]
    mine = bootstrap(MIOU, all_rows, 400, 5, clusters=clusters)
    generator = np.random.default_rng(5)
    groups = [MIOU.statistics(all_rows)[[c == name for c in clusters]].sum(0) for name in sorted(WORDS)]
    drawn = [float(MIOU.finish(sum(groups[i] for i in generator.integers(3, size=3)))) for _ in range(400)]
    assert (mine.low, mine.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert mine.value == MIOU.value(all_rows) and mine.n == 12


def test_images_alike_within_a_word_make_the_cluster_interval_wider():
    alike = Rows.from_records([record(i, 50, 10 + 12 * (i % 3), 25, word=WORDS[i % 3]) for i in range(60)])
    by_image = bootstrap(ACCURACY, alike, 2000)
    by_cluster = bootstrap(ACCURACY, alike, 2000, clusters=list(clusters_by_word(alike).values()))
    assert by_cluster.high - by_cluster.low > 3 * (by_image.high - by_image.low)


def test_rows_without_words_cannot_be_clustered():
    with pytest.raises(DataError, match="name no word"):
        clusters_by_word(Rows.from_records([record(0, 10, 5, 50) | {"words": []}]))


# ------------------------------------------------------------ breakdowns


def test_words_and_sizes_part_the_images_and_each_part_is_scored_like_a_data_set():
    everything = rows(30, 4)
    words = by_word(everything, [MIOU], 50, 0.95)
    assert [part.name for part in words] == sorted(WORDS) and sum(part.n for part in words) == 30
    cats = everything.at([i for i, w in enumerate(everything.words) if w == ("cat",)])
    assert words[0].values["miou_dataset"] == bootstrap_all([(MIOU, cats)], 50)[0]
    sizes = by_size(everything, [MIOU], 50, 0.95)
    assert sum(part.n for part in sizes) == 30 and sizes[-1].name == "huge (30-100 %)"


def test_a_size_bin_holds_its_upper_end():
    edges = Rows.from_records([record(i, foreground, 1, 10) for i, foreground in enumerate((5, 6, 15, 30, 31))])
    assert [(part.name.partition(" ")[0], part.n) for part in by_size(edges, [ACCURACY], 10, 0.95)] == [
        ("small", 1), ("medium", 2), ("large", 1), ("huge", 1),
    ]  # fmt: skip


def test_class_iou_counts_only_images_that_offer_the_class():
    several = Rows.from_records(
        [
            record(0, 10, 5, 80) | {"classes": [0, 3], "words": ["cow"]},
            record(1, 20, 5, 70) | {"classes": [0, 8], "words": ["cat"]},
        ]
    )
    parts = {part.name: part for part in by_class(several, 20, 0.95)}
    assert parts["cow"].n == 1 and parts["cow"].values["iou"].value == pytest.approx(5 / (10 + 15 - 5))
    assert parts["background"].n == 2


def test_the_worst_images_are_the_least_values():
    ten = Rows.from_records([record(i, 10, i, 90) for i in range(10)])
    value, count = worst_images(ten, ACCURACY, 0.2)
    assert count == 2 and value == pytest.approx((0.90 + 0.91) / 2)


# ------------------------------------------------------------ thresholds and seeds


def cuts():
    """Three images whose best quantiles differ: 0.2, 0.5, 0.5."""
    hits = {"mean@x": (5, 5, 5), "quantile0.2@x": (9, 2, 2), "quantile0.5@x": (3, 8, 8)}
    return {s: Rows.from_records([record(i, 10, h, 90) | {"segmenter": s} for i, h in enumerate(hs)]) for s, hs in hits.items()}


def test_the_best_cuts_are_chosen_for_the_data_set_and_for_each_image():
    found = {s.rule: s for s in sensitivity(ACCURACY, cuts(), 200)}
    assert found["mean"].value.value == pytest.approx((95 * 3) / 300)
    assert found["best of data set"].cut == "quantile0.5@x"
    assert found["best of data set"].value.value == pytest.approx((93 + 98 + 98) / 300)
    assert found["best of each image"].value.value == pytest.approx((99 + 98 + 98) / 300)
    assert [q for q, _ in curve(ACCURACY, cuts(), 20)] == [0.2, 0.5]


def test_the_best_of_each_image_keeps_whole_rows():
    best = best_cuts(ACCURACY, list(cuts().values()))
    assert best.inter[:, 1].tolist() == [9, 8, 8] and best.correct.tolist() == [99, 98, 98]


def test_cuts_of_different_images_are_refused():
    uneven = cuts()
    uneven["mean@x"] = uneven["mean@x"].at([0, 1])
    with pytest.raises(DataError, match="different images"):
        sensitivity(ACCURACY, uneven, 10)


def test_the_spread_of_seeds_is_their_standard_deviation():
    by_seed = {str(s): Rows.from_records([record(i, 10, h, 90) for i in range(4)]) for s, h in enumerate((4, 6, 8))}
    spread = seed_spread([ACCURACY], by_seed)["accuracy"]
    assert (spread.mean, spread.standard_deviation, spread.range) == pytest.approx((0.96, 0.02, 0.04))
