"""Every shard of an evaluation as a job of its own: through submitit (Slurm, or processes of this machine) or Ray.

A job is the command that a person would type, with its shard's number. Jobs don't talk to each other: what is done is read from
the run folder, so a job that was killed is sent again, and any number of shards goes on with what another number began.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, StoreError, one_of

EXECUTORS = ("slurm", "local", "debug")


class Launcher(ABC):
    """Carries out the commands of all shards, each somewhere."""

    shards: int

    @abstractmethod
    def run(self, commands: Sequence[Sequence[str]]) -> list[str]:
        """Carry out all commands, each somewhere. Returns what went wrong, a line a command that failed."""


@dataclass
class ShardCommand:
    """A shard's command as a submitit job.

    Before Slurm's time is up, or when it wants the node back, the command is ended in order and the job queued again: it goes on
    from its rows.
    """

    command: tuple[str, ...]
    _process: Any = field(default=None, repr=False)

    def __call__(self) -> int:
        self._process = subprocess.Popen(self.command, preexec_fn=_deaf_to_warnings)
        return self._ended()

    def _ended(self) -> int:
        # Not wait(): `checkpoint` is called from a signal in the midst of this, and a second wait would never return.
        while self._process.poll() is None:
            time.sleep(0.1)
        return int(self._process.returncode)

    def checkpoint(self) -> Any:
        """Return the job that submitit requeues."""
        from submitit.helpers import DelayedSubmission

        self._process.terminate()
        self._ended()
        return DelayedSubmission(ShardCommand(self.command))


def _deaf_to_warnings() -> None:
    """Slurm may warn every process of a job; the command would die of it, while this job's own process knows what to do."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


REFUSALS = (RuntimeError, NameError, AssertionError, TypeError, ValueError)
"""Errors that submitit raises without sbatch, for an unknown parameter, and for a value of another type."""


class SubmititLauncher(Launcher):
    """Jobs through submitit.

    executor: "slurm"; "local", processes of this machine; "debug", one after the other inside this process. folder: holds the
    jobs' logs, where all machines see it. parameters: what `submitit.AutoExecutor.update_parameters` takes. renewals: how often
    a job whose time is up is queued again. Raises ConfigError if Slurm takes no such job.
    """

    def __init__(self, executor: str, shards: int, folder: str, parameters: Mapping[str, Any], renewals: int = 100) -> None:
        one_of("launcher.executor", executor, EXECUTORS)
        self.executor, self.shards, self.folder, self.parameters = executor, shards, Path(folder), dict(parameters)
        self.renewals = renewals

    def run(self, commands: Sequence[Sequence[str]]) -> list[str]:
        try:
            from submitit import AutoExecutor
            from submitit.core.utils import FailedJobError
        except ImportError as error:
            raise ConfigError('launcher=slurm needs submitit, which is not installed: pip install "conceptseg[slurm]"') from error
        try:
            executor = AutoExecutor(folder=self.folder / "%j", cluster=self.executor, slurm_max_num_timeout=self.renewals)
            executor.update_parameters(**self.parameters)
            with executor.batch():  # one array of jobs, not one queue entry each
                jobs = [executor.submit(ShardCommand(tuple(command))) for command in commands]
        except (FailedJobError, *REFUSALS) as error:
            raise ConfigError(
                f"launcher.parameters {self.parameters}: {self.executor} took none of {len(commands)} shards: {error} "
                "Leave a parameter out with ~launcher.parameters.NAME, or rehearse with launcher=local."
            ) from error
        failed = []
        for number, job in enumerate(jobs):
            problem = job.exception() or (f"ended with {job.result()}" if job.result() else None)
            if problem:
                failed.append(f"shard {number}: {problem}; see {job.paths.stderr}")
        return failed


class RayLauncher(Launcher):
    """Jobs as tasks of a Ray cluster, whose machines see this folder.

    address: of a running cluster ("auto" finds this machine's); None starts one here. resources: what `ray.remote` takes, for
    example {num_cpus: 4, num_gpus: 1}. Raises ConfigError if they ask for more than a machine of the cluster has: Ray would wait
    for such a machine without end.
    """

    def __init__(self, shards: int, address: str | None, resources: Mapping[str, Any]) -> None:
        self.shards, self.address, self.resources = shards, address, dict(resources)

    def run(self, commands: Sequence[Sequence[str]]) -> list[str]:
        try:
            import ray
        except ImportError as error:
            raise ConfigError('launcher=ray needs ray, which is not installed: pip install "conceptseg[ray]"') from error
        ray.init(address=self.address, include_dashboard=False if self.address is None else None)
        try:
            self._check([node["Resources"] for node in ray.nodes() if node["Alive"]])
            task = ray.remote(**self.resources)(_carried_out)
            codes = ray.get([task.remote(list(command), str(Path.cwd())) for command in commands])
        finally:
            ray.shutdown()
        return [f"shard {number}: ended with {code}" for number, code in enumerate(codes) if code]

    def _check(self, machines: Sequence[Mapping[str, float]]) -> None:
        """Of a cluster that grows when asked, a machine of the wanted kind has to run when the shards are sent."""
        asked = {"CPU": self.resources.get("num_cpus", 1), "GPU": self.resources.get("num_gpus", 0)}  # Ray's own defaults
        asked |= {"memory": self.resources.get("memory", 0), **self.resources.get("resources", {})}
        wanted = {name: float(amount) for name, amount in asked.items() if amount}
        if any(all(machine.get(name, 0) >= amount for name, amount in wanted.items()) for machine in machines):
            return
        there = "; ".join(", ".join(f"{name} {machine.get(name, 0):g}" for name in wanted) for machine in machines)
        said = ", ".join(f"{name} {amount:g}" for name, amount in wanted.items())
        raise ConfigError(
            f"launcher.resources: a shard asks for {said}, and no machine of the cluster has that (there: {there}). Ask less, "
            "for example launcher.resources.num_gpus=0, or start such a machine first."
        )


def _carried_out(command: list[str], folder: str) -> int:
    return subprocess.run(command, cwd=folder).returncode


def launch(launcher: Launcher, overrides: Sequence[str]) -> None:
    """Compute what `conceptseg <overrides>` lacks, shard by shard. Raises StoreError if a shard failed; its rows are kept."""
    if launcher.shards < 1:
        raise ConfigError(f"launcher.shards is {launcher.shards}; wanted 1 or more.")
    shared = [*overrides, f"runtime.shard_count={launcher.shards}", "runtime.progress=false", "report.publish=no"]
    started = (sys.executable, "-m", "conceptseg")
    failed = launcher.run([[*started, *shared, f"runtime.shard_index={number}"] for number in range(launcher.shards)])
    if failed:
        raise StoreError(
            f"{len(failed)} of {launcher.shards} shards failed. Every row written is kept: the same command goes on from there, "
            f"with any number of shards.\n  " + "\n  ".join(failed)
        )
