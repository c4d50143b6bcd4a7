"""conceptseg plan: what an evaluation or a table would take, and the command that runs what fits. Fetches nothing."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from conceptseg.cli.composing import run_hydra, task_overrides
from conceptseg.config import plain, register
from conceptseg.errors import ConfigError, DataError, guarded
from conceptseg.logs import quiet_libraries

if TYPE_CHECKING:
    from conceptseg.evaluation.plan import RunPlan
    from conceptseg.tables.sheet import BlockSheet, PaperBlock, PaperRow, RowSheet

HELP = """\
conceptseg plan: what an evaluation or a table would take. Fetches, computes and writes nothing.

  conceptseg plan table=<name>                      every row of a table
  conceptseg plan extractor=<option> ...            one evaluation, as its command is written
  conceptseg table=<name> --dry-run                 the same
  conceptseg-plan table=<name>                      the same

Says for every row what is downloaded (GB, gated or not, licence, where to), memory against the device,
images and time, disk, and what is done; then prints one command that runs all rows that fit.
Estimates are marked with ~. Nothing is ever downloaded without runtime.download=yes."""


@guarded
def plan() -> int:
    """conceptseg-plan [overrides]"""
    return plan_of(sys.argv[1:])


def plan_of(arguments: Sequence[str]) -> int:
    """Plan what a command line asks for."""
    from conceptseg.cli.table import row_settings

    quiet_libraries()
    register()
    if {"-h", "--help"} & {*arguments}:
        print(HELP)
        return 0
    if "--version" in arguments:
        from conceptseg import __version__

        print(f"conceptseg-plan {__version__}")
        return 0
    kept, of_rows = row_settings(list(arguments))
    sys.argv[1:] = kept
    return run_hydra(partial(_plan, of_rows=of_rows), "evaluate")


def _plan(config: DictConfig, of_rows: Sequence[str]) -> int:
    from conceptseg.evaluation.plan import device_bytes, plan_run

    overrides = [*task_overrides(), *of_rows]
    runtime = plain(config)["runtime"]
    device, memory = device_bytes(runtime["device"])
    of_table = bool(config.get("table"))
    rows = list(_table_rows(config, overrides)) if of_table else [("", plan_run("this evaluation", plain(config)))]
    for line in lines_of(rows, device, memory, Path(runtime["runs"])):
        print(line)
    print()
    for line in _command(config, overrides, rows, memory):
        print(line)
    return 0


def _table_rows(config: DictConfig, overrides: Sequence[str]) -> Iterator[tuple[str, RunPlan]]:
    """(name of the row as table.only takes it, plan) of every evaluation behind a table.

    A name that several blocks have is written with its block, since its rows may need different data.
    """
    from conceptseg.cli.table import OpenedSheet
    from conceptseg.evaluation.plan import RunPlan, plan_run
    from conceptseg.tables.paper import overrides_of
    from conceptseg.tables.row import Evaluations
    from conceptseg.tables.sheet import PaperTable

    opened = OpenedSheet.of(config, overrides)
    sheet, evaluations = opened.sheet, Evaluations(opened.compose, opened.settings)
    named = Counter(row.name for block in sheet.blocks for row in block.rows)

    def only(block: PaperBlock | BlockSheet, row: PaperRow | RowSheet) -> str:
        return f"{block.name}: {row.name}" if named[row.name] > 1 else row.name

    def planned(row: str, name: str, written: Sequence[str], needs: str = "") -> tuple[str, RunPlan]:
        if needs:
            return row, RunPlan(name, None, 0, 0, (), None, False, None, False, 0, (needs,))
        try:
            return row, plan_run(name, evaluations.config(written))
        except (ConfigError, DataError) as error:
            return row, RunPlan(name, None, 0, 0, (), None, False, None, False, 0, (str(error).splitlines()[0],))

    if isinstance(sheet, PaperTable):
        for block in sheet.blocks:
            for row in block.rows:
                if row.overrides is None or (row.needs and not sheet.on_lab) or (sheet.on_lab and row.lab is None):
                    yield planned(only(block, row), row.name, (), row.needs or "a model of the lab that does this")
                    continue
                for kind in (kind for kind in sheet.parts if kind in row.kinds):
                    yield planned(only(block, row), f"{row.name}, {kind}", overrides_of(row, block, sheet, kind))
    else:
        for plain_block in sheet.blocks:
            for one in plain_block.rows:
                yield planned(only(plain_block, one), f"{plain_block.name}: {one.name}", [*plain_block.overrides, *one.overrides])


# ---------------------------------------------------------------- what is printed


def lines_of(rows: Sequence[tuple[str, RunPlan]], device: str, memory: int, runs: Path) -> Iterator[str]:
    """The plan as lines of at most 100 columns, but for names of repositories and folders."""
    from conceptseg.backbones.hub import cache_folder, has_token, page_of
    from conceptseg.backbones.repositories import free_bytes

    plans = [plan for _, plan in rows]
    yield f"{'run':<42}{'fetch GB':>9}{'memory GB':>10}{'done of images':>15}{'time':>11}{'disk MB':>9}  state"
    for plan in plans:
        fetched = f"{plan.download:.3g}" if plan.to_fetch else "-"
        held = _about(plan.memory_measured, "?" if plan.memory is None else f"{plan.memory / 1e9:.3g}") if plan.models else "-"
        when = "-" if plan.is_done or not plan.images else _about(plan.seconds_measured, _duration(plan.seconds))
        count = f"{plan.done:,} of {plan.images:,}" if plan.images else "-"
        yield f"{plan.name[:41]:<42}{fetched:>9}{held:>10}{count:>15}{when:>11}{plan.disk / 1e6:>9.3g}  {_state(plan, memory)}"
    yield ""
    yield f"device: {device}, {memory / 1e9:.3g} GB"
    yield "~ estimated: memory by parameter counts and image sizes; time by operations and the measured matrix speed"
    fetch = {(m.path, m.revision): m for plan in plans for m in plan.to_fetch}
    if fetch:
        total, cache = sum(m.download or 0 for m in fetch.values()), cache_folder()
        free = free_bytes(cache) / 1e9
        less = "" if free > total else ": too little for all of it. HF_HOME names another folder"
        yield f"downloads: up to {total:.3g} GB in all, to {cache} ({free:.3g} GB free{less})"
        for (path, revision), m in fetch.items():
            size = "size not known" if m.download is None else f"{m.download:g} GB"
            gate = {True: "gated", False: "not gated", None: "gated or not is not known"}[m.gated]
            yield f"  {path}@{(revision or '')[:7]}: {size}, {m.licence or 'licence not known'}, {gate}"
            if m.size_from:
                yield f"    size: {m.size_from}"
        if gated := [path for (path, _), m in fetch.items() if m.gated]:
            yield f"  gated: accept the licence on {', '.join(map(page_of, gated))}"
            yield "  token: found" if has_token() else "  token: none found; hf auth login"
    disk, free = sum(plan.disk for plan in plans) / 1e9, free_bytes(runs) / 1e9
    yield f"disk: about {disk:.3g} GB of rows and maps in {runs} ({free:.3g} GB free)"
    reasons: dict[str, list[str]] = {}
    for row, plan in rows:
        for reason in plan.lacks:
            reasons.setdefault(reason, []).append(row or plan.name)
    if reasons:
        yield "lacking:"
        for reason, names in reasons.items():
            distinct = list(dict.fromkeys(names))
            yield f"  {reason}"
            yield f"    rows: {', '.join(distinct[:8])}" + (f" and {len(distinct) - 8} more" if len(distinct) > 8 else "")


def _about(measured: bool, said: str) -> str:
    return said if measured or said in ("-", "?") else f"~{said}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(1, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.0f} d"


def _state(plan: RunPlan, memory: int) -> str:
    if plan.is_done:
        return "done"
    if plan.lacks or plan.is_too_large(memory):
        kinds = ["lacks " + reason.partition(":")[0] if ": " in reason else "not possible" for reason in plan.lacks]
        return ", ".join(dict.fromkeys([*kinds, *(["too large"] if plan.is_too_large(memory) else [])]))
    return "download" if plan.to_fetch else "ready"


def _command(config: DictConfig, overrides: Sequence[str], rows: Sequence[tuple[str, RunPlan]], memory: int) -> Iterator[str]:
    """One command for all rows that fit."""
    names = list(dict.fromkeys(row for row, _ in rows))
    by_row = {name: [plan for row, plan in rows if row == name] for name in names}
    possible = {
        name: [plan for plan in plans if plan.is_done or (plan.lacks_data_alone and not plan.is_too_large(memory))]
        for name, plans in by_row.items()
    }
    fit = [name for name, plans in possible.items() if plans]
    waits = any(plan.lacks for name in fit for plan in possible[name])
    if not fit:
        yield "Nothing of it can be run here yet: see what is lacking, or name another device with runtime.device."
        return
    chosen: list[Any] = [o for o in overrides if not o.lstrip("+~").startswith("runtime.download=")]
    if config.get("table") and len(fit) < len(names):
        chosen = [o for o in chosen if not o.lstrip("+~").startswith("table.only=")]
        chosen.append("table.only=[" + ",".join(f'"{name}"' for name in fit) + "]")
    fetched = {m.path: m.download or 0 for name in fit for plan in possible[name] for m in plan.to_fetch}
    if fetched:
        chosen.append("runtime.download=yes")
    then = ", once their data is here" if waits else ""
    yield (f"{len(fit)} of {len(names)} rows fit this device{then}:" if config.get("table") else f"It fits this device{then}:")
    yield "  " + shlex.join(["conceptseg", *chosen]) + (f"   # downloads up to {sum(fetched.values()):.3g} GB" if fetched else "")
