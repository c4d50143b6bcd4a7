"""Say what takes long before it starts, and how long it took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LONG = 2.0
"""Seconds after which even a step that is usually short is worth a line."""


@contextmanager
def announced(what: str, usually_short: bool = False) -> Iterator[None]:
    """Log `what` before the body runs and its seconds after; with `usually_short`, only the seconds, if it took LONG."""
    log.log(logging.DEBUG if usually_short else logging.INFO, "%s ...", what)
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    log.log(logging.DEBUG if usually_short and seconds < LONG else logging.INFO, "%s: %.1f s", what, seconds)
