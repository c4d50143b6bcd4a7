"""torchrun, accelerate and launchers share a run out; killed, resumed or with another number of shards, the rows are the same."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from commands import FAST, as_python, lines_of, rows_of, until

from conceptseg.errors import ConfigError, StoreError
from conceptseg.evaluation.launchers import ShardCommand, SubmititLauncher, launch

SMALL = ("extractor=random", "dataset.count=23", "runtime.batch_size=1", "runtime.keep_maps=false")


@pytest.fixture(scope="module")
def alone(shared):
    shared.run(*SMALL, "runtime.runs=alone")
    return rows_of(shared.the_run("alone"))


# ------------------------------------------------------------ one machine


SLOWLY = """
import time
from conceptseg.extractors import controls
saliency = controls.RandomMap.saliency
controls.RandomMap.saliency = lambda self, batch: (time.sleep(0.2), saliency(self, batch))[1]
"""
SLOW = f"{SLOWLY}from conceptseg.cli.evaluate import evaluate\nevaluate()\n"
"""The command with a method slow enough to be killed in the midst."""


def rank_of(pid: int) -> str | None:
    with suppress(OSError):
        said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((s.removeprefix(b"RANK=").decode() for s in said if s.startswith(b"RANK=")), None)
    return None


def ranks_below(parent: int) -> dict[str, int]:
    """Rank -> process, of all processes that a process started."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            if (rank := rank_of(child)) is not None:
                found[rank] = child
            found |= ranks_below(child)
    return found


@pytest.mark.slow
def test_torchrun_with_a_killed_process_is_resumed_by_accelerate_launch_to_the_same_rows(commands, alone):
    """Both start their processes from nothing."""
    (commands.folder / "slow.py").write_text(SLOW)
    two = ("--standalone", "--nproc-per-node", "2", "slow.py")
    started = commands.start(*two, *FAST, *SMALL, name="torchrun", before=as_python("torch.distributed.run"))
    until(lambda: (commands.folder / "runs").exists() and len(rows_of_shard(commands, "1of2")) >= 2, started, seconds=280)
    os.kill(ranks_below(started.pid)["1"], signal.SIGKILL)
    assert started.wait().code != 0
    held = len(lines_of(commands.the_run()))
    assert 2 <= held < 23
    settings = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    launcher = as_python("accelerate.commands.launch")
    again = commands.run(*settings, "-m", "conceptseg", *FAST, *SMALL, name="accelerate", before=launcher)
    assert commands.rows() == alone
    assert again.said.count("samples computed") == 2
    assert {p.name for p in commands.the_run().glob("rows-*")} == {"rows-0of2.jsonl", "rows-1of2.jsonl"}


def rows_of_shard(commands, name):
    return [line for file in commands.folder.glob(f"runs/*/rows-{name}.jsonl") for line in file.read_bytes().splitlines()]


# ------------------------------------------------------------ many machines


def test_a_run_begun_on_five_shards_of_which_some_were_killed_or_never_began_is_resumed_on_two(commands, alone):
    for index in (0, 2, 4):
        one = commands.start(*SMALL, "runtime.shard_count=5", f"runtime.shard_index={index}", before=SLOWLY if index else "")
        if index:
            until(lambda index=index: bool(rows_of_shard(commands, f"{index}of5")), one)
            one.kill()
        assert one.wait().code == (-9 if index else 0)
    assert 5 < len(commands.rows()) < len(alone)
    for index in range(2):
        commands.run(*SMALL, "runtime.shard_count=2", f"runtime.shard_index={index}")
    assert commands.rows() == alone


@pytest.mark.slow
def test_a_launcher_computes_a_shard_elsewhere_and_prints_its_table(commands, alone):
    said = commands.run(*SMALL, "launcher=local", "launcher.shards=1")
    assert commands.rows() == alone
    assert "0 samples computed, 23 held" in said.said and said.out.count("Random") >= 1


def submitit(folder, shards=2, **parameters):
    return SubmititLauncher("local", shards, str(folder), {"timeout_min": 1, **parameters})


def test_shards_are_told_their_number_and_to_publish_nothing(tmp_path, monkeypatch):
    told = []

    class Told:
        shards = 3

        def run(self, commands):
            told.extend(commands)
            return []

    launch(Told(), ["table=lab"])
    assert [command[-1] for command in told] == [f"runtime.shard_index={i}" for i in range(3)]
    assert all({"table=lab", "runtime.shard_count=3", "report.publish=no"} <= set(command) for command in told)


def test_every_shard_is_carried_out_and_one_that_failed_is_reported_with_its_log(tmp_path):
    failing = [sys.executable, "-c", "import sys; print('no such disk', file=sys.stderr); sys.exit(3)"]
    (line,) = submitit(tmp_path).run([failing, [sys.executable, "-c", f"open({str(tmp_path / 'done')!r}, 'w')"]])
    assert line.startswith("shard 0: ended with 3") and (tmp_path / "done").exists()
    assert "no such disk" in Path(line.rpartition(" ")[2]).read_text()


def test_a_launch_with_a_failed_shard_says_that_the_rows_are_kept():
    class Failing:
        shards = 2

        def run(self, commands):
            return ["shard 1: ended with 9"]

    with pytest.raises(StoreError, match=r"1 of 2 shards failed.*\n  shard 1: ended with 9"):
        launch(Failing(), [])


