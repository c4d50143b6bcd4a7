"""In a child process: a job that is killed at its n-th file operation, and what it leaves to compare.

File operations are what changes the child's folder: opening to write, write, fsync, truncate, rename, remove, mkdir, rmdir. Each
is noted before it happens; the process then dies in its place, by SIGKILL. "torn" does half of it first: the file is made empty,
or half of the bytes are written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
"""Audit event -> which of its arguments is the path that changes."""


def watch(folder: Path, noted: Path, fatal: int = -1, torn: bool = False) -> None:
    """Note every file operation under `folder` in the file `noted`, and die in the place of number `fatal`, counted from 0."""
    note, root, count, write = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), f"{folder.resolve()}/", 0, os.write
    one, own = threading.Lock(), threading.local()

    def happens(what: str, path: str, half: Callable[[], Any]) -> None:
        nonlocal count
        if getattr(own, "inside", False):
            return
        own.inside = True
        path = os.path.abspath(path)
        changes = not ((what == "os.mkdir" and os.path.isdir(path)) or (what == "os.remove" and not os.path.lexists(path)))
        if changes and path.startswith(root) and "__pycache__" not in path and "pipe:[" not in path:
            with one:
                write(note, f"{what} {os.path.relpath(path, root)}\n".encode())
                if count == fatal:
                    if torn:
                        half()
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
        own.inside = False

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike) and (args[2] or 0) & WRITES:
            path = os.fsdecode(args[0])
            happens("open", path, lambda: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | (args[2] & os.O_TRUNC), 0o644)))
        elif event in PATHS:
            path = args[PATHS[event]]
            if isinstance(path, str | bytes | os.PathLike):
                happens(event, os.fsdecode(path), lambda: None)

    def path_of(file: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return ""

    def around(name: str, half: Callable[..., Any]) -> None:
        real = getattr(os, name)

        def called(file: int, *args: Any) -> Any:
            happens(name, path_of(file), lambda: half(file, *args))
            return real(file, *args)

        setattr(os, name, called)

    around("write", lambda file, block: write(file, block[: len(block) // 2]))
    around("fsync", lambda file: None)
    around("ftruncate", lambda file, size: None)
    import safetensors.torch as saving

    serialize = saving.serialize_file

    def serialized(tensors: Any, path: Any, **more: Any) -> None:
        happens("serialize", str(path), lambda: Path(path).write_bytes(b"\x10\0\0\0\0\0\0\0half"))
        serialize(tensors, path, **more)

    saving.serialize_file = serialized
    sys.addaudithook(hear)


def evaluate(config: dict[str, Any], shards: int) -> None:
    """All shards one after the other, then what a command writes, and the rows as a file to share."""
    from conceptseg.evaluation.assemble import assemble
    from conceptseg.evaluation.carry_out import carry_out
    from conceptseg.evaluation.readings import readings, write_readings
    from conceptseg.report.results import save
    from conceptseg.tables.pictures import draw_sheet
    from conceptseg.tables.table import columns_of_evaluation, single_table

    for shard in reversed(range(shards)):
        config["runtime"] |= {"shard_index": shard, "shard_count": shards}
        evaluation = assemble(config)
        carry_out(evaluation)
    found = readings(evaluation, columns_of_evaluation(config["report"]))
    write_readings(evaluation, found)
    save(evaluation.store.folder / "table.json", single_table(evaluation, found, "conceptseg"))
    view = next(iter(evaluation.views.values())).key
    draw_sheet(evaluation.store.folder / "sheet.png", [("map", evaluation, view, found[0].segmenter)], 2)
    evaluation.store.compact()


def train(recipe: dict[str, Any], shards: int) -> None:
    from conceptseg.lab import train as training
    from conceptseg.lab.cards import train_and_write

    training.CURVE_EVERY = 2
    train_and_write(recipe, Path("lab") / recipe["name"])


def tabulate(table: dict[str, Any], shards: int) -> None:
    """Write the outputs of a finished table: its results, its section of RESULTS.md, exports and the page of pictures."""
    from conceptseg.files import write_atomically
    from conceptseg.report.exports import to_csv, to_latex
    from conceptseg.report.results import load, save
    from conceptseg.report.results_md import write
    from conceptseg.tables.page import write_html
    from conceptseg.tables.stamp import FinishedTable

    results = load(Path(table["from"]))
    save(Path("t/results.json"), results)
    save(Path("benchmarks") / results.table / "results.json", results)
    write(Path("RESULTS.md"), Path("benchmarks"))
    write_atomically(Path("report/t.csv"), to_csv(results).encode())
    write_atomically(Path("report/t.tex"), to_latex(results).encode())
    write_html(results, Path("runs"), Path("report"))
    FinishedTable(Path("tables/t.json"), Path("t/results.json"), [Path("RESULTS.md")], Path("runs"), ["asked"]).keep(results, [])


JOBS = {"evaluate": evaluate, "train": train, "tabulate": tabulate}


def be_killed(job: str, settings: str, shards: int, noted: str, fatal: int, torn: bool) -> None:
    """Never returns."""
    import traceback

    code = 1
    try:
        work = json.loads(Path(settings).read_text())
        watch(Path.cwd(), Path(noted), fatal, torn)
        JOBS[job](work, shards)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
