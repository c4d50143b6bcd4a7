"""Carry out an assembled evaluation: check it, compute the missing rows, end in order."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from conceptseg.evaluation.assemble import Evaluation
from conceptseg.evaluation.loop import Tally, evaluate
from conceptseg.store.cost import measured

log = logging.getLogger(__name__)


def carry_out(evaluation: Evaluation, title: str = "") -> Tally:
    """Compute what is missing, with a progress bar where there is a terminal."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runtime = evaluation.config["runtime"]
    if runtime["threads"]:
        torch.set_num_threads(runtime["threads"])
    take_own_accelerator()
    shown = runtime["progress"] and evaluation.shard.index == 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    from rich.console import Console

    shard = evaluation.shard
    with (
        ending_in_order(),
        evaluation.store as store,
        measured(store.folder, shard.index, shard.count, evaluation.extractor) as cost,
        Progress(*columns, console=Console(file=sys.stderr), disable=not shown, transient=True) as bar,
    ):
        task = bar.add_task(title or evaluation.run_id, total=None)
        tally = evaluate(
            store, evaluation.dataset, evaluation.extractor, evaluation.protocol, evaluation.views, evaluation.shard,
            evaluation.maps if runtime["keep_maps"] else None, runtime["retry_failed"], runtime["max_failures"],
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
        cost.images, cost.stages = tally.computed, tally.stages
    log.info(
        "%s: %d samples computed, %d held already, %d excluded, %d failed", evaluation.store.folder, tally.computed, tally.held,
        tally.excluded, tally.failed,
    )  # fmt: skip
    return tally


def take_own_accelerator() -> None:
    """Let "cuda" mean the accelerator of this process's number, where torchrun or accelerate started several on one machine."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def ending_in_order() -> Iterator[None]:
    """What schedulers send before they kill (SIGTERM) ends the loop like Ctrl-C does: what the model has answered is written."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set what a signal does
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
