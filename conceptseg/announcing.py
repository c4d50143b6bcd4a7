"""Say what takes long before it starts, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

One = TypeVar("One")

log = logging.getLogger(__name__)

LONG = 2.0
"""Seconds after which even a step that is usually short is worth a line."""
SAY_AGAIN = 5.0
"""Seconds between two lines that say how far a step is."""


@contextmanager
def announced(what: str, usually_short: bool = False) -> Iterator[None]:
    """Log `what` before the body runs and its seconds after; with `usually_short`, only the seconds, if it took LONG."""
    log.log(logging.DEBUG if usually_short else logging.INFO, "%s ...", what)
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    log.log(logging.DEBUG if usually_short and seconds < LONG else logging.INFO, "%s: %.1f s", what, seconds)


def counted(ones: Sequence[One], what: str) -> Iterator[One]:
    """Yield each of `ones`; every SAY_AGAIN seconds, log how many of them are done. what: the step."""
    said = time.monotonic()
    for done, one in enumerate(ones):
        if done and time.monotonic() - said >= SAY_AGAIN:
            log.info("%s: %d of %d", what, done, len(ones))
            said = time.monotonic()
        yield one
