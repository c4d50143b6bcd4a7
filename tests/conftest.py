"""No network, few threads, and no Hydra state from one test to the next."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from tempfile import gettempdir

import pytest
from loopback_only import refuse_sockets

# Read when torch and the loaders are imported, which no test module has done yet.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HYDRA_FULL_ERROR"] = "1"
# Nobody's own cache is written, and nothing that it holds is read.
os.environ["CONCEPTSEG_CACHE"] = os.path.join(gettempdir(), f"conceptseg-tests-{os.getpid()}")
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    # One, whoever runs the test: workers of pytest-xdist inherit what the process that starts them has set.
    os.environ.setdefault(threads, "1")
for rank in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(rank, None)

refuse_sockets()

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job starts so, and so would every command that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "rows of the lab table that are computed: all of them, or those that cover every model and family of methods once"
    parser.addoption("--lab-rows", default="all", choices=("all", "families"), help=text)


def pytest_collection_finish() -> None:
    """Libraries and collected tests live as long as the process: the collector need not go through them again and again.

    Nor after every 700 objects: composing alone makes a hundred thousand.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or native libraries report the objects as leaked when the process ends


@pytest.fixture(autouse=True)
def hydra_forgets() -> Iterator[None]:
    """Hydra keeps its search path in a singleton; a test that leaves it initialised would break the next."""
    yield
    if "hydra.core.global_hydra" in sys.modules:
        sys.modules["hydra.core.global_hydra"].GlobalHydra.instance().clear()


@pytest.fixture(autouse=True)
def logging_stays_on() -> Iterator[None]:
    """A test that switches warnings off for the whole process hides those that the next test waits for."""
    yield
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    assert disabled == logging.NOTSET, f"this test left logging.disable({disabled}) behind"
