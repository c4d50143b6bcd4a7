"""conceptseg table=<name>: compute what a table lacks and print it."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from conceptseg.config import plain
from conceptseg.report.selection import SHOWN, Selection

if TYPE_CHECKING:
    from conceptseg.report.results import Results
    from conceptseg.tables.sheet import PaperTable, TableSheet

log = logging.getLogger(__name__)


QUIET = ("runtime.", "report.", "hydra.", "hydra/", "launcher=", "launcher.")
"""Overrides that say how a run is done, not what is run."""
PUBLISHING = ("publish", "results_md", "benchmarks")
"""Settings of report that say where a finished table goes, and change nothing in it."""
AFTERWARDS = (*(f"report.{key}" for key in (*PUBLISHING, *SHOWN)), "runtime.verbosity", "runtime.progress")
"""Settings that change nothing in a table's rows and in what is written of it."""


def row_settings(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without the settings that a table puts after each of its rows', and these.

    What a row may be told, such as dataset.root, need not be a setting of the data set that a command line without table= has.
    """
    words = [word for word in arguments if not word.startswith("-")]
    one_table = any(word.lstrip("+").startswith("table=") and word.partition("=")[2] not in ("", "null") for word in words)
    if not one_table or {"-m", "--multirun", "--cfg", "-c"} & {*arguments}:
        return [*arguments], []
    frame = ("table", *QUIET)
    mine = [w for w in words if not w.lstrip("+~").startswith(frame) and ("=" in w or w.startswith("~"))]
    return [word for word in arguments if word not in mine], mine


@dataclass(frozen=True, slots=True)
class OpenedSheet:
    """A table's sheet, and how its rows are composed."""

    name: str
    sheet: PaperTable | TableSheet
    on_lab: bool
    place: str
    """Name of its folder below runtime.runs/tables, without what settings add to it."""
    of_table: list[str]
    settings: list[str]
    """Overrides of every row."""
    compose: Callable[[Sequence[str]], dict[str, Any]]
    composed: dict[str, dict[str, Any]]
    """Every configuration that was asked for, by its overrides."""

    @classmethod
    def of(cls, config: DictConfig, overrides: Sequence[str]) -> OpenedSheet:
        """Open the sheet that `table=` chose. Raises ConfigError for one that can't be."""
        from hydra import compose
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from conceptseg.cli.composing import read_sheets_once
        from conceptseg.cli.refusals import explain_refusal
        from conceptseg.config import check_frame
        from conceptseg.errors import ConfigError
        from conceptseg.tables.former_names import with_current_names
        from conceptseg.tables.sheet import PaperTable, read_sheet
        from conceptseg.targets import check_allowance

        name = str(HydraConfig.get().runtime.choices["table"])
        whole = plain(config)
        check_frame(whole)
        sheet = read_sheet(with_current_names(whole["table"]))
        extra = [o for o in overrides if not o.lstrip("+~").startswith("table")]
        on_lab = isinstance(sheet, PaperTable) and sheet.on_lab
        place = name.replace("/", "-") + ("-lab" if on_lab else "")
        read_sheets_once()

        composed: dict[str, dict[str, Any]] = {}

        def compose_once(*overrides: str) -> dict[str, Any]:
            key = shlex.join(overrides)
            if key in composed:
                return composed[key]
            try:
                found: dict[str, Any] = plain(compose(config_name="evaluate", overrides=[*overrides]))
            except (HydraException, OmegaConfBaseException) as error:
                raise ConfigError(f"a row of {name}: {explain_refusal(overrides) or error}") from error
            check_allowance(found, extra)  # a row of a sheet must not widen it either
            return composed.setdefault(key, found)

        unread = [f"report.{key}" for key in SHOWN]  # by a row

        def with_runtime(more: Sequence[str]) -> dict[str, Any]:
            mine = (o for o in extra if o.startswith(("runtime.", "report.")))
            return compose_once(*more, *(o for o in mine if o.partition("=")[0] not in unread))

        return cls(
            name, sheet, on_lab, place, [o for o in overrides if o.lstrip("+~").startswith("table.")],
            [o for o in extra if not o.lstrip("+~").startswith(QUIET)], with_runtime, composed,
        )  # fmt: skip


def print_table_of(config: DictConfig, overrides: Sequence[str]) -> int:
    """Compute what a table lacks, write it below runtime.runs, print it, and publish it if report.publish says so."""
    from conceptseg.config import ENVIRONMENT
    from conceptseg.errors import ConfigError
    from conceptseg.files import takes_files
    from conceptseg.keys import digest
    from conceptseg.report.results_md import page_to_change
    from conceptseg.report.trackers import check_trackers
    from conceptseg.tables.sheet import PaperTable
    from conceptseg.tables.stamp import FinishedTable

    started = time.monotonic()
    opened = OpenedSheet.of(config, overrides)
    name, sheet, place, settings = opened.name, opened.sheet, opened.place, opened.settings
    whole = plain(config)
    report = whole["report"]
    if sheet.only and report["publish"]:
        raise ConfigError(
            f"report.publish=yes publishes whole tables, but table.only names {len(sheet.only)} of the rows of {name}. "
            "Leave one of the two out."
        )
    check_trackers(report["trackers"])
    if report["publish"]:
        page_to_change(Path(report["results_md"]), "")
        for key, at in (("results_md", Path(report["results_md"]).parent), ("benchmarks", Path(report["benchmarks"]))):
            if not takes_files(at):
                raise ConfigError(f"report.{key} is {report[key]}: no file can be written to {at}. Name another place.")
    meaningful = [*settings, *(o for o in opened.of_table if not o.startswith("table.backbones="))]
    tables = Path(whole["runtime"]["runs"]) / "tables"
    folder = tables / (f"{place}-{digest(sorted(meaningful), 6)}" if meaningful else place)

    share = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]  # only the first of several processes prints
    asked_for = {
        part: {key: value for key, value in held.items() if f"{part}.{key}" not in AFTERWARDS}
        if part in ("report", "runtime")
        else held
        for part, held in whole.items()
    }
    said = sorted(o for o in overrides if o.lstrip("+~").partition("=")[0] not in AFTERWARDS)
    marked = _composed_of_own_sheets() and not report["trackers"] and ENVIRONMENT not in whole
    finished = FinishedTable(
        tables / "finished" / f"{place}-{digest(said, 6)}.json", folder / "results.json",
        [folder / "sheet.png", folder / f"{place}.html"],
        Path(whole["runtime"]["runs"]), [asked_for, said, share] if marked else None,
    )  # fmt: skip
    if (results := finished.read()) is not None:
        log.info("nothing that %s was made from has changed: it is printed as it stands", folder / "results.json")
        _show_table(results, folder, report, "")
        return 0

    from conceptseg.evaluation.assemble import shard_of
    from conceptseg.evaluation.carry_out import duration
    from conceptseg.report.results import save
    from conceptseg.report.trackers import track
    from conceptseg.tables.page import write_html, write_index
    from conceptseg.tables.paper import columns_of_paper, compute_paper_table
    from conceptseg.tables.table import columns_of_table, compute_table

    columns = columns_of_paper(sheet, report) if isinstance(sheet, PaperTable) else columns_of_table(sheet, report)
    points = isinstance(sheet, PaperTable) and any(row.each_view for block in sheet.blocks for row in block.rows)
    rows = None if points else [row.name for block in sheet.blocks for row in block.rows]
    Selection.of(report).check(name, [column.name for column in columns], rows)

    command = shlex.join(["conceptseg", f"table={name}", *opened.of_table, *settings])
    if isinstance(sheet, PaperTable):
        results = compute_paper_table(place, sheet, opened.compose, settings, folder, command)
    else:
        results = compute_table(place, sheet, opened.compose, settings, folder, command)
    if shard_of(whole["runtime"]).index != 0:
        return 0
    save(folder / "results.json", results)
    write_html(results, Path(whole["runtime"]["runs"]), folder)
    write_index(Path(whole["runtime"]["runs"]))
    track(results, report["trackers"], Path(whole["runtime"]["runs"]) / "trackers" / place)
    finished.keep(results, opened.composed.values())
    _show_table(results, folder, report, f"Took {duration(time.monotonic() - started)}. ")
    return 0


