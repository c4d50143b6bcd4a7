"""Metrics of maps: closed forms for the controls, and each against its definition written out pixel by pixel."""

import json
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from conceptseg.extractors.controls import Constant, InvertedOracle, Oracle, RandomMap
from conceptseg.metrics.definitions import Rows, definition_of
from conceptseg.metrics.intervals import bootstrap
from conceptseg.metrics.measured import BOUNDARY, MEASURES
from conceptseg.metrics.reported import metric
from conceptseg.protocols import SegmentationProtocol
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Value
from conceptseg.report.results import Results
from conceptseg.report.selection import Selection
from conceptseg.segment.segmenter import Segmenter
from conceptseg.tables.table import columns_of
from conceptseg.types import VOID, Batch, Concepts, Sample, Task

PROTOCOL = SegmentationProtocol("here", 1, "multi", ["sea"], [Segmenter("argmax")], names="all", measures=list(MEASURES))
VOCABULARY = {"cat": 1, "dog": 2, "cow": 3}


@cache
def tasks():
    """Twelve images with void, a cat of 1/16 of the pixels or more, and in every other one a dog; no cow in any."""
    found = []
    for number in range(12):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:16, 4 : 12 + number] = 1
        if number % 2:
            mask[20:28, 16 : 26 + number % 5] = 2
        mask[:2] = VOID
        sample = Sample(f"made/{number}", np.zeros((32, 32, 3), np.uint8), mask, {1: "cat", 2: "dog"}, vocabulary=VOCABULARY)
        found.append(PROTOCOL.prepare(sample))
    return tuple(found)


def measured(maps):
    """Name -> value over the data set of maps [B C h w]."""
    rows = [
        {"sample": task.key, "view": "map", "segmenter": segmenter.key, "status": "ok", **record}
        for task, one in zip(tasks(), maps, strict=True)
        for segmenter, record, _ in PROTOCOL.score(task, one)
    ]
    return {name: definition_of(name, "columns").value(Rows.from_records(rows)) for name in MEASURES}, rows


def shares(pixels):
    """Mean over images, then words: share of the pixels that are not void for which pixels(truth, label) says yes."""
    values = []
    for task in tasks():
        valid = task.truth[task.truth != VOID]
        found = [pixels(valid, label) for label in (1, 2) if (valid == label).any()]
        values.append([share for share in found if share is not None])
    return float(np.mean([np.mean(v) for v in values if v]))


def test_the_controls_have_their_closed_forms():
    batch = Batch(tasks())
    own = shares(lambda truth, label: (truth == label).mean())
    oracle, _ = measured(Oracle().saliency(batch).numpy())
    assert {k: v for k, v in oracle.items() if not np.isnan(v)} == {
        "pointing_game": 1, "mass_accuracy": 1, "auroc": 1, "boundary_iou": 1, "leakage": 0,
    }  # fmt: skip
    assert np.isnan(oracle["leakage_absent"])  # the absent word's map is empty

    inverted, _ = measured(InvertedOracle().saliency(batch).numpy())
    assert [inverted[k] for k in ("pointing_game", "mass_accuracy", "auroc", "boundary_iou")] == [0, 0, 0, 0]
    others = shares(
        lambda truth, label: (
            None
            if len({1, 2} & set(truth)) < 2
            else np.isin(truth, (1, 2)).sum() / (truth != label).sum() - (truth == label).sum() / (truth != label).sum()
        )
    )
    assert inverted["leakage"] == pytest.approx(others, abs=1e-12)
    named = float(np.mean([np.isin(t.truth[t.truth != VOID], (1, 2)).mean() for t in tasks()]))
    assert inverted["leakage_absent"] == pytest.approx(named, abs=1e-12)

    constant, _ = measured(Constant().saliency(batch).numpy())
    assert constant["pointing_game"] == pytest.approx(own, abs=1e-12)
    assert (constant["mass_accuracy"], constant["auroc"], constant["boundary_iou"]) == (0, 0.5, 0)
    assert np.isnan(constant["leakage"])

    flat, rows = measured([np.ones((len(t.concepts), 4, 4), np.float32) for t in tasks()])
    assert flat["mass_accuracy"] == pytest.approx(own, abs=1e-12) == flat["pointing_game"]
    assert flat["leakage_absent"] == pytest.approx(named, abs=1e-12)
    assert sum("leakage" in row["measured"] and row["measured"]["leakage"] is not None for row in rows) == 6

    drawn = [measured(RandomMap(grid=32, seed=seed).saliency(batch).numpy())[0] for seed in range(20)]
    means = {name: (np.mean(v := [one[name] for one in drawn]), np.std(v) / 20**0.5) for name in MEASURES}
    for name, expected in {"mass_accuracy": own, "pointing_game": own, "auroc": 0.5, "leakage_absent": named}.items():
        mean, error = means[name]
        assert abs(mean - expected) < 4 * error, name


