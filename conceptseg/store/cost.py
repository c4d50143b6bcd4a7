"""Cost of a run: seconds, also by stage, peak memory and forward passes, summed over all processes. Never part of a row."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conceptseg.files import write_atomically

log = logging.getLogger(__name__)


class Stages(dict[str, float]):
    """Seconds by stage, each timed by one thread.

    "model" and "waiting" (for the other threads) by the loop's own, "reading" by the one that reads ahead, "metrics", "pictures"
    and "rows" by the one that writes behind.
    """

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + time.perf_counter() - started


@dataclass(slots=True)
class Cost:
    """Costs of a run so far."""

    images: int = 0
    """Images that were computed, in any process."""
    seconds: float = 0.0
    """Wall time of the loops, added over processes."""
    peak_bytes: int = 0
    """Most memory that one process held: on the accelerator where there is one, else resident in the process."""
    accelerator: bool = False
    """Whether `peak_bytes` is of an accelerator."""
    forward_passes: int | None = None
    """Calls of the backbone's network, each with a whole batch and all its noise draws; None for methods that do not count."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, added over processes; see `Stages`."""

    @property
    def passes_per_image(self) -> float | None:
        """Calls over images: below 1 where several images share a call."""
        return self.forward_passes / self.images if self.forward_passes is not None and self.images else None

    @property
    def harness_share(self) -> float | None:
        """Share of the wall time in which the model did not work; None where stages were not recorded."""
        return 1 - self.stages["model"] / self.seconds if self.stages and self.seconds else None


@contextmanager
def measured(folder: Path, shard: int, count: int, extractor: Any) -> Iterator[Cost]:
    """Adds what happens inside to the shard's own file; set `images` and `stages` on the yielded cost. Writes nothing if no image
    was computed."""
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before, start = _passes(extractor), time.perf_counter()
    cost = Cost(accelerator=cuda)
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        scale = 1 if sys.platform == "darwin" else 1024
        cost.peak_bytes = (
            torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
        )
        after = _passes(extractor)
        cost.forward_passes = None if after is None else after - (before or 0)
        if cost.images:
            path = folder / f"cost-{shard}of{count}.json"
            try:
                write_atomically(path, (json.dumps(asdict(_added(_read(path), cost) or cost)) + "\n").encode())
            except OSError as error:  # no number rests on it
                log.warning("writing %s: %s. The costs of this call are not recorded.", path, error.strerror)


def read_cost(folder: Path) -> Cost | None:
    """Costs of all shards together; None for a run that has recorded none. A damaged file is left out, with a warning."""
    found: Cost | None = None
    for path in sorted(folder.glob("cost-*.json")):
        found = _added(found, _read(path))
    return found


def _passes(extractor: Any) -> int | None:
    return getattr(getattr(extractor, "backbone", None), "forward_passes", None)


def _read(path: Path) -> Cost | None:
    try:
        held = json.loads(path.read_bytes())
        cost = Cost(**held)
        if fault := _fault(cost):
            raise ValueError(fault)
        return cost
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        log.warning("%s is damaged (%s): what it recorded is left out of the run's costs.", path, error)
        return None


def _fault(cost: Cost) -> str | None:
    """Why a record can't be one of `measured`'s."""
    if not isinstance(cost.accelerator, bool) or not isinstance(cost.stages, dict):
        return "accelerator and stages have the wrong type"
    whole = [cost.images, cost.peak_bytes, *([] if cost.forward_passes is None else [cost.forward_passes])]
    if not all(type(n) is int and n >= 0 for n in whole):
        return "images, peak_bytes and forward_passes must be whole numbers, 0 or more"
    if not all(type(n) in (int, float) and 0 <= n < math.inf for n in [cost.seconds, *cost.stages.values()]):
        return "seconds must be 0 or more"
    return None


def _added(held: Cost | None, more: Cost | None) -> Cost | None:
    if held is None or more is None:
        return held or more
    passes = None
    if held.forward_passes is not None and more.forward_passes is not None:
        passes = held.forward_passes + more.forward_passes
    return Cost(
        held.images + more.images, held.seconds + more.seconds, max(held.peak_bytes, more.peak_bytes),
        held.accelerator or more.accelerator, passes,
        {name: held.stages.get(name, 0.0) + more.stages.get(name, 0.0) for name in {**held.stages, **more.stages}},
    )  # fmt: skip