def _composed_of_own_sheets() -> bool:
    """Whether all that was composed ships with this package: no sheets and no metrics of another one. Hydra must be at work."""
    from hydra.core.global_hydra import GlobalHydra

    from conceptseg.entry_points import METRICS, entry_points

    places = {place.path for place in GlobalHydra.instance().config_loader().get_search_path().get_path()}
    return places <= {"pkg://hydra.conf", "pkg://conceptseg.conf", "structured://"} and not entry_points(METRICS)


def _show_table(results: Results, folder: Path, report: Mapping[str, Any], took: str) -> None:
    """Print a table that was written to `folder`, where it lies and what comes next; write it for other programs, and publish it
    if `report` says so."""
    from conceptseg.report.exports import write_exports
    from conceptseg.report.publish import publish
    from conceptseg.report.terminal import print_table

    selection = Selection.of(report)
    print_table(results, selection=selection, detail=report["detail"])
    files = [folder / "results.json", *write_exports(results, folder, selection), folder / "sheet.png"]
    index = folder.parents[1] / "index.html"
    every = f" (all: {index})" if index.exists() else ""
    print(f"{took}Page: {folder / f'{results.table}.html'}{every}")
    print(f"Beside it: {', '.join(file.name for file in files if file.exists())}")
    benchmarks, results_md = Path(report["benchmarks"]), Path(report["results_md"])
    if report["publish"]:
        for line in publish(results, folder, benchmarks, results_md):
            print(line)
        return
    rows = sum(len(block.rows) for block in results.blocks)
    full = "" if report["detail"] == "full" else f"report.detail=full (all {rows} rows, definitions, runs)"
    whole = "" if "table.only=" in results.command else "report.publish=yes"
    if more := " or ".join(filter(None, (full, whole))):
        print(f"Next: {results.command} {more}")
