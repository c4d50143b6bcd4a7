"""conceptseg: one evaluation, or a table. Nothing heavy is imported before the command is known."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from conceptseg.cli.composing import run_hydra, task_overrides
from conceptseg.cli.help import asked, print_help
from conceptseg.cli.table import QUIET, print_table_of, row_settings
from conceptseg.config import plain, register
from conceptseg.errors import DataError, guarded
from conceptseg.logs import quiet_libraries

if TYPE_CHECKING:
    from conceptseg.tables.joint import Job

SHORT = {"backbone=lab/*": "table.backbones=lab", "-q": "runtime.verbosity=quiet", "-v": "runtime.verbosity=verbose"}
"""Other ways to write a setting."""
DRY = "--dry-run"
"""Another way to say `conceptseg plan`."""


@guarded
def evaluate() -> int:
    """conceptseg [overrides]: one evaluation, or table=<name>; alone it means table=lab."""
    quiet_libraries()
    register()
    sys.argv[1:] = [SHORT.get(a, a) for a in sys.argv[1:]]
    if sys.argv[1:2] == ["plan"] or DRY in sys.argv[1:]:
        from conceptseg.cli.plan import plan_of

        return plan_of([word for place, word in enumerate(sys.argv[1:]) if word != DRY and (place, word) != (0, "plan")])
    said = [a for a in sys.argv[1:] if not a.startswith("-")]
    asks = [a for a in sys.argv[1:] if a in ("--help", "-h", "--hydra-help", "--version", "--info", "--cfg", "-c", "--resolve")]
    if not asks and all(a.lstrip("+~").startswith(QUIET) for a in said):
        sys.argv.append("table=lab")
    if asked(sys.argv[1:]) is not None:
        return print_help(sys.argv[1:])
    if "--version" in asks:
        from conceptseg import __version__

        print(f"conceptseg {__version__}")
        return 0
    sys.argv[1:], of_rows = row_settings(sys.argv[1:])
    jobs: list[Job] = []
    try:
        return run_hydra(partial(_evaluate, of_rows=of_rows, jobs=jobs), "evaluate")
    finally:
        if len(jobs) > 1:
            _print_joint(jobs)


def _evaluate(config: DictConfig, of_rows: Sequence[str], jobs: list[Job]) -> int:
    overrides = [*task_overrides(), *of_rows]
    if config.get("launcher"):
        _launch(config, overrides)
    if config.get("table"):
        return print_table_of(config, overrides)
    from conceptseg.evaluation.assemble import assemble
    from conceptseg.evaluation.carry_out import carry_out, duration
    from conceptseg.evaluation.readings import nothing_scored, other_readings, readings, write_readings
    from conceptseg.report.exports import write_exports
    from conceptseg.report.results import save
    from conceptseg.report.selection import Selection
    from conceptseg.report.terminal import print_table
    from conceptseg.report.trackers import check_trackers, track
    from conceptseg.tables.page import write_html, write_index
    from conceptseg.tables.pictures import draw_sheet
    from conceptseg.tables.row import COSTS
    from conceptseg.tables.sweeps import with_sweep, write_sweep
    from conceptseg.tables.table import columns_of_evaluation, single_table

    started = time.monotonic()
    whole = plain(config)
    check_trackers(whole["report"]["trackers"])
    columns, selection = columns_of_evaluation(whole["report"]), Selection.of(whole["report"])
    selection.check("of this evaluation", [*columns, *(column.name for column in COSTS)], None)
    evaluation = assemble(whole, overrides=overrides)
    carry_out(evaluation, type(evaluation.extractor).__name__)
    found = readings(evaluation, columns)
    every = [*found, *other_readings(evaluation, columns, found)]
    write_readings(evaluation, every)
    if evaluation.shard.index != 0:
        return 0
    if not any(r.n or r.waiting for r in found):
        raise DataError(nothing_scored(evaluation))
    command = shlex.join(["conceptseg", *overrides])
    table, whole_run = (with_sweep(evaluation, single_table(evaluation, some, command)) for some in (found, every))
    folder, runs = evaluation.store.folder, Path(whole["runtime"]["runs"])
    save(folder / "table.json", whole_run)
    track(table, whole["report"]["trackers"], folder / "trackers")
    name = next(iter(evaluation.views))
    segmenter = next(r.segmenter for r in found if r.n)
    sheet = draw_sheet(
        folder / "sheet.png",
        [(name, evaluation, evaluation.views[name].key, segmenter)],
        whole["report"]["pictures"],
    )
    print_table(table, selection=selection, detail=whole["report"]["detail"])
    for remark in table.blocks[0].remarks:
        print(remark)
    files = [*write_exports(whole_run, folder, selection), *write_sweep(evaluation, whole_run), *([sheet] if sheet else [])]
    page = write_html(whole_run, runs, folder)
    write_index(runs)
    took = duration(time.monotonic() - started)
    print(f"Took {took}. In {folder}: {', '.join(['readings.json', *(file.name for file in files), page.name])}")
    jobs.append((overrides, table, runs))
    return 0


def _print_joint(jobs: Sequence[Job]) -> None:
    """One table over the jobs of a multirun, where it lies, and how to compare its runs."""
    from conceptseg.report.exports import write_exports
    from conceptseg.report.results import save
    from conceptseg.report.terminal import print_table
    from conceptseg.tables.joint import commands_to_compare, joint_table
    from conceptseg.tables.page import write_html, write_index

    table = joint_table(jobs, shlex.join(["conceptseg", *sys.argv[1:]]))
    runs = Path(jobs[0][2])
    folder = runs / "tables" / table.table
    save(folder / "results.json", table)
    write_exports(table, folder)
    page = write_html(table, runs, folder)
    write_index(runs)
    print()
    print_table(table)
    print(f"{len(jobs)} jobs in one table. Page: {page}")
    for command in commands_to_compare(table, runs):
        print(f"Compare: {command}")


def _launch(config: DictConfig, overrides: Sequence[str]) -> None:
    """Has everything computed elsewhere; what follows finds it done."""
    from conceptseg.evaluation.launchers import launch
    from conceptseg.targets import instantiate

    whole = plain(config)
    launcher = instantiate(whole["launcher"], "launcher", whole["runtime"]["allow_targets"])
    launch(launcher, [o for o in overrides if not o.lstrip("+~").startswith("launcher")])
