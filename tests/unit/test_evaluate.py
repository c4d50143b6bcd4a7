"""The loop: reading ahead and scoring behind change no row and lose none."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conceptseg.errors import ConfigError, StoreError
from conceptseg.evaluation import loop
from conceptseg.evaluation.carry_out import Terminated, ending_in_order, take_own_accelerator
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


@pytest.mark.parametrize("how", [Terminated, KeyboardInterrupt, ConfigError])
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

    with pytest.raises(Terminated), ending_in_order():
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


def bad(kind):
    raise kind("no map")


BAD = {
    **{
        kind.__name__: lambda maps, kind=kind: bad(kind)
        for kind in (
            TypeError, KeyError, IndexError, AssertionError, AttributeError, MemoryError, OSError, RuntimeError, StopIteration,
            SystemExit,
        )
    },
    "None": lambda maps: None,
    "numpy": lambda maps: maps.numpy(),
    "too few images": lambda maps: maps[:-1],
    "too many images": lambda maps: torch.cat([maps, maps]),
    "too few words": lambda maps: maps[:, :1],
    "too many words": lambda maps: maps.repeat(1, 2, 1, 1),
    "no height": lambda maps: maps[:, :, 0],
    "an empty map": lambda maps: maps[:, :, :0],
    "a list": lambda maps: maps.tolist(),
    "complex numbers": lambda maps: maps.sparse_mask,
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_whatever_a_method_does_wrong_costs_its_samples_alone(run, tmp_path, kind):
    class Method(Random):
        def saliency(self, batch):
            maps = super().saliency(batch)
            return BAD[kind](maps) if KEYS[3] in batch.keys else maps

    tally = run(Method())
    assert (tally.computed, tally.failed) == (7, 1)
    assert rows(tmp_path)[KEYS[3]]["status"] == "failed" and rows(tmp_path)[KEYS[3]]["error"]
    (file,) = (tmp_path / "failures").iterdir()
    assert file.read_text().startswith(f"{KEYS[3]}\n") and "Traceback" in file.read_text()
    if kind == "KeyError":
        assert "in bad" in file.read_text()


def test_a_method_without_the_asked_views_costs_its_samples_alone(run):
    class Method(Random):
        def stream(self, batch, views):
            return iter(())

    with pytest.raises(StoreError, match="wanted \\['map'\\]"):
        run(Method(), max_failures=2)


def test_texts_that_can_not_be_encoded_at_once_do_not_end_the_run(run, caplog):
    class Method(Random):
        def encode_texts(self, tasks):
            raise TypeError("no texts")

    assert run(Method()).computed == 8 and "no texts" in caplog.text


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_batch_for_good_and_says_so(run, tmp_path, caplog, error):
    sizes = []

    def spoil(keys):
        sizes.append(len(keys))
        if len(keys) > 2:
            raise error("CUDA out of memory.")

    assert run(Random(spoil), size=8).computed == 8
    assert sizes == [8, 4, 2, 2, 2, 2] and caplog.text.count("out of memory at") == 2
    assert "runtime.batch_size=2" in caplog.text


def test_a_sample_that_needs_more_memory_than_there_is_fails_alone(run, tmp_path):
    def spoil(keys):
        if KEYS[3] in keys:
            raise MemoryError

    tally = run(Random(spoil))
    assert (tally.computed, tally.failed) == (7, 1) and rows(tmp_path)[KEYS[3]]["error"] == "MemoryError"


@pytest.mark.parametrize("part", ["rows", "failures"])
def test_a_full_disk_of_the_store_stops_the_run(run, monkeypatch, part):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if part == "rows":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(loop, "write_atomically", full)
    with pytest.raises(StoreError, match="is kept"):
        run(Random(lambda keys: bad(KeyError)))


def test_a_run_out_of_descriptors_stops_in_a_line_and_loses_nothing(run, tmp_path, monkeypatch):
    before, leaked, read = resource.getrlimit(resource.RLIMIT_NOFILE), [], Dots.read

    def leaking(self, key):
        while key == KEYS[4]:
            leaked.append(os.open(os.devnull, os.O_RDONLY))
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Dots, "read", leaking)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            with pytest.raises(StoreError, match=r"Too many open files(.|\n)*is kept"):
                run()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for file in leaked:
                os.close(file)
    assert rows(tmp_path).keys() <= {*KEYS[:4]}
    run()
    assert sorted(rows(tmp_path)) == KEYS and all(row["status"] == "ok" for row in rows(tmp_path).values())


def test_a_sample_that_can_not_be_read_fails_alone(run, tmp_path, monkeypatch):
    read = Dots.read
    monkeypatch.setattr(Dots, "read", lambda self, key: bad(KeyError) if key == KEYS[3] else read(self, key))
    tally = run()
    assert (tally.computed, tally.failed) == (7, 1) and "no map" in rows(tmp_path)[KEYS[3]]["error"]


HANG = """
import ctypes, json, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_evaluate as test
from conceptseg.evaluation import loop
from conceptseg.evaluation.carry_out import ending_in_order
from conceptseg.store.run import RunStore
folder = Path({folder!r})

