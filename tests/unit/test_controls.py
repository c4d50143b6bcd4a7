"""Controls in closed form: what the protocols and metrics must give for the truth, its complement, nothing and noise.

q is the share of background among pixels that are not void.
"""

from functools import cache, partial

import numpy as np
import pytest
import torch
from composing import GROUPS, sheet

from conceptseg.errors import ConfigError
from conceptseg.extractors.controls import CentrePrior, ColourContrast, Constant, InvertedOracle, Oracle, RandomMap
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.targets import instantiate
from conceptseg.types import VOID, Batch, Sample, Task

SHEETS = {name: sheet("protocol", name) for name in GROUPS["protocol"]}
PROTOCOLS = list(SHEETS)
SINGLE = [name for name, one in SHEETS.items() if one["task"] == "single"]
MULTI = [name for name, one in SHEETS.items() if one["task"] == "multi" and one["background"]]
PLAIN = [name for name in PROTOCOLS if not any(s.get("pamr_steps") for s in SHEETS[name].get("segmenters", []))]
"""Protocols that score maps as they are: PAMR moves scores along the colours of the image, so that no control keeps its form."""
EXACT = 1e-12  # ratios of whole numbers in float64


@cache
def built(name):
    """By its sheet alone; tests/unit/test_protocols.py composes each."""
    return instantiate(SHEETS[name], "protocol")


def samples(classes=1, void=True):
    """Images whose objects are blocks of 32 pixels, so that no protocol's resizing loses one."""
    found = []
    for number in range(3):
        generator = np.random.default_rng(number)
        mask = np.zeros((224, 224), np.uint8)
        for label in range(1, classes + 1):
            y, x = 64 * label - 32, 32 * int(generator.integers(1, 4))
            mask[y : y + 32, x : x + 32 * (number + 1)] = label
        if void:
            mask[:16, : 32 * (number + 1)] = VOID
        image = generator.integers(0, 256, (224, 224, 3)).astype(np.uint8)
        found.append(Sample(f"made/{number}", image, mask, {1: "cat", 2: "dog"}, {}, {"cat": 1, "dog": 2}))
    return found


@cache
def scored(kind, name, void=True):
    """Rows of every segmenter of a protocol, by its key, for maps of a control, and the tasks they belong to.

    Read by many tests, changed by none.
    """
    extractor, protocol = kind(), built(name)
    tasks = [protocol.prepare(one) for one in samples(2 if protocol.task == "multi" else 1, void)]
    assert all(isinstance(task, Task) for task in tasks)
    rows = {segmenter.key: [] for segmenter in protocol.segmenters}
    for task, maps in zip(tasks, extractor.saliency(Batch(tuple(tasks))).numpy(), strict=True):
        for segmenter, record, _ in protocol.score(task, maps):
            rows[segmenter.key].append({"sample": task.key, "view": "map", "segmenter": segmenter.key, "status": "ok", **record})
    return {key: Rows.from_records(records) for key, records in rows.items()}, tasks


def value(name, rows):
    return DEFINITIONS[name].value(rows)


def background_share(tasks):
    valid = sum(int((task.truth != VOID).sum()) for task in tasks)
    return sum(int((task.truth == 0).sum()) for task in tasks) / valid


def honest(rows):
    """Segmenters without the released script's colliding relabelling, which no control can get right."""
    return {key: one for key, one in rows.items() if "colliding" not in key}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("metric", ["accuracy", "miou_dataset", "miou_image", "foreground_iou", "ap_image"])
def test_the_oracle_scores_one(name, metric):
    rows, _ = scored(Oracle, name)
    for one in honest(rows).values():
        assert value(metric, one) == pytest.approx(1, abs=EXACT)


@pytest.mark.parametrize("name", PLAIN)
def test_the_inverted_oracle_has_no_intersection(name):
    rows, _ = scored(InvertedOracle, name)
    assert {key: value("miou_dataset", one) for key, one in honest(rows).items()} == dict.fromkeys(honest(rows), 0.0)


