"""The loop: keys -> batches -> maps -> labels -> rows. Everything else in this package is a part it is given."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float

from conceptseg.data.base import SegmentationDataset
from conceptseg.errors import ConceptSegError, DataError, StoreError
from conceptseg.extractors.base import Extractor
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.saliency.views import View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.cost import Stages
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Row
from conceptseg.types import Batch, Task

log = logging.getLogger(__name__)

Loaded = Task | Excluded | DataError

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
    """What one call did."""

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
    segmenters = {s.key: s for s in protocol.segmenters if extractor.comparable or s.decision != "argmax"}
    tally = Tally()
    todo: list[tuple[tuple[str, ...], tuple[View, ...]]] = []
    for chunk in shard.of(data.keys()):
        missing = {name for key in chunk for name in store.missing(key, by_key, segmenters, retry_failed)}
        if missing:
            todo.append((chunk, tuple(view for name, view in by_key.items() if name in missing)))
        else:
            tally.held += len(chunk)
    total, done = sum(len(chunk) for chunk, _ in todo), 0
    scorer = Scorer(store, protocol, segmenters, maps, tally, max_failures)

    def settle(job: Future[None], samples: int) -> None:
        nonlocal done
        _waited_for(job, tally.stages)
        done += samples
        on_progress(done, total)
        if tally.failed >= max_failures:
            raise StoreError(
                f"{tally.failed} samples failed, the last with: {tally.errors[-1]}\n"
                f"  Their rows are kept, with the reason. Mend the cause and run again with runtime.retry_failed=true, "
                f"or raise runtime.max_failures (now {max_failures})."
            )

    keys = [key for chunk, _ in todo for key in chunk]
    extractor.encode_texts(one for key in keys if isinstance(one := _loaded(data, protocol, key), Task))
    chunks = _prefetched(data, protocol, [c for c, _ in todo], tally.stages)
    with ThreadPoolExecutor(1, "scoring") as thread:
        waiting: deque[tuple[Future[None], int]] = deque()
        for (_, asked), loaded in zip(todo, chunks, strict=True):
            with tally.stages.timed("model"):
                answers = dict(_answers([one for one in loaded.values() if isinstance(one, Task)], asked, extractor))
            waiting.append((thread.submit(scorer, loaded, answers), len(loaded)))
            if len(waiting) > BEHIND:
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    return tally


def _waited_for(future: Future[Any], stages: Stages) -> Any:
    with stages.timed("waiting"):
        return future.result()


def _loaded(data: SegmentationDataset, protocol: SegmentationProtocol, key: str) -> Loaded:
    try:
        return protocol.prepare(data.read(key))
    except DataError as error:
        return error


def _prefetched(
    data: SegmentationDataset, protocol: SegmentationProtocol, chunks: Sequence[tuple[str, ...]], stages: Stages
) -> Iterator[dict[str, Loaded]]:
    """Read the next chunk in a thread while this one is computed."""

    def load(chunk: tuple[str, ...]) -> dict[str, Loaded]:
        found: dict[str, Loaded] = {}
        with stages.timed("reading"):
            for key in chunk:
                found[key] = _loaded(data, protocol, key)
        return found

    with ThreadPoolExecutor(1, "reading") as thread:
        coming = None
        for chunk in chunks:
            ready, coming = coming, thread.submit(load, chunk)
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
    """What the model says of one task: a map [C h w] a view, on the host, or why it failed."""

    maps: Mapping[str, np.ndarray]
    seconds: float
    """The task's share of its batch's time."""
    error: str = ""


def _answers(tasks: Iterable[Task], views: Sequence[View], extractor: Extractor) -> Iterator[tuple[str, Answer]]:
    """The answer to each task, by key."""
    for batch in _same_shape(tasks):
        yield from _batch_answers(batch, views, extractor)


def _batch_answers(batch: Batch, views: Sequence[View], extractor: Extractor) -> Iterator[tuple[str, Answer]]:
    """Answers to one batch. A sample that breaks its batch is found by running each alone."""
    started = time.perf_counter()
    try:
        found = {maps.view: maps.scores.detach().float().cpu().numpy() for maps in extractor.stream(batch, views)}
    except torch.OutOfMemoryError as error:
        raise StoreError(
            f"the device ran out of memory at {len(batch)} samples a batch ({error}).\n  Every row written before is kept. "
            f"Go on with runtime.batch_size={max(1, len(batch) // 2)}."
        ) from error
    except FAILURES as error:
        reason = _reason(error)
        if len(batch) > 1:
            for task in batch.tasks:
                yield from _batch_answers(Batch((task,)), views, extractor)
        else:
            yield batch.keys[0], Answer({}, time.perf_counter() - started, reason)
        return
    share = (time.perf_counter() - started) / len(batch)
    for number, key in enumerate(batch.keys):
        yield key, Answer({view: scores[number] for view, scores in found.items()}, share)


FAILURES = (ConceptSegError, RuntimeError, ValueError, ArithmeticError)
"""What may go wrong with one sample."""


def _reason(error: BaseException) -> str:
    """For the row of a sample that failed; raises it again where a setting is wrong, so that every sample would fail alike."""
    if isinstance(error, ConceptSegError) and not isinstance(error, DataError):
        raise error
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class Scorer:
    """Turns the answers of a chunk into rows, and writes them."""

    store: RunStore
    protocol: SegmentationProtocol
    segmenters: Mapping[str, Segmenter]
    keeper: MapKeeper | None
    tally: Tally
    max_failures: int

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
                rows = [row for view, maps in answer.maps.items() for row in self._view_rows(task, view, maps)]
            except FAILURES as raised:
                error = _reason(raised)
        if error:
            rows = [_whole(task.key, "failed", error)]
        for row in rows:
            row["seconds"] = round(answer.seconds + time.perf_counter() - started, 4)
        return rows

    def _view_rows(self, task: Task, view: str, maps: Float[np.ndarray, "C h w"]) -> Iterator[Row]:
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
            yield cast(Row, {**known, "segmenter": segmenter.key, "status": "ok", "words": words, **record})


def _whole(sample: str, status: str, reason: str) -> Row:
    """The row of a sample that has no other."""
    return cast(Row, {"sample": sample, "view": "*", "segmenter": "*", "status": status, "error": reason})
