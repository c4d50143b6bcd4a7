"""conceptseg table=<name>: compute what a table lacks and print it."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from conceptseg.config import plain

if TYPE_CHECKING:
    from conceptseg.report.results import Results

log = logging.getLogger(__name__)


QUIET = ("runtime.", "report.", "hydra.", "hydra/", "launcher=", "launcher.")
"""Overrides that say how a run is done, not what is run."""
PUBLISHING = ("publish", "results_md", "benchmarks")
"""Settings of report that say where a finished table goes, and change nothing in it."""


def print_table_of(config: DictConfig, overrides: Sequence[str]) -> int:
    """Compute what a table lacks, write it below runtime.runs, print it, and publish it if report.publish says so."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from conceptseg.config import ENVIRONMENT, check_allowance, check_frame, composing_source
    from conceptseg.errors import ConfigError
    from conceptseg.keys import digest
    from conceptseg.report.results_md import page_to_change
    from conceptseg.report.trackers import check_trackers
    from conceptseg.tables.composed_cache import Compositions
    from conceptseg.tables.former_names import with_current_names
    from conceptseg.tables.sheet import PaperTable, read_sheet
    from conceptseg.tables.stamp import FinishedTable

    name = str(HydraConfig.get().runtime.choices["table"])
    whole = plain(config)
    check_frame(whole)
    report, sheet = whole["report"], read_sheet(with_current_names(whole["table"]))
    if sheet.only and report["publish"]:
        raise ConfigError(
            f"report.publish=yes publishes whole tables, but table.only names {len(sheet.only)} of the rows of {name}. "
            "Leave one of the two out."
        )
    check_trackers(report["trackers"])
    if report["publish"]:
        page_to_change(Path(report["results_md"]), "")
    extra = [o for o in overrides if not o.lstrip("+~").startswith("table")]
    of_table = [o for o in overrides if o.lstrip("+~").startswith("table.")]
    meaningful = [o for o in extra if not o.lstrip("+~").startswith(QUIET)]
    meaningful += [o for o in of_table if not o.startswith("table.backbones=")]
    on_lab = isinstance(sheet, PaperTable) and sheet.on_lab
    place = name.replace("/", "-") + ("-lab" if on_lab else "")
    tables, source = Path(whole["runtime"]["runs"]) / "tables", composing_source()
    folder = tables / (f"{place}-{digest(sorted(meaningful), 6)}" if meaningful else place)

    share = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]  # only the first of several processes prints
    asked_for = {**whole, "report": {key: value for key, value in report.items() if key not in PUBLISHING}}
    said = sorted(o for o in overrides if not o.startswith(tuple(f"report.{key}=" for key in PUBLISHING)))
    marked = source is not None and not report["trackers"] and ENVIRONMENT not in whole
    finished = FinishedTable(
        tables / "finished" / f"{place}-{digest(said, 6)}.json", folder / "results.json", [folder / "sheet.png"],
        Path(whole["runtime"]["runs"]), [source, asked_for, said, share] if marked else None,
    )  # fmt: skip
    if (results := finished.read()) is not None:
        log.info("nothing that %s was made from has changed: it is printed as it stands", folder / "results.json")
        _show_table(results, folder, report)
        return 0

    from conceptseg.evaluation.assemble import shard_of
    from conceptseg.report.results import save
    from conceptseg.report.trackers import track
    from conceptseg.tables.paper import compute_paper_table
    from conceptseg.tables.table import compute_table

    def compose_anew(overrides: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = plain(compose(config_name="evaluate", overrides=[*overrides]))
        check_allowance(found, extra)  # a row of a sheet must not widen it either
        return found

    composed = Compositions(tables / f"{place}.configs.json", source, compose_anew)

    def with_runtime(more: Sequence[str]) -> dict[str, Any]:
        return composed(*more, *(o for o in extra if o.startswith(("runtime.", "report."))))

    settings = [o for o in extra if not o.lstrip("+~").startswith(QUIET)]
    command = shlex.join(["conceptseg", f"table={name}", *of_table, *settings])
    if isinstance(sheet, PaperTable):
        results = compute_paper_table(place, sheet, with_runtime, settings, folder, command)
    else:
        results = compute_table(place, sheet, with_runtime, settings, folder, command)
    composed.keep()
    if shard_of(whole["runtime"]).index != 0:
        return 0
    save(folder / "results.json", results)
    track(results, report["trackers"], Path(whole["runtime"]["runs"]) / "trackers" / place)
    finished.keep(results, composed.asked())
    _show_table(results, folder, report)
    return 0


def _show_table(results: Results, folder: Path, report: Mapping[str, Any]) -> None:
    """Print a table that was written to `folder` and where it lies; publish it where `report` says so, else say how."""
    from conceptseg.report.publish import publish
    from conceptseg.report.terminal import print_table

    print_table(results)
    print(f"results: {folder / 'results.json'}")
    if (folder / "sheet.png").exists():
        print(f"pictures: {folder / 'sheet.png'}")
    benchmarks, results_md = Path(report["benchmarks"]), Path(report["results_md"])
    if report["publish"]:
        for line in publish(results, folder, benchmarks, results_md):
            print(line)
    else:
        print(f"not published; to write {benchmarks / results.table} and {results_md}: {results.command} report.publish=yes")