@pytest.mark.parametrize("name", PLAIN)
def test_the_inverted_oracle_is_the_worst_ranking(name):
    """All f foreground pixels come after the b others: the mean over i = 1..f, entering together, is f / (f + b)."""
    rows, tasks = scored(InvertedOracle, name)
    shares = []
    for task in tasks:
        valid = task.truth != VOID
        shares.append(np.mean([(task.truth[valid] == k).mean() for k in task.classes[1:]]))
    for one in rows.values():
        assert value("ap_image", one) == pytest.approx(np.mean(shares), abs=EXACT)


@pytest.mark.parametrize("name", SINGLE)
def test_the_constant_has_half_the_background_share_as_mean_iou(name):
    rows, tasks = scored(Constant, name)
    q = background_share(tasks)
    for one in rows.values():
        assert value("accuracy", one) == pytest.approx(q, abs=EXACT)
        assert value("miou_dataset", one) == pytest.approx(q / 2, abs=EXACT)
        assert value("foreground_iou", one) == 0


@pytest.mark.parametrize("name", MULTI)
def test_the_constant_has_its_share_over_the_number_of_classes(name):
    rows, tasks = scored(Constant, name)
    q = background_share(tasks)
    for one in rows.values():
        assert value("accuracy", one) == pytest.approx(q, abs=EXACT)
        assert value("miou_dataset", one) == pytest.approx(q / 3, abs=EXACT)  # two classes and background


@pytest.mark.parametrize("name", SINGLE)
def test_the_published_mean_iou_of_the_constant_is_far_above_the_true_one(name):
    """The released ImageNet script passes the oracle and fails this: q / (2 - q) where q / 2 is right."""
    rows, tasks = scored(Constant, name)
    q = background_share(tasks)
    for one in rows.values():
        assert value("released_miou_from_accuracy", one) == pytest.approx(q / (2 - q), abs=EXACT)
        assert value("released_miou_from_accuracy", one) > value("miou_dataset", one) + 0.2


@pytest.mark.parametrize("name", SINGLE)
def test_the_published_mean_iou_passes_the_oracle(name):
    rows, _ = scored(Oracle, name)
    assert all(value("released_miou_from_accuracy", one) == pytest.approx(1, abs=EXACT) for one in rows.values())


@pytest.mark.parametrize("name", PLAIN)
def test_the_average_precision_of_the_constant_is_the_share_of_foreground(name):
    rows, tasks = scored(Constant, name)
    shares = []
    for task in tasks:
        valid = task.truth != VOID
        shares.append(np.mean([(task.truth[valid] == k).mean() for k in task.classes[1:]]))
    for one in rows.values():
        assert value("ap_image", one) == pytest.approx(np.mean(shares), abs=EXACT)


def test_the_average_precision_of_noise_is_the_share_of_foreground_in_the_long_run():
    rows, tasks = scored(partial(RandomMap, grid=224), "imagenet_standard")
    share = np.mean([(task.truth[task.truth != VOID] == 1).mean() for task in tasks])
    # 50,000 independent pixels an image, a few thousand of them foreground: the spread of the mean precision is near 0.002.
    assert all(value("ap_image", one) == pytest.approx(share, abs=0.01) for one in rows.values())


@pytest.mark.parametrize("name", SINGLE)
def test_without_void_the_void_variants_equal_the_plain_ones(name):
    rows, _ = scored(CentrePrior, name, void=False)
    for one in rows.values():
        assert value("released_accuracy_void_half", one) == pytest.approx(value("accuracy", one), abs=EXACT)


# ---------------------------------------------------------------- the maps themselves


def batch(name="scenes_single"):
    protocol = built(name)
    return Batch(tuple(protocol.prepare(one) for one in samples(2 if protocol.task == "multi" else 1)))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_oracle_gives_every_pixel_to_one_channel_of_its_class(name):
    given = batch(name)
    for task, maps in zip(given.tasks, Oracle().saliency(given).numpy(), strict=True):
        wanted = np.where(task.truth == VOID, 0, task.truth)
        asked = np.isin(wanted, task.concepts.labels)  # a protocol without background words asks for nothing there
        assert (maps.sum(0) == asked).all() and asked.any()
        labels = np.asarray(task.concepts.labels)[maps.argmax(0)]
        assert np.array_equal(labels[asked], wanted[asked])