def literal(name, task, scores, labels):
    """The definition of a metric with a loop over pixels."""
    height, width = task.truth.shape
    pixels = [(y, x) for y, x in product(range(height), range(width)) if task.truth[y, x] != VOID]
    names = {v for v in task.concepts.labels if v}
    here = {int(task.truth[at]) for at in pixels} & names
    values = []
    if name == "boundary_iou":
        d = max(1, round(BOUNDARY * (height**2 + width**2) ** 0.5))

        def edge(mask, index):
            inside = {at for at in pixels if mask[at] == index}
            near = list(product(range(-d, d + 1), repeat=2))
            return {(y, x) for y, x in inside if any((y + dy, x + dx) not in inside for dy, dx in near)}

        for index in task.classes[1:]:
            truth, said = edge(task.truth, index), edge(labels, index)
            if truth or said:
                values.append(len(truth & said) / len(truth | said))
        return float(np.mean(values)) if values else None
    for channel, label in enumerate(task.concepts.labels):
        score = {at: float(scores[channel][at]) for at in pixels}
        mass = {at: max(0.0, s) for at, s in score.items()}
        own = [at for at in pixels if task.truth[at] == label]
        rest = [at for at in pixels if task.truth[at] != label]
        present, total = label in here, sum(mass.values())
        on_others = sum(mass[at] for at in pixels if task.truth[at] in names and task.truth[at] != label)
        if name == "pointing_game" and present:
            top = [at for at in pixels if score[at] == max(score.values())]
            values.append(sum(at in own for at in top) / len(top))
        if name == "mass_accuracy" and present:
            values.append(sum(mass[at] for at in own) / total if total else 0)
        if name == "auroc" and present and rest:
            wins = sum((score[p] > score[q]) + 0.5 * (score[p] == score[q]) for p in own for q in rest)
            values.append(wins / (len(own) * len(rest)))
        if name == "leakage" and present and len(here) > 1 and total:
            values.append(on_others / total)
        if name == "leakage_absent" and channel in task.concepts.distractors and here and total:
            values.append(on_others / total)
    return float(np.mean(values)) if values else None


def test_every_metric_is_its_definition_written_out():
    generator = np.random.default_rng(0)
    offenders = []
    for number in range(12):
        truth = generator.choice([0, 1, 2, VOID], (13, 17), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
        truth[3:9, 4:11] = number % 3
        concepts = Concepts(("sea", "cat", "dog", "cow"), (0, 1, 2, 3), None, (3,))
        task = Task("made", np.zeros((2, 2, 3), np.float32), truth, concepts, "", (0, 1, 2, 3))
        scores = generator.integers(-2, 4, (4, 13, 17)).astype(np.float32)  # ties and negative scores
        labels = np.kron(generator.integers(0, 4, (3, 3)), np.ones((5, 6)))[:13, :17].astype(np.uint8)
        for name, one in MEASURES.items():
            got, wanted = one.measure(task, scores, labels), literal(name, task, scores, labels)
            if wanted is None or got != pytest.approx(wanted, abs=1e-12):
                offenders.append((number, name, got, wanted))
    assert not offenders


def test_each_has_an_interval_and_a_torchmetrics_object():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand((len(t.concepts), 8, 8), generator=generator).numpy() for t in tasks()]
    values, rows = measured(maps)
    for name, value in values.items():
        interval = bootstrap(definition_of(name, "columns"), Rows.from_records(rows), resamples=200)
        assert interval.low < interval.value < interval.high, name
        counted = metric(name, classes=(0, 1, 2, 3))
        counted.update(rows)
        assert float(counted.compute()) == pytest.approx(value, abs=1e-12), name
        assert int(counted.n) == interval.n == (6 if name == "leakage" else 12)


def test_the_least_leakage_wins_its_column():
    column, other = columns_of(["leakage", "auroc"])
    rows = tuple(
        TableRow(
            name, "methods", "x", None, "lab", name, "v", "s", 8, 0, 0,
            {c.name: Value(v, v - 0.01, v + 0.01, 8) for c in (column, other)}, "ok", "",
        )
        for name, v in {"much": 0.4, "little": 0.2}.items()
    )  # fmt: skip
    block = Block("one", "data", "p v1", "", rows)
    assert (block.best(column), block.best(other)) == ("20.0", "40.0")
    table = Results("t", "T", "c", "1", (column, other), (block,), (), "")
    assert Results.from_json(json.loads(json.dumps(table.to_json())), "there").columns == (column, other)
    for by, first in {"leakage": "little", "auroc": "much"}.items():
        assert Selection(sort=by).brief(table).blocks[0].rows[0].name == first
