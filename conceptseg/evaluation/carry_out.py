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
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape

from conceptseg.errors import Interrupted
from conceptseg.evaluation.assemble import Evaluation
from conceptseg.evaluation.loop import Tally, evaluate
from conceptseg.evaluation.weights import provide_weights
from conceptseg.logs import logged_to
from conceptseg.store.cost import measured

log = logging.getLogger(__name__)

GRACE = 30.0
"""Seconds from SIGTERM until a process ends even if a thread hangs."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came. No SystemExit, which a method may raise, too."""


@dataclass(slots=True)
class Series:
    """How far the runs of a table are."""

    total: int
    """Runs that the table has."""
    begun: int = 0
    computing: list[float] = field(default_factory=list)
    """Seconds of each run so far that had something to compute."""

    @property
    def place(self) -> str:
        return f"run {self.begun} of {self.total}"

    @property
    def seconds_left(self) -> float | None:
        """Estimate for the runs after this one; None before the first had something to compute, and after the last."""
        if not self.computing or self.begun == self.total:
            return None
        return (self.total - self.begun) * sum(self.computing) / len(self.computing)


def duration(seconds: float) -> str:
    """
    >>> [duration(s) for s in (0.42, 42.3, 161, 7300)]
    ['0.4 s', '42 s', '2 min 41 s', '2 h 1 min']
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def carry_out(evaluation: Evaluation, title: str = "", series: Series | None = None) -> Tally:
    """Compute what is missing, with a progress bar where there is a terminal and a line at the end.

    title: what a reader calls the run, its id unless said. series: the table's runs, of which this one is the next. Raises
    Interrupted, which says how many rows are kept, on Ctrl-C and SIGTERM, and ConfigError for what is refused only as the model
    runs; a run without a row then leaves no folder.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    runtime, shard, folder = evaluation.config["runtime"], evaluation.shard, evaluation.store.folder
    if runtime["threads"]:
        torch.set_num_threads(runtime["threads"])
    take_own_accelerator()
    with evaluation.store.withdrawn_if_refused():
        provide_weights(evaluation)
    if series is not None:
        series.begun += 1
    name = ", ".join(filter(None, [series.place if series else "", title or evaluation.run_id]))
    left = "" if series is None or series.seconds_left is None else f"; then about {duration(series.seconds_left)}"
    console = Console(file=sys.stderr)
    shown = runtime["progress"] and runtime["verbosity"] != "quiet" and shard.index == 0 and console.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn(escape(left)),
    )
    started = time.monotonic()
    with evaluation.store.withdrawn_if_refused(), logged_to(folder / f"log-{shard.index}of{shard.count}.txt"):
        try:
            with (
                ending_in_order(),
                evaluation.store as store,
                measured(store.folder, shard.index, shard.count, evaluation.extractor) as cost,
                Progress(*columns, console=console, disable=not shown, transient=True) as bar,
            ):
                task = bar.add_task(escape(name), total=None)
                tally = evaluate(
                    store, evaluation.dataset, evaluation.extractor, evaluation.protocol, evaluation.views, shard,
                    evaluation.maps if runtime["keep_maps"] else None, runtime["retry_failed"], runtime["max_failures"],
                    lambda done, total: bar.update(task, completed=done, total=total),
                )  # fmt: skip
                cost.images, cost.stages = tally.computed, tally.stages
        except KeyboardInterrupt as stop:
            evaluation.store.refresh()
            number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
            raise Interrupted(len(evaluation.store.rows()), 128 + number) from None
        if tally.computed and series is not None:
            series.computing.append(time.monotonic() - started)
        remaining = series.seconds_left if series is not None else None
        log.log(
            logging.DEBUG if shown and series is not None else logging.INFO,
            "%s (%s): %d samples computed, %d held already, %d excluded, %d failed%s", name, folder, tally.computed, tally.held,
            tally.excluded, tally.failed, "" if remaining is None else f"; about {duration(remaining)} left",
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
        raise Terminated

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