def test_the_oracle_on_a_grid_says_what_share_of_a_cell_a_class_has():
    given = batch()
    task, whole, coarse = given.tasks[0], Oracle().saliency(given)[0], Oracle(4).saliency(given)[0]
    high, wide = np.array(task.truth.shape) // 4
    assert coarse.shape == (len(task.concepts), 4, 4)
    for row, column in np.ndindex(4, 4):
        cell = whole[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        torch.testing.assert_close(coarse[:, row, column], cell.mean((1, 2)))
    assert coarse.amax(0).min() > 0 and ((coarse > 0) & (coarse < 1)).any()


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_inverted_oracle_favours_every_word_but_the_true_one(name):
    given = batch(name)
    for task, maps in zip(given.tasks, InvertedOracle().saliency(given), strict=True):
        for label, one in zip(task.concepts.labels, maps, strict=True):
            true_here = torch.from_numpy((task.truth == label) | ((task.truth == 255) & (label == 0)))
            assert torch.equal(one == 0, true_here)


def test_the_constant_lets_every_background_word_win_everywhere():
    given = batch()
    maps = Constant().saliency(given)
    labels = torch.tensor([task.concepts.labels for task in given.tasks])
    assert torch.equal(maps, (labels == 0).float()[:, :, None, None].expand_as(maps))


def test_noise_depends_on_the_sample_and_the_seed_alone():
    given = batch()
    maps = RandomMap(seed=1).saliency(given)
    turned = RandomMap(seed=1).saliency(Batch(given.tasks[::-1]))
    assert torch.equal(maps, turned.flip(0)) and not torch.equal(maps, RandomMap(seed=2).saliency(given))
    assert not torch.equal(maps[0], maps[1])


def test_noise_is_uniform():
    values = RandomMap(grid=64).saliency(batch()).flatten().sort().values
    quantiles = (torch.arange(len(values)) + 0.5) / len(values)
    assert (values - quantiles).abs().max() < 0.02  # 86,016 values: Kolmogorov's distance is below 0.007 at 0.1 %


def test_the_centre_prior_is_a_gaussian_around_the_middle():
    maps = CentrePrior(sigma=0.25, grid=4).saliency(batch())
    target, other = maps[0, 0], maps[0, 1]
    for y in range(4):
        for x in range(4):
            distance = ((y + 0.5) / 4 - 0.5) ** 2 + ((x + 0.5) / 4 - 0.5) ** 2
            assert target[y, x].item() == pytest.approx(np.exp(-distance / (2 * 0.25**2)), abs=1e-6)  # float32
    torch.testing.assert_close(other, 1 - target)


def test_colour_contrast_is_greatest_where_the_odd_colour_is():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:32, 16:32] = 1
    image = np.full((64, 64, 3), 40, np.uint8)
    image[mask == 1] = (250, 10, 10)
    task = built("scenes_single").prepare(Sample("made/odd", image, mask, {1: "cat"}))
    maps = ColourContrast(grid=32).saliency(Batch((task,)))[0]
    inside = torch.from_numpy(mask[1::2, 1::2] == 1)
    target = maps[task.concepts.target]
    assert target.max() == 1 and target[inside].min() > target[~inside].max()


def test_colour_contrast_of_one_colour_is_nothing():
    image, mask = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64), np.uint8)
    mask[:8] = 1
    task = built("scenes_single").prepare(Sample("made/flat", image, mask, {1: "cat"}))
    maps = ColourContrast().saliency(Batch((task,)))[0]
    # Rounding of the mean leaves 1e-7 before the scaling to the greatest contrast, whose floor is 1e-6.
    assert maps[task.concepts.target].max() < 0.5


def test_settings_are_taken_up_to_the_ends_of_their_ranges():
    for kind, key, taken, refused in (
        (CentrePrior, "sigma", (1e-3, 1e3), (0.0005, 1000.5)),
        (CentrePrior, "grid", (1, 2048), (0, 2049)),
        (ColourContrast, "grid", (1, 2048), (0, 2049)),
    ):
        assert all(kind(**{key: value}) for value in taken)
        for wrong in refused:
            with pytest.raises(ConfigError, match=rf"extractor\.{key} is {wrong}; wanted "):
                kind(**{key: wrong})
