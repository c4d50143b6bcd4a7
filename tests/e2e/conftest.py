"""Fixtures that run conceptseg as processes: offline, with few threads, each test in an empty folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from commands import TESTS, Commands, Warm

SITE = """
import importlib.util as util, os
spec = util.spec_from_file_location("loopback_only", {guard!r})
guard = util.module_from_spec(spec)
spec.loader.exec_module(guard)
guard.refuse_sockets({log!r})
"""


@pytest.fixture(scope="session")
def refused_sockets(tmp_path_factory) -> Path:
    """Where child processes list every attempt to reach another machine."""
    return tmp_path_factory.mktemp("sockets") / "refused.txt"


@pytest.fixture(scope="session")
def child_environment(tmp_path_factory, refused_sockets) -> dict[str, str]:
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE.format(guard=str(TESTS / "loopback_only.py"), log=str(refused_sockets)))
    # Children keep the bytecode of this package, so that the second one starts sooner; pip wrote that of the libraries.
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "COLUMNS": "200",
    }  # fmt: skip


@pytest.fixture(scope="session")
def libraries(child_environment, tmp_path_factory) -> Iterator[Warm]:
    """A process that has imported the libraries, and nothing of this package."""
    parent = Warm(child_environment, tmp_path_factory.mktemp("said"))
    yield parent
    parent.stop()


@pytest.fixture(scope="session")
def warm(child_environment, tmp_path_factory, libraries) -> Iterator[Warm]:
    parent = Warm(child_environment, tmp_path_factory.mktemp("said"), origin=libraries)
    yield parent
    parent.stop()


@pytest.fixture
def commands(warm, child_environment, tmp_path) -> Iterator[Commands]:
    mine = Commands(warm, tmp_path, child_environment)
    yield mine
    for started in mine.started:
        if started.ended is None:
            with suppress(ProcessLookupError):
                started.kill()
            started.wait()


@pytest.fixture(scope="module")
def shared(warm, child_environment, tmp_path_factory) -> Commands:
    """For what several tests of a module look at and none changes."""
    return Commands(warm, tmp_path_factory.mktemp("shared"), child_environment)
