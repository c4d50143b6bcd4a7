"""Runs commands of conceptseg as processes, and reads what they leave behind without the package's help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
FAST = ("report.resamples=50", "report.pictures=2", "runtime.progress=false")
"""Settings that change no row."""

AS_PYTHON = """
import os, runpy, sys
try:
    {run}
except SystemExit as end:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else bool(end.code))
sys.stdout.flush()
os._exit(0)
"""


def as_python(what: str) -> str:
    """For `before`: does what `python what.py` or `python -m what` does, in a process that has the libraries already."""
    run = f'runpy.run_path({what!r}, run_name="__main__")'
    return AS_PYTHON.format(
        run=run if what.endswith(".py") else f'runpy.run_module({what!r}, run_name="__main__", alter_sys=True)'
    )


@dataclass
class Finished:
    """Output and exit code of a command."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Both streams as one line, so that a message is found wherever it was wrapped."""
        return " ".join((self.out + self.err).split())


@dataclass
class Warm:
    """Talks to warm.py; see there. It is forked from `origin`, with the folders `tree` in front of its path, or begins anew."""

    environment: Mapping[str, str]
    scratch: Path
    options: tuple[str, ...] = ()
    origin: Warm | None = None
    tree: tuple[Path, ...] = ()
    count: int = 0
    _pid: int = 0
    _asked: Any = None
    _answered: Any = None

    def _begin(self) -> None:
        if self.origin is None:
            command = [sys.executable, str(Path(__file__).with_name("warm.py")), *self.options]
            self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=self.environment)
            self._asked, self._answered = self._process.stdin, self._process.stdout
        else:
            pipes = {name: str(self.scratch / name) for name in ("asked", "answered")}
            for pipe in pipes.values():
                os.mkfifo(pipe)
            self._pid = self.origin.ask(tree=list(map(str, self.tree)), **pipes)
            self._asked = os.fdopen(os.open(pipes["asked"], os.O_WRONLY), "w")
            self._answered = os.fdopen(os.open(pipes["answered"], os.O_RDONLY))
        assert self._answered.readline() == "ready\n"

    def ask(self, **request: Any) -> int:
        if self._asked is None:
            self._begin()
        self._asked.write(json.dumps(request) + "\n")
        self._asked.flush()
        return int(self._answered.readline())

    def stop(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self.origin.ask(wait=self._pid) if self.origin else self._process.wait(timeout=30)
            self._answered.close()


@dataclass
class Started:
    """A command that runs."""

    pid: int
    warm: Warm
    out: Path
    err: Path
    ended: Finished | None = None

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Finished:
        if self.ended is None:
            code = self.warm.ask(wait=self.pid)
            self.ended = Finished(code, self.out.read_text(), self.err.read_text())
        return self.ended


@dataclass
class Commands:
    """One test's commands, run in its own empty folder."""

    warm: Warm
    folder: Path
    environment: Mapping[str, str]
    started: list[Started] = field(default_factory=list)

    def start(self, *args: str, name: str = "conceptseg", env: Mapping[str, str] | None = None, before: str = "") -> Started:
        """A process of its own, forked from a warm parent; `before` is Python that it runs first, to spoil something."""
        self.warm.count += 1
        out, err = (self.warm.scratch / f"{self.warm.count}.{stream}" for stream in ("out", "err"))
        more = FAST if name == "conceptseg" else ()
        pid = self.warm.ask(
            name=name, args=[*more, *args], cwd=str(self.folder), env=dict(env or {}), out=str(out), err=str(err), before=before
        )
        self.started.append(Started(pid, self.warm, out, err))
        return self.started[-1]

    def run(self, *args: str, code: int = 0, **more: Any) -> Finished:
        """Must end with `code`."""
        ended = self.start(*args, **more).wait()
        assert ended.code == code, f"ended with {ended.code}\n{ended.out}\n{ended.err}"
        return ended

    def run_cold(self, *command: str, code: int = 0, env: Mapping[str, str] | None = None) -> Finished:
        """`python <command>` from nothing."""
        said = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, cwd=self.folder, env={**self.environment, **(env or {})},
            timeout=280,
        )  # fmt: skip
        assert said.returncode == code, f"ended with {said.returncode}\n{said.stdout}\n{said.stderr}"
        return Finished(said.returncode, said.stdout, said.stderr)

    def runs(self, where: str = "runs") -> list[Path]:
        return sorted(p.parent for p in (self.folder / where).glob("*/manifest.json"))

    def the_run(self, where: str = "runs") -> Path:
        (found,) = self.runs(where)
        return found

    def rows(self, where: str = "runs") -> list[dict[str, Any]]:
        return rows_of(self.the_run(where))


def table_of(ended: Finished) -> list[str]:
    """Return the words that were printed, without the log and the time it took."""
    printed = re.sub(r"Took [^.]+(\.[0-9] s)?\. ", "", ended.out)
    return [word for line in printed.splitlines() if not line.startswith(("INFO ", "WARNING ")) for word in line.split()]


def lines_of(run: Path) -> list[bytes]:
    """Every whole line of every shard."""
    lines = [line for file in sorted(run.glob("rows-*.jsonl")) for line in file.read_bytes().splitlines(True)]
    return [line for line in lines if line.endswith(b"\n")]


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Every row of a run without its times, the digest that covers them and the run's name, sorted by key."""
    rows = [json.loads(line) for line in lines_of(run)]
    for row in rows:
        for name in ("seconds", "check", "run"):
            row.pop(name, None)
    return sorted(rows, key=lambda row: (row["sample"], row["view"], row["segmenter"], row["status"]))


def until(happened: Callable[[], bool], started: Started | None = None, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time" + (f": {started.err.read_text()}" if started else "")
        time.sleep(0.002)