def test_a_job_whose_time_is_up_ends_its_command_in_order_and_starts_it_again(tmp_path):
    """As Slurm does it: submitit's warning signal to the job's process, then the job a second time."""
    from submitit import LocalExecutor

    log, pid = tmp_path / "log.txt", tmp_path / "pid.txt"
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"log, pid = pathlib.Path({str(log)!r}), pathlib.Path({str(pid)!r})\n"
        "signal.signal(signal.SIGTERM, lambda *_: (log.open('a').write('ended in order\\n'), sys.exit(143)))\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"  # what Slurm sends to every process of a job
        "first = not log.exists()\n"
        "log.open('a').write('started\\n')\n"
        "pid.with_suffix('.part').write_text(str(os.getppid()))\n"
        "pid.with_suffix('.part').rename(pid)\n"
        "time.sleep(60 if first else 0)\n"
    )
    executor = LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=2)
    job = executor.submit(ShardCommand((sys.executable, "-c", code)))
    until(pid.exists)
    os.kill(int(pid.read_text()), signal.SIGUSR2)
    assert job.result() == 0
    assert log.read_text().split("\n")[:3] == ["started", "ended in order", "started"]


@pytest.mark.parametrize(("setting", "named"), [({"executor": "slrm"}, "slurm"), ({"shards": 0}, "launcher.shards")])
def test_a_launcher_with_a_wrong_setting_is_refused(tmp_path, setting, named):
    with pytest.raises(ConfigError, match=named):
        launch(SubmititLauncher(**{"executor": "debug", "shards": 1, "folder": str(tmp_path), "parameters": {}, **setting}), [])


@pytest.mark.parametrize(
    ("parameters", "named"), [({"gpus_per_node": 1}, "Invalid generic resource"), ({"bananas": 2}, "bananas")]
)
def test_what_slurm_refuses_is_a_setting_to_change(tmp_path, monkeypatch, parameters, named):
    """With a stand-in for sbatch that refuses every job, as a cluster without such a machine does."""
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'sbatch: error: Invalid generic resource (gres)' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(ConfigError, match=rf"(?s)launcher\.parameters.*{named}.*~launcher\.parameters"):
        SubmititLauncher("slurm", 1, str(tmp_path / "jobs"), parameters).run([["true"]])


def test_without_slurm_the_rehearsal_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"srun.*launcher=local"):
        SubmititLauncher("slurm", 1, str(tmp_path / "jobs"), {}).run([["true"]])


def test_a_job_is_queued_again_more_often_than_submitit_would(tmp_path, monkeypatch):
    import submitit

    monkeypatch.setenv("PATH", str(tmp_path))
    told = {}
    monkeypatch.setattr(submitit, "AutoExecutor", lambda **settings: told.update(settings) or exit())
    with pytest.raises(SystemExit):
        SubmititLauncher("slurm", 1, str(tmp_path), {}).run([["true"]])
    assert told["slurm_max_num_timeout"] == 100


def test_ray_that_is_not_installed_is_named_with_the_way_to_install_it(monkeypatch):
    from conceptseg.evaluation.launchers import RayLauncher

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"conceptseg\[ray\]"):
        RayLauncher(2, None, {}).run([["true"]])


@pytest.mark.parametrize(
    "asked", [{"num_cpus": 4}, {"num_cpus": 2, "num_gpus": 1}, {"num_gpus": 3}, {"memory": 2e9}, {"resources": {"A100": 1}}]
)
def test_ray_is_not_waited_for_where_no_machine_has_what_a_shard_asks_for(asked):
    from conceptseg.evaluation.launchers import RayLauncher

    machines = [{"CPU": 2.0, "memory": 1e9}, {"CPU": 1.0, "GPU": 2.0, "H100": 1.0}]
    with pytest.raises(ConfigError, match=r"launcher\.resources\.num_gpus"):
        RayLauncher(2, None, asked)._check(machines)
    RayLauncher(2, None, {"num_cpus": 2})._check(machines)
    RayLauncher(2, None, {"num_gpus": 2, "resources": {"H100": 1}})._check(machines)


def test_ray_carries_out_every_shard(tmp_path):
    pytest.importorskip("ray")
    from conceptseg.evaluation.launchers import RayLauncher

    commands = [[sys.executable, "-c", f"open({str(tmp_path / str(i))!r}, 'w'); exit({i})"] for i in range(2)]
    assert RayLauncher(2, None, {"num_cpus": 0}).run(commands) == ["shard 1: ended with 1"]
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1"}
    with pytest.raises(ConfigError, match=r"asks for GPU 99"):
        RayLauncher(2, None, {"num_cpus": 0, "num_gpus": 99}).run(commands)


def test_stages_of_all_shards_are_added_up(commands):
    from conceptseg.store.cost import read_cost

    for index in range(2):
        commands.run(*SMALL, "runtime.shard_count=2", f"runtime.shard_index={index}")
    parts = [json.loads(p.read_text())["stages"] for p in commands.the_run().glob("cost-*.json")]
    cost = read_cost(commands.the_run())
    assert cost.stages["model"] == pytest.approx(sum(part["model"] for part in parts))
    assert 0 <= cost.harness_share <= 1


# ------------------------------------------------------------ start-up


@pytest.mark.slow
def test_a_finished_run_is_printed_in_seconds(commands):
    """CPU seconds of the process: the machine may be busy. About half of the limit where it is not."""
    commands.run(*SMALL)

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = commands.run_cold("-m", "conceptseg", *SMALL, "runtime.progress=false")
        assert "0 samples computed, 23 held" in said.said
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert seconds() < 10 or seconds() < 10  # the first one may write bytecode
