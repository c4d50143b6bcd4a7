"""The loop: keys -> batches -> maps -> labels -> rows. Everything else in this package is a part it is given."""

from __future__ import annotations

import logging
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float

from conceptseg.data.base import SegmentationDataset
from conceptseg.errors import ConceptSegError, DataError, StoreError
from conceptseg.evaluation.perturbed import perturbed
from conceptseg.extractors.base import Extractor
from conceptseg.files import write_atomically
from conceptseg.metrics.installed import MapMetric
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.saliency.views import View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.cost import Stages
from conceptseg.store.lines import row_fault
from conceptseg.store.maps import MapKeeper, file_name
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Row
from conceptseg.types import Batch, Task
from conceptseg.windows import Windows

log = logging.getLogger(__name__)

Loaded = Task | Excluded | DataError
FAULTS = (Exception, SystemExit)
"""Raised by a method, a data set or a protocol, these do not end the run: some code calls exit() where it fails."""

BEHIND = 1
"""Chunks that may wait to be scored while the model works on the next one: what a kill costs beside the chunk in work."""


@dataclass(frozen=True, slots=True)
class Shard:
    """This process's share: every `count`-th batch of the full, ordered key list.

    Batches are cut before they are shared out and before finished samples are taken away, so that a sample always meets
    the same companions: resumed or sharded, rows come out the same to the last digit.
    """

    index: int = 0
    count: int = 1
    batch_size: int = 8

    def of(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        chunks = [tuple(keys[start : start + self.batch_size]) for start in range(0, len(keys), self.batch_size)]
        return chunks[self.index :: self.count]


@dataclass(slots=True)
class Tally:
    """Outcome of one call of the loop."""

    computed: int = 0
    held: int = 0
    failed: int = 0
    excluded: int = 0
    errors: list[str] = field(default_factory=list)
    stages: Stages = field(default_factory=Stages)

    def add(self, rows: Sequence[Row]) -> None:
        failed = {row["sample"]: row["error"] for row in rows if row["status"] == "failed"}
        for key, reason in failed.items():
            log.warning("%s failed: %s", key, reason)
        self.failed += len(failed)
        self.excluded += sum(row["status"] == "excluded" for row in rows)
        self.computed += len({row["sample"] for row in rows if row["status"] == "ok"})
        self.errors += list(failed.values())


def evaluate(
    store: RunStore,
    data: SegmentationDataset,
    extractor: Extractor,
    protocol: SegmentationProtocol,
    views: Mapping[str, View],
    shard: Shard,
    maps: MapKeeper | None = None,
    retry_failed: bool = False,
    max_failures: int = 20,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tally:
    """Compute the rows that are missing. Raises StoreError after `max_failures` failed samples; their rows are kept.

    One thread reads the next chunk and another scores and writes the last one while the model works on this one. Whatever else
    ends the loop, short of a kill, chunks that the model has answered are written first.
    """
    by_key = {view.key: view for view in views.values()}
    segmenters = {s.key: s for s in protocol.segmenters if extractor.comparable or not s.decision.startswith("argmax")}
    tally = Tally()
    todo: list[tuple[tuple[str, ...], tuple[View, ...]]] = []
    for chunk in shard.of(data.keys()):
        missing = {name for key in chunk for name in store.missing(key, by_key, segmenters, retry_failed)}
        if missing:
            todo.append((chunk, tuple(view for name, view in by_key.items() if name in missing)))
        else:
            tally.held += len(chunk)
    total, done = sum(len(chunk) for chunk, _ in todo), 0
    failures = Failures(store.folder / "failures")
    scorer = Scorer(store, protocol, segmenters, maps, tally, max_failures, failures)
    model = Model(extractor, failures, protocol.windows, tuple(m for m in protocol.measures if m.asks_again))

    def settle(job: Future[None], samples: int) -> None:
        nonlocal done
        _waited_for(job, tally.stages)
        done += samples
        on_progress(done, total)
        if tally.failed >= max_failures:
            raise StoreError(
                f"{tally.failed} samples failed, the last with: {tally.errors[-1]}\n"
                f"  Their rows are kept, with the reason; tracebacks are in {failures.folder}. Mend the cause and run again with "
                f"runtime.retry_failed=true, or raise runtime.max_failures (now {max_failures})."
            )

    keys = [key for chunk, _ in todo for key in chunk]
    load = partial(_loaded, data, protocol, failures)
    model.encode_texts(one for key in keys if isinstance(one := load(key), Task))
    chunks = _prefetched(load, [c for c, _ in todo], tally.stages)
    with ThreadPoolExecutor(1, "scoring") as thread:
        waiting: deque[tuple[Future[None], int]] = deque()
        for (_, asked), loaded in zip(todo, chunks, strict=True):
            with tally.stages.timed("model"):
                answers = dict(model.answers([one for one in loaded.values() if isinstance(one, Task)], asked))
            waiting.append((thread.submit(scorer, loaded, answers), len(loaded)))
            if len(waiting) > BEHIND:
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    return tally


def _waited_for(future: Future[Any], stages: Stages) -> Any:
    with stages.timed("waiting"):
        return future.result()


def _loaded(data: SegmentationDataset, protocol: SegmentationProtocol, failures: Failures, key: str) -> Loaded:
    try:
        return protocol.prepare(data.read(key))
    except DataError as error:
        return error
    except FAULTS as error:
        return DataError(failures.reason(key, error))


def _prefetched(load: Callable[[str], Loaded], chunks: Sequence[tuple[str, ...]], stages: Stages) -> Iterator[dict[str, Loaded]]:
    """Read the next chunk in a thread while this one is computed."""

    def load_chunk(chunk: tuple[str, ...]) -> dict[str, Loaded]:
        with stages.timed("reading"):
            return {key: load(key) for key in chunk}

    with ThreadPoolExecutor(1, "reading") as thread:
        coming = None
        for chunk in chunks:
            ready, coming = coming, thread.submit(load_chunk, chunk)
            if ready is not None:
                yield _waited_for(ready, stages)
        if coming is not None:
            yield _waited_for(coming, stages)


def _same_shape(tasks: Iterable[Task]) -> Iterator[Batch]:
    """Batches of equally many concepts: a padding concept would join the attention and alter the maps."""
    groups: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[len(task.concepts)].append(task)
    for group in groups.values():
        yield Batch(tuple(group))


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer of the model for one task: one map [C h w] per view, on the host, or the reason for the failure."""

    maps: Mapping[str, np.ndarray]
    seconds: float
    """The task's share of its batch's time."""
    error: str = ""
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """View -> name -> number of the metrics that asked the classifier again."""


@dataclass(slots=True)
class Model:
    """An extractor that may fail on a sample without ending the run."""

    extractor: Extractor
    failures: Failures
    windows: Windows | None = None
    """Squares in which each image is shown; None shows it whole."""
    reruns: Sequence[MapMetric] = ()
    """Metrics that ask the method's classifier again."""
    largest: int | None = None
    """Most samples a batch since the device ran out of memory; None before."""

    def encode_texts(self, tasks: Iterable[Task]) -> None:
        """Let the extractor encode all texts at once. Where it can't, each batch encodes its own, and fails for itself."""
        try:
            self.extractor.encode_texts(tasks)
        except FAULTS as error:
            reason = self.failures.reason("encode_texts", error)
            log.warning("encoding all texts at once failed: %s. Each batch encodes its own.", reason)

    def answers(self, tasks: Iterable[Task], views: Sequence[View]) -> Iterator[tuple[str, Answer]]:
        """The answer to each task, by key."""
        for batch in _same_shape(tasks):
            yield from self._batch_answers(batch, views)

    def _batch_answers(self, batch: Batch, views: Sequence[View]) -> Iterator[tuple[str, Answer]]:
        """Answers to one batch. A sample that breaks its batch is found by running each alone."""
        if self.largest is not None and len(batch) > self.largest:
            yield from self._in_parts(batch, views, self.largest)
            return
        started, size = time.perf_counter(), len(batch)
        try:
            found = self._maps(batch, views)
            again = [
                perturbed(self.extractor, task, maps, self.reruns) if self.reruns else {}
                for task, maps in zip(batch.tasks, found, strict=True)
            ]
        except FAULTS as error:
            full = _out_of_memory(error)
            reason = self.failures.reason(batch.keys[0] if size == 1 else "", error)
        else:
            share = (time.perf_counter() - started) / size
            for key, maps, measured in zip(batch.keys, found, again, strict=True):
                yield key, Answer(maps, share, measured=measured)
            return
        # Outside of "except", whose traceback holds the tensors of the batch that failed.
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if size == 1:
            yield batch.keys[0], Answer({}, time.perf_counter() - started, reason)
        elif full:
            self.largest = max(1, size // 2)
            log.warning(
                "out of memory at %d samples a batch (%s). Going on with %d; runtime.batch_size=%d begins with that.",
                size, reason, self.largest, self.largest,
            )  # fmt: skip
            yield from self._in_parts(batch, views, self.largest)
        else:
            yield from self._in_parts(batch, views, 1)

    def _maps(self, batch: Batch, views: Sequence[View]) -> list[dict[str, np.ndarray]]:
        """Maps [C h w] of every view, task by task; a task's windows are shown as many at a time as the batch has tasks."""
        if self.windows is None:
            return _maps(self.extractor, batch, views)
        whole = []
        for task in batch.tasks:
            parts, found = self.windows.cut(task), []
            for start in range(0, len(parts), len(batch)):
                found += _maps(self.extractor, Batch(tuple(parts[start : start + len(batch)])), views)
            size = (task.image.shape[0], task.image.shape[1])
            whole.append({view.key: self.windows.joined([maps[view.key] for maps in found], size) for view in views})
        return whole

    def _in_parts(self, batch: Batch, views: Sequence[View], size: int) -> Iterator[tuple[str, Answer]]:
        for start in range(0, len(batch), size):
            yield from self._batch_answers(Batch(batch.tasks[start : start + size]), views)


def _maps(extractor: Extractor, batch: Batch, views: Sequence[View]) -> list[dict[str, np.ndarray]]:
    """Maps [C h w] of every view on the host, task by task. Raises TypeError or ValueError where a method gave something else."""
    concepts, found = len(batch.concepts[0]), {}
    for maps in extractor.stream(batch, views):
        scores = maps.scores
        if not isinstance(scores, torch.Tensor):
            raise TypeError(f"view {maps.view}: scores are {type(scores).__name__}, wanted a torch.Tensor")
        if scores.ndim != 4 or tuple(scores.shape[:2]) != (len(batch), concepts) or 0 in scores.shape:
            raise ValueError(
                f"view {maps.view}: scores have shape {list(scores.shape)}, wanted [{len(batch)} images, {concepts} words, h, w]"
            )
        found[maps.view] = scores.detach().float().cpu().numpy()
    if found.keys() != (asked := {view.key for view in views}):
        raise ValueError(f"maps came for views {sorted(map(str, found))}, wanted {sorted(asked)}")
    return [{view: scores[number] for view, scores in found.items()} for number in range(len(batch))]


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    )


@dataclass(frozen=True, slots=True)
class Failures:
    """Tracebacks of failed samples, one file per sample."""

    folder: Path

    def reason(self, key: str, error: BaseException) -> str:
        """The error in a line, for the row of a sample that failed; its traceback is written unless the key is empty.

        Raises the error again where a setting is wrong, so that every sample would fail alike; StoreError for a full disk.
        """
        if isinstance(error, DataError):
            return str(error)
        if isinstance(error, ConceptSegError):
            raise error
        said = str(error)[:1000]
        if key:
            path = self.folder / f"{file_name(key)}.txt"
            text = f"{key}\n\n{''.join(traceback.format_exception(error))}"
            try:
                write_atomically(path, text.encode("utf-8", "backslashreplace"))
            except OSError as full:
                raise StoreError(
                    f"writing {path}: {full.strerror}. Every row written before is kept: free some space or change runtime.runs, "
                    "then run again."
                ) from full
        return f"{type(error).__name__}: {said}" if said else type(error).__name__


@dataclass(frozen=True, slots=True)
class Scorer:
    """Turns the answers of a chunk into rows, and writes them."""

    store: RunStore
    protocol: SegmentationProtocol
    segmenters: Mapping[str, Segmenter]
    keeper: MapKeeper | None
    tally: Tally
    max_failures: int
    failures: Failures

    def __call__(self, loaded: Mapping[str, Loaded], answers: Mapping[str, Answer]) -> None:
        if self.tally.failed >= self.max_failures:
            return  # the loop ends with the chunk before this one
        rows: list[Row] = []
        for key, one in loaded.items():
            if isinstance(one, Task):
                rows += self._task_rows(one, answers[key])
            elif isinstance(one, Excluded):
                rows.append(_whole(key, "excluded", one.reason))
            else:
                rows.append(_whole(key, "failed", str(one)))
        with self.tally.stages.timed("rows"):
            self.store.append(rows)
        self.tally.add(rows)

    def _task_rows(self, task: Task, answer: Answer) -> list[Row]:
        """Rows of one task; a single failed one where it can't be scored."""
        started = time.perf_counter()
        error, rows = answer.error, []
        if not error:
            try:
                rows = [
                    row
                    for view, maps in answer.maps.items()
                    for row in self._view_rows(task, view, maps, answer.measured.get(view, {}))
                ]
                if fault := next(filter(None, map(row_fault, rows)), None):
                    raise ValueError(f"the protocol's record can't be kept: {fault}")
            except FAULTS as raised:
                error = self.failures.reason(task.key, raised)
        if error:
            rows = [_whole(task.key, "failed", error)]
        for row in rows:
            row["seconds"] = round(answer.seconds + time.perf_counter() - started, 4)
        return rows

    def _view_rows(self, task: Task, view: str, maps: Float[np.ndarray, "C h w"], measured: Mapping[str, float]) -> Iterator[Row]:
        known: dict[str, Any] = {"sample": task.key, "view": view}
        if not np.isfinite(maps).all():
            reason = (
                "the map holds NaN or infinity. Try extractor.backbone.dtype=float32 or bfloat16: float16 overflows in MM-DiTs."
            )
            for name in self.segmenters:
                yield cast(Row, {**known, "segmenter": name, "status": "failed", "error": reason})
            return
        words = [w for w, label in zip(task.concepts.names, task.concepts.labels, strict=True) if label]
        with self.tally.stages.timed("metrics"):
            scored = list(self.protocol.score(task, maps, self.segmenters.values()))
        if self.keeper is not None:
            with self.tally.stages.timed("pictures"):
                for segmenter, _, prediction in scored:
                    self.keeper.keep(task, view, segmenter.key, maps, prediction)
        for segmenter, record, _ in scored:
            if measured:
                record["measured"] = {**record.get("measured", {}), **measured}
            yield cast(Row, {**known, "segmenter": segmenter.key, "status": "ok", "words": words, **record})


def _whole(sample: str, status: str, reason: str) -> Row:
    """The row of a sample that has no other."""
    return cast(Row, {"sample": sample, "view": "*", "segmenter": "*", "status": status, "error": reason})
