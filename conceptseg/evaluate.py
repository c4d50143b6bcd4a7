"""The loop: keys -> batches -> maps -> labels -> rows. Everything else in this package is a part it is given."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from conceptseg.data.base import SegmentationDataset
from conceptseg.errors import ConceptSegError, DataError, StoreError
from conceptseg.extractors.base import Extractor
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.saliency.views import View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Row
from conceptseg.types import Batch, SaliencyMaps, Task

log = logging.getLogger(__name__)

Loaded = Task | Excluded | DataError


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
    """Compute the rows that are missing. Raises StoreError after `max_failures` failed samples; their rows are kept."""
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
    for (_, asked), loaded, seconds in zip(todo, _prefetched(data, protocol, [c for c, _ in todo]), _clock(), strict=False):
        rows: list[Row] = []
        tasks: list[Task] = []
        for key, one in loaded.items():
            if isinstance(one, Task):
                tasks.append(one)
            else:
                status = "excluded" if isinstance(one, Excluded) else "failed"
                reason = one.reason if isinstance(one, Excluded) else str(one)
                rows.append(cast(Row, {"sample": key, "view": "*", "segmenter": "*", "status": status, "error": reason}))
        for batch in _same_shape(tasks):
            rows += _batch_rows(batch, asked, extractor, protocol, segmenters, maps)
        share = seconds() / max(1, len(tasks))
        for row in rows:
            row["seconds"] = round(share, 4)
        store.append(rows)
        failed = {row["sample"]: row["error"] for row in rows if row["status"] == "failed"}
        for key, reason in failed.items():
            log.warning("%s failed: %s", key, reason)
        tally.failed += len(failed)
        tally.excluded += sum(row["status"] == "excluded" for row in rows)
        tally.computed += len({row["sample"] for row in rows if row["status"] == "ok"})
        tally.errors += list(failed.values())
        done += len(loaded)
        on_progress(done, total)
        if tally.failed >= max_failures:
            raise StoreError(
                f"{tally.failed} samples failed, the last with: {tally.errors[-1]}\n"
                f"  Their rows are kept, with the reason. Mend the cause and run again with runtime.retry_failed=true, "
                f"or raise runtime.max_failures (now {max_failures})."
            )
    return tally


def _clock() -> Iterator[Callable[[], float]]:
    while True:
        start = time.perf_counter()
        yield lambda start=start: time.perf_counter() - start  # type: ignore[misc]


def _prefetched(
    data: SegmentationDataset, protocol: SegmentationProtocol, chunks: Sequence[tuple[str, ...]]
) -> Iterator[dict[str, Loaded]]:
    """Read the next chunk in a thread while this one is computed."""

    def load(chunk: tuple[str, ...]) -> dict[str, Loaded]:
        found: dict[str, Loaded] = {}
        for key in chunk:
            try:
                found[key] = protocol.prepare(data.read(key))
            except DataError as error:
                found[key] = error
        return found

    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = None
        for chunk in chunks:
            ready, coming = coming, pool.submit(load, chunk)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()


def _same_shape(tasks: Iterable[Task]) -> Iterator[Batch]:
    """Batches of equally many concepts: a padding concept would join the attention and alter the maps."""
    groups: dict[int, list[Task]] = defaultdict(list)
    for task in tasks:
        groups[len(task.concepts)].append(task)
    for group in groups.values():
        yield Batch(tuple(group))


def _batch_rows(
    batch: Batch,
    views: Sequence[View],
    extractor: Extractor,
    protocol: SegmentationProtocol,
    segmenters: Mapping[str, Segmenter],
    keeper: MapKeeper | None,
) -> list[Row]:
    """Rows of one batch. A sample that breaks its batch is found by running each alone, and gets a failed row."""
    rows: list[Row] = []
    try:
        for maps in extractor.stream(batch, views):
            rows += _view_rows(batch, maps, protocol, segmenters, keeper)
    except torch.OutOfMemoryError as error:
        raise StoreError(
            f"the device ran out of memory at {len(batch)} samples a batch ({error}).\n  Every row written before is kept. "
            f"Go on with runtime.batch_size={max(1, len(batch) // 2)}."
        ) from error
    except (ConceptSegError, RuntimeError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConceptSegError) and not isinstance(error, DataError):
            raise  # a setting is wrong, so every sample would fail alike
        if len(batch) > 1:
            return [
                row for task in batch.tasks for row in _batch_rows(Batch((task,)), views, extractor, protocol, segmenters, keeper)
            ]
        reason = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        return [cast(Row, {"sample": batch.keys[0], "view": "*", "segmenter": "*", "status": "failed", "error": reason})]
    return rows


def _view_rows(
    batch: Batch,
    maps: SaliencyMaps,
    protocol: SegmentationProtocol,
    segmenters: Mapping[str, Segmenter],
    keeper: MapKeeper | None,
) -> Iterator[Row]:
    scores = maps.scores.detach().float().cpu().numpy()
    for task, one in zip(batch.tasks, scores, strict=True):
        known: dict[str, Any] = {"sample": task.key, "view": maps.view}
        if not np.isfinite(one).all():
            reason = (
                "the map holds NaN or infinity. Try extractor.backbone.dtype=float32 or bfloat16: float16 overflows in MM-DiTs."
            )
            for name in segmenters:
                yield cast(Row, {**known, "segmenter": name, "status": "failed", "error": reason})
            continue
        words = [w for w, label in zip(task.concepts.names, task.concepts.labels, strict=True) if label]
        for segmenter, record, prediction in protocol.score(task, one, segmenters.values()):
            if keeper is not None:
                keeper.keep(task, maps.view, segmenter.key, one, prediction)
            yield cast(Row, {**known, "segmenter": segmenter.key, "status": "ok", "words": words, **record})