def begin(case, what, numbers):
    hangs, many = threading.Event(), test.KEYS[4]

    def hang():
        hangs.set()
        while True:
            time.sleep(60)

    class Dots(test.Dots):
        def read(self, key):
            return hang() if key == many and what == "loader" else super().read(key)

    class Slow(test.SegmentationProtocol):
        def score(self, task, maps, segmenters=None):
            return hang() if task.key == many and what == "scorer" else super().score(task, maps, segmenters)

    def spoil(keys):
        if many in keys and what == "model":  # as in a kernel that never ends: no handler runs in the main thread
            signal.pthread_sigmask(signal.SIG_BLOCK, [2, 15])
            hangs.set()
            ctypes.CDLL(None).sleep(60)

    def interrupt():
        hangs.wait()
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with ending_in_order(grace=0.5), RunStore(folder / case) as store:
        test.evaluate(
            store, Dots(), test.Random(spoil), Slow("dots", 1, "single", ["sky"], [test.Segmenter("argmax")]), test.VIEWS,
            test.Shard(0, 1, 2),
        )

children = {{}}
for case, (what, numbers) in {cases!r}.items():
    (folder / case).mkdir()
    child = os.fork()
    if not child:  # ends as any process ends, at the end of the script
        signal.alarm(50)  # where nothing else ends it
        os.dup2(os.open(folder / f"{{case}}.err", os.O_CREAT | os.O_WRONLY), 2)
        begin(case, what, numbers)
        break
    children[case] = child
else:
    print(json.dumps({{case: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for case, child in children.items()}}))
"""
HANGS = {
    "loader": ("loader", (15,), 143), "model": ("model", (15,), 143), "model twice": ("model", (2, 2), 130),
    "scorer twice": ("scorer", (2, 2), 130),
}  # fmt: skip


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """(folder, exit status by case) of processes that hang: forked from one that has imported torch, two seconds each."""
    folder = tmp_path_factory.mktemp("hung")
    cases = {case: hang[:2] for case, hang in HANGS.items()}
    command = HANG.format(tests=str(Path(__file__).parent), folder=str(folder), cases=cases)
    ended = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return folder, json.loads(ended.stdout)


@pytest.mark.parametrize("case", HANGS)
def test_what_hangs_ends_at_the_second_interrupt_or_after_the_grace(hung, case):
    folder, codes = hung
    said = (folder / f"{case}.err").read_text()
    assert codes[case] == HANGS[case][2] and "Every row written before is kept" in said, said
    kept = {key.sample for key in RunStore(folder / case).rows()}
    assert {KEYS[0], KEYS[1]} <= kept and KEYS[4] not in kept


def test_the_time_of_every_stage_is_recorded(run):
    slow = Random(lambda keys: time.sleep(0.02))
    tally = run(slow)
    assert tally.stages["model"] >= 4 * 0.02
    assert {"reading", "waiting", "metrics", "rows"} <= set(tally.stages) and min(tally.stages.values()) >= 0
