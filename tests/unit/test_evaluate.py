"""The loop: reading ahead and scoring behind change no row and lose none."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

from conceptseg.errors import ConfigError, StoreError
from conceptseg.evaluation.carry_out import ending_in_order, take_own_accelerator
from conceptseg.evaluation.loop import Shard, evaluate
from conceptseg.extractors.base import OneView
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.run import RunStore
from conceptseg.types import Sample

KEYS = [f"dots/{i}" for i in range(8)]
VIEWS = {"map": View("map")}


class Dots:
    name = "dots"

    def keys(self):
        return KEYS

    def read(self, key):
        mask = np.zeros((8, 8), np.uint8)
        mask[:4] = 1
        return Sample(key, np.full((8, 8, 3), 9, np.uint8), mask, {1: "dot"})


class Random(OneView):
    """Maps from the key; `spoil` is called with every batch's keys first."""

    told, trained_on, version = "nothing", "nothing", 1

    def __init__(self, spoil=lambda keys: None):
        self.spoil = spoil

    def saliency(self, batch):
        self.spoil(batch.keys)
        return torch.stack([torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(int(k[5:]))) for k in batch.keys])


def protocol(**more):
    return SegmentationProtocol("dots", 1, "single", ["sky"], [Segmenter("argmax")], **more)


@pytest.fixture
def run(tmp_path):
    def start(extractor=None, size=2, scored=None, **more):
        store = RunStore(tmp_path)
        with store:
            return evaluate(store, Dots(), extractor or Random(), scored or protocol(), VIEWS, Shard(0, 1, size), **more)

    return start


def rows(tmp_path):
    return {key.sample: row for key, row in RunStore(tmp_path).rows().items()}


def test_the_model_works_on_the_next_batch_while_the_last_is_scored(run):
    answered, overlapped = threading.Event(), []

    class Slow(SegmentationProtocol):
        def score(self, task, maps, segmenters=None):
            overlapped.append(answered.wait(10))
            return super().score(task, maps, segmenters)

    def spoil(keys):
        if keys[0] != KEYS[0]:
            answered.set()

    run(Random(spoil), scored=Slow("dots", 1, "single", ["sky"], [Segmenter("argmax")]))
    assert overlapped[0]


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt, ConfigError])
def test_what_the_model_has_answered_is_written_before_the_loop_is_left(run, tmp_path, how):
    def spoil(keys):
        if keys[0] == KEYS[4]:
            raise how

    with pytest.raises(how):
        run(Random(spoil))
    assert sorted(rows(tmp_path)) == KEYS[:4]
    run()
    assert sorted(rows(tmp_path)) == KEYS


def test_a_warning_before_a_kill_writes_what_was_answered(run, tmp_path):
    def spoil(keys):
        if keys[0] == KEYS[4]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"), ending_in_order():
        run(Random(spoil))
    assert KEYS[:4] == sorted(rows(tmp_path))[:4] and len(rows(tmp_path)) < len(KEYS)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_processes_of_one_machine_take_an_accelerator_each(monkeypatch):
    taken = []
    for name, found in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}.items():
        monkeypatch.setattr(torch.cuda, name, found)
    take_own_accelerator()
    for rank in "013":
        monkeypatch.setenv("LOCAL_RANK", rank)
        take_own_accelerator()
    assert taken == [0, 1, 1]


def test_a_sample_that_can_not_be_scored_fails_alone(run, tmp_path):
    class Picky(SegmentationProtocol):
        def score(self, task, maps, segmenters=None):
            if task.key == KEYS[3]:
                raise ValueError("not this one")
            return super().score(task, maps, segmenters)

    tally = run(scored=Picky("dots", 1, "single", ["sky"], [Segmenter("argmax")]))
    assert (tally.computed, tally.failed) == (7, 1)
    assert rows(tmp_path)[KEYS[3]]["error"] == "ValueError: not this one"


def test_a_loop_with_too_many_failures_stops_with_all_rows_that_it_has(run, tmp_path):
    def spoil(keys):
        raise RuntimeError("no model")

    with pytest.raises(StoreError, match="2 samples failed"):
        run(Random(spoil), max_failures=2)
    assert sorted(rows(tmp_path)) == KEYS[:2]


def test_the_time_of_every_stage_is_recorded(run):
    slow = Random(lambda keys: time.sleep(0.02))
    tally = run(slow)
    assert tally.stages["model"] >= 4 * 0.02
    assert {"reading", "waiting", "metrics", "rows"} <= set(tally.stages) and min(tally.stages.values()) >= 0
