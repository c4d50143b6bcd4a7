"""Carry out an assembled evaluation: check it, compute the missing rows, end in order."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from conceptseg.evaluation.assemble import Evaluation
from conceptseg.evaluation.loop import Tally, evaluate
from conceptseg.evaluation.weights import provide_weights
from conceptseg.store.cost import measured

log = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds from SIGTERM until a process ends even if a thread hangs."""


def carry_out(evaluation: Evaluation, title: str = "") -> Tally:
    """Compute what is missing, with a progress bar where there is a terminal."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runtime = evaluation.config["runtime"]
    if runtime["threads"]:
        torch.set_num_threads(runtime["threads"])
    take_own_accelerator()
    provide_weights(evaluation)
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
def ending_in_order(grace: float = GRACE) -> Iterator[None]:
    """End the loop on SIGTERM, which schedulers send before they kill, as on Ctrl-C: finished answers are written.

    Where that takes longer than `grace` seconds after SIGTERM, or Ctrl-C comes after another signal, the process ends at once,
    whatever a thread hangs in: a loader on a dead disk, the model, a scorer. No row that was written is lost.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set what a signal does
        yield
        return
    # The interpreter writes the signal's number into the pipe even while the main thread hangs in foreign code.
    heard, told = os.pipe()
    os.set_blocking(told, False)
    watcher = threading.Thread(target=_end_what_hangs, args=(heard, grace), daemon=True)
    watcher.start()
    before, pipe_before = signal.signal(signal.SIGTERM, leave), signal.set_wakeup_fd(told)
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGTERM, before)
        os.write(told, b"\0")
        watcher.join()
        os.close(told)
        os.close(heard)


def _end_what_hangs(heard: int, grace: float) -> None:
    """Read signals' numbers from a pipe until a 0; end the process at a SIGINT after another, or `grace` after SIGTERM."""
    earlier, deadline = False, math.inf
    while True:
        left = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([heard], [], [], left)
        for number in os.read(heard, 64) if ready else b"":
            if number == 0:
                return
            if number == signal.SIGINT and earlier:
                _end_now(number, "a second signal came")
            if number == signal.SIGTERM:  # schedulers may send it again
                deadline = min(deadline, time.monotonic() + grace)
            earlier = earlier or number in (signal.SIGINT, signal.SIGTERM)
        if time.monotonic() >= deadline:
            _end_now(signal.SIGTERM, f"a thread still hangs {grace:g} s after SIGTERM")


def _end_now(number: int, why: str) -> None:
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the progress bar hides it
    said = f"{show_cursor}conceptseg: {why}: ended. Every row written before is kept; the same command goes on from there.\n"
    with suppress(OSError):
        os.write(2, said.encode())
    os._exit(128 + number)
