"""Every definition against closed forms, other implementations and literal re-tellings of released code."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from conceptseg import types
from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics.average_precision import foreground_average_precision, two_channel_average_precision
from conceptseg.metrics.counts import count
from conceptseg.metrics.definitions import DEFINITIONS, Definition, Rows, entering
from conceptseg.metrics.released import BACKGROUND, iou_from_accuracy
from conceptseg.metrics.reported import METRICS, CountMetric, PixelAccuracy, metric

EXACT = 1e-12


def record(sample, labels, truth, classes=(0, 1), scores=None):
    counts = count(np.uint8(labels), np.uint8(truth), classes)
    row = {name: getattr(counts, name) for name in counts.__slots__}
    row |= {name: list(row[name]) for name in ("classes", "inter", "pred", "label", "pred_void")}
    ap = {} if scores is None else {"foreground": foreground_average_precision(scores, np.uint8(truth))}
    return {"sample": sample, "view": "output", "segmenter": "mean", "status": "ok", "ap": ap, **row}


def random_records(n=6, void=0.1, seed=0):
    generator = np.random.default_rng(seed)
    truths = (generator.random((n, 9, 11)) < 0.3).astype(np.uint8)
    labels = np.where(generator.random(truths.shape) < 0.7, truths, 1 - truths)
    truths[generator.random(truths.shape) < void] = 255
    scores = labels + generator.normal(size=truths.shape)
    return labels, truths, [record(f"{i}", *pair, scores=scores[i]) for i, pair in enumerate(zip(labels, truths, strict=True))]


def value(name, records, **settings):
    return DEFINITIONS[name].value(Rows.from_records(records, **settings))


def test_the_oracle_scores_one_everywhere_and_its_inverse_has_no_iou():
    _, truths, _ = random_records(void=0)
    oracle = [record(f"{i}", truth, truth, scores=truth.astype(float)) for i, truth in enumerate(truths)]
    inverted = [record(f"{i}", 1 - truth, truth, scores=1.0 - truth) for i, truth in enumerate(truths)]
    for name in ("accuracy", "miou_dataset", "miou_image", "foreground_iou", "ap_image", "released_miou_from_accuracy"):
        assert value(name, oracle) == 1.0
        if name != "ap_image":
            assert value(name, inverted) == 0.0


def test_all_background_scores_half_its_share_and_the_published_miou_more():
    truths = np.zeros((2, 4, 5), np.uint8)
    truths[0, :2] = 1
    truths[1, 0] = 1
    records = [record(f"{i}", np.zeros_like(truth), truth) for i, truth in enumerate(truths)]
    q = 25 / 40
    assert value("accuracy", records) == pytest.approx(q, abs=EXACT)
    assert value("miou_dataset", records) == pytest.approx(q / 2, abs=EXACT)
    assert value("miou_image", records) == pytest.approx((0.5 / 2 + 0.75 / 2) / 2, abs=EXACT)
    assert value("foreground_iou", records) == 0.0
    assert value("released_miou_from_accuracy", records) == pytest.approx(q / (2 - q), abs=EXACT)


def literal_stacked(predict, target):
    """The released accuracy and IoU functions as utils/metrices.py computes them, on maps that may be stacks; -1 is ignored."""
    predict, target = predict + 1, target + 1
    labelled, correct = (target > 0).sum(), ((predict == target) & (target > 0)).sum()
    predict = predict * (target > 0)
    inter = predict * (predict == target)
    histograms = [np.histogram(values, bins=2, range=(1, 2))[0] for values in (inter, predict, target)]
    return correct, labelled, histograms[0], histograms[1] + histograms[2] - histograms[0]


def test_the_golden_example_of_the_spec():
    target, mask = np.array([[1, 1], [0, 0]]), np.array([[1, 0], [0, 0]])
    correct, labelled, inter, union = literal_stacked(np.stack([1 - mask, mask]), np.stack([1 - target, target]))
    assert (correct, labelled, inter.tolist(), union.tolist()) == (6, 8, [3, 3], [5, 5])
    assert value("released_miou_from_accuracy", [record("0", mask, target)]) == pytest.approx(0.6, abs=EXACT)
    assert value("miou_dataset", [record("0", mask, target)]) == pytest.approx((2 / 3 + 1 / 2) / 2, abs=EXACT)


def test_the_stacked_algorithm_is_a_function_of_accuracy():
    labels, truths, records = random_records(void=0)
    pairs = zip(labels.astype(int), truths.astype(int), strict=True)
    totals = [literal_stacked(np.stack([1 - mask, mask]), np.stack([1 - truth, truth])) for mask, truth in pairs]
    correct, labelled, inter, union = (sum(parts) for parts in zip(*totals, strict=True))
    assert value("accuracy", records) == pytest.approx(correct / labelled, abs=EXACT)
    assert value("released_miou_from_accuracy", records) == pytest.approx(np.mean(inter / union), abs=EXACT)
    assert value("released_miou_from_accuracy", records) > value("miou_dataset", records)


@pytest.mark.parametrize(("accuracy", "printed"), [(0.8307, 0.7104), (0.7492, 0.5990), (0.6452, 0.4762), (0.7780, 0.6367)])
def test_rows_of_the_papers_imagenet_table_lie_on_the_identity(accuracy, printed):
    assert iou_from_accuracy(np.float64(accuracy)) == pytest.approx(printed, abs=1e-4)  # four printed digits of both


def test_the_released_voc_accuracy_counts_void_half_wrong():
    labels, truths, records = random_records(void=0.1)
    pairs = zip(labels.astype(int), np.where(truths == 255, -1, truths.astype(int)), strict=True)
    totals = [literal_stacked(np.stack([1 - mask, mask]), np.stack([1 - truth, truth])) for mask, truth in pairs]
    correct, labelled, *_ = (sum(parts) for parts in zip(*totals, strict=True))
    assert value("released_accuracy_void_half", records) == pytest.approx(correct / labelled, abs=EXACT)
    assert value("released_accuracy_void_half", records) < value("accuracy", records)


def multiclass_records():
    """Each row lists background and the classes present in it, as the multi-class protocol offers them."""
    generator = np.random.default_rng(7)
    labels, truths, records = [], [], []
    for i, classes in enumerate([(0, 2, 5), (0, 5), (0, 9), (0, 2, 9, 11)]):
        label, truth = generator.choice(classes, size=(2, 8, 8)).astype(np.uint8)
        truth[generator.random(truth.shape) < 0.1] = 255
        labels.append(label)
        truths.append(truth)
        records.append(record(f"{i}", label, truth, classes))
    return np.stack(labels), np.stack(truths), records


def test_rows_with_other_classes_pool_over_their_union():
    labels, truths, records = multiclass_records()
    rows = Rows.from_records(records)
    assert rows.classes == (0, 2, 5, 9, 11)
    ious = MulticlassJaccardIndex(num_classes=21, average="none", ignore_index=255)(
        torch.from_numpy(labels.astype(int)), torch.from_numpy(truths.astype(int))
    ).numpy()[list(rows.classes)]
    assert value("miou_dataset", records) == pytest.approx(ious.mean(), abs=1e-6)  # torchmetrics returns float32
    assert value("foreground_iou", records) == pytest.approx(ious[1:].mean(), abs=1e-6)
    for name in DEFINITIONS:
        wide = value(name, records, classes=tuple(range(21)))
        np.testing.assert_allclose(wide, value(name, records), atol=EXACT)


def test_the_released_voc_multi_class_miou_keeps_void_in_the_union():
    labels, truths, records = multiclass_records()
    ious = []
    for k in range(21):
        inter, union = ((labels == k) & (truths == k)).sum(), ((labels == k) | (truths == k)).sum()
        if union > 0:
            ious.append(inter / union)
    assert value("released_miou_void_in_union", records) == pytest.approx(sum(ious) / (len(ious) + 1e-6), abs=EXACT)


def test_miou_image_is_the_mean_over_images_of_the_classes_that_occur_there():
    labels, truths, records = multiclass_records()
    per_image = []
    for label, truth in zip(labels, truths, strict=True):
        label = np.where(truth == 255, 255, label)
        parts = [((label == k) & (truth == k), (label == k) | (truth == k)) for k in range(21)]
        per_image.append(np.mean([inter.sum() / union.sum() for inter, union in parts if union.any()]))
    assert value("miou_image", records) == pytest.approx(np.mean(per_image), abs=EXACT)


def test_images_without_foreground_stay_out_of_ap_and_n_says_so():
    truths = np.uint8([[[0, 1, 1]], [[0, 0, 0]], [[1, 0, 0]]])
    scores = np.array([[[0.1, 0.8, 0.9]], [[0.1, 0.2, 0.3]], [[0.1, 0.2, 0.0]]])
    records = [record(f"{i}", truth, truth, scores=scores[i]) for i, truth in enumerate(truths)]
    assert records[1]["ap"]["foreground"] is None
    assert value("ap_image", records) == pytest.approx((1 + 1 / 2) / 2, abs=EXACT)
    assert entering(DEFINITIONS["ap_image"].statistics(Rows.from_records(records))).tolist() == [True, False, True]


def test_a_published_ap_of_zero_still_enters():
    row = record("0", [[0]], [[255]])
    row["ap"] = {"two_channel": two_channel_average_precision(np.ones((1, 1)), np.uint8([[255]]), minmax=False)}
    assert value("released_ap_two_channel", [row]) == 0.0
    assert np.isnan(value("released_ap_two_channel_minmax", [row]))


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=lambda definition: definition.name)
def test_every_definition_is_undefined_on_nothing_and_vectorised_over_leading_axes(definition: Definition):
    empty = Rows.from_records([], classes=(0, 1))
    assert np.isnan(definition.value(empty))
    _, _, records = random_records()
    for row in records:
        row["ap"] |= {"two_channel": 0.25, "two_channel_minmax": 0.5}
    sums = definition.statistics(Rows.from_records(records)).reshape(2, 3, -1)
    assert sums.dtype == np.float64
    finished = definition.finish(sums)
    assert finished.shape == (2, 3)
    np.testing.assert_array_equal(finished[1, 2], definition.finish(sums[1, 2]))
    assert definition.text.endswith(".") and definition.source.endswith(".")


def test_the_order_of_records_does_not_matter():
    _, _, records = random_records()
    assert Rows.from_records(records[::-1]).samples == Rows.from_records(records).samples
    for name in DEFINITIONS:
        np.testing.assert_array_equal(value(name, records[::-1]), value(name, records))


def changed(records, place, **fields):
    return [row | (fields if i == place else {}) for i, row in enumerate(records)]


def test_rows_that_cannot_be_pooled_are_refused():
    _, _, records = random_records()
    with pytest.raises(DataError, match="status"):
        Rows.from_records(changed(records, 2, status="failed"))
    with pytest.raises(DataError, match="more than one row, 0 the first"):
        Rows.from_records([*records, records[0]])
    with pytest.raises(DataError, match="2 views and segmenters"):
        Rows.from_records(changed(records, 1, view="cross"))
    with pytest.raises(DataError, match='1 values in "pred" for 2 classes'):
        Rows.from_records(changed(records, 1, pred=[4]))
    with pytest.raises(ConfigError, match=r"count classes \[1\] into classes \(0,\)"):
        Rows.from_records(records, classes=(0,))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_metric_object_gives_its_definitions_value_however_the_rows_arrive(name):
    _, _, records = random_records()
    for i, row in enumerate(records):
        row["ap"] |= {"two_channel": i / 10, "two_channel_minmax": i / 20}
    whole, parts = metric(name), [metric(name), metric(name)]
    whole.update(records)
    for part, rows in zip(parts, (records[:2], records[2:]), strict=True):
        part.update(rows)
    # What a distributed run does: states are summed (dist_reduce_fx="sum").
    parts[0].sums += parts[1].sums
    parts[0].n += parts[1].n
    expected = value(name, records)
    assert whole.compute().dtype == torch.float64
    assert whole.compute().item() == pytest.approx(expected, abs=EXACT, nan_ok=True)  # a single-class number of other rows
    assert parts[0].compute().item() == pytest.approx(expected, abs=EXACT, nan_ok=True)
    counted = 0 if np.isnan(expected) else len(records)
    assert whole.n.item() == parts[0].n.item() == counted
    assert whole.higher_is_better == DEFINITIONS[name].higher_is_better
    whole.reset()
    assert whole.n.item() == 0


def test_every_definition_has_a_metric_and_a_misspelt_one_is_named():
    assert METRICS.keys() == DEFINITIONS.keys()
    assert all(issubclass(kind, CountMetric) for kind in METRICS.values())
    with pytest.raises(ConfigError, match="miou_dataset"):
        metric("miou_datast")


def test_a_metric_works_in_lightnings_forward_and_with_many_classes():
    _, _, records = multiclass_records()
    accuracy = PixelAccuracy(classes=tuple(range(21)))
    batch_values = [accuracy([row]).item() for row in records]
    assert batch_values == pytest.approx([row["correct"] / row["valid"] for row in records])
    assert accuracy.compute().item() == pytest.approx(value("accuracy", records), abs=EXACT)


def test_reports_do_not_load_torch():
    code = "import sys, conceptseg.metrics.definitions, conceptseg.metrics.intervals, conceptseg.metrics.released as p"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], check=True)
    assert BACKGROUND == types.BACKGROUND
