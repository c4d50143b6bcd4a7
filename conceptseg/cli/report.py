"""conceptseg-report: print, check, write or export the tables of benchmarks/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conceptseg.cli.composing import run_hydra
from conceptseg.config import Report, check_frame, plain, register
from conceptseg.errors import ConfigError, did_you_mean, guarded, printable
from conceptseg.logs import quiet_libraries

if TYPE_CHECKING:
    from conceptseg.report.results import Results
    from conceptseg.report.selection import Selection


@guarded
def report() -> int:
    """conceptseg-report [--check | --write | --export FOLDER] [report.KEY=VALUE ...]: print, check, write or export tables."""
    import argparse

    from conceptseg import __version__

    parser = argparse.ArgumentParser(prog="conceptseg-report", description=report.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--check", action="store_true", help="exit with 1 if RESULTS.md or a README.md of benchmarks/ is stale")
    parser.add_argument("--write", action="store_true", help="bring RESULTS.md and benchmarks/*/README.md up to date")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write each table as CSV, LaTeX and an HTML page")
    parser.add_argument(
        "--every-eval-ever",
        type=Path,
        metavar="FOLDER",
        help="write each table's computed numbers in the schema of Every Eval Ever",
    )
    parser.add_argument("--organization", default="", help="with --every-eval-ever: the name of whoever evaluated")
    parser.add_argument("--table", action="append", help="only this one, by name or as a results.json; repeatable")
    parser.add_argument("--pictures", type=int, help="samples per block in a page, at most; all by default")
    parser.add_argument(
        "--gallery", action="append", metavar="METHOD", help="methods with pictures in a page, by name or pattern; repeatable"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write one table's figure as SVG")
    parser.add_argument(
        "--runs", default="runs", type=Path, help="folder of runs that pages show, and of tables that are not published"
    )
    parser.add_argument("--results", default="RESULTS.md", type=Path)
    parser.add_argument("--benchmarks", default="benchmarks", type=Path)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="report.KEY=VALUE",
        help="what is shown: detail, columns, rows, top, sort, intervals, digits",
    )
    said = parser.parse_intermixed_args()
    from conceptseg.report.results import load
    from conceptseg.report.results_md import check, write
    from conceptseg.report.selection import Selection
    from conceptseg.report.terminal import print_table

    if said.check:
        problems = check(said.results, said.benchmarks)
        for problem in problems:
            print(printable(problem), file=sys.stderr)
        print(f"{said.results}: " + (f"{len(problems)} stale or missing" if problems else "up to date"))
        return 1 if problems else 0
    if said.write:
        if said.table:
            parser.error("--write brings all tables up to date, so it takes no --table")
        write(said.results, said.benchmarks)
        print(f"{said.results} and the README.md files in {said.benchmarks}: up to date")
        return 0
    settings = _settings(said.settings)
    selection = Selection.of(settings)
    paths = _paths(said.table or (), said.benchmarks, said.runs / "tables")
    found = [load(path) for path in paths]
    if said.export:
        return _export(found, said.runs, said.export, said.pictures, said.gallery or (), selection)
    if said.every_eval_ever:
        return _records(found, said.every_eval_ever, said.organization, bool(said.table))
    if said.organization:
        parser.error("--organization goes with --every-eval-ever")
    if said.figure:
        return _figure(found, said.figure)
    for number, table in enumerate(found):
        if number:
            print()
        print_table(table, selection=selection, detail=settings["detail"])
    print(f"{len(found)} {'table' if len(found) == 1 else 'tables'} in {', '.join(sorted({str(p.parents[1]) for p in paths}))}")
    return 0


def _paths(names: Sequence[str], benchmarks: Path, computed: Path) -> list[Path]:
    """The results of the tables that were named, or of all: published in `benchmarks`, else computed in `computed`.

    Raises ConfigError for a name that neither holds, and where both are empty.
    """
    held = {path.parent.name: path for folder in (computed, benchmarks) for path in sorted(folder.glob("*/results.json"))}
    if names:
        for name in names:
            if not name.endswith(".json") and name not in held:
                raise ConfigError(f"--table {name}: neither {benchmarks} nor {computed} has it. {did_you_mean(name, held)}")
        return [Path(name) if name.endswith(".json") else held[name] for name in names]
    if not held:
        raise ConfigError(
            f"there is no table in {benchmarks} or {computed}. conceptseg table=lab computes one; --runs and --benchmarks name "
            f"other folders."
        )
    return sorted(benchmarks.glob("*/results.json")) or [*held.values()]


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """The settings `report` with those of a command line. Raises ConfigError for settings of something else."""
    if not words:
        return asdict(Report())
    if foreign := [word for word in words if not word.startswith("report.")]:
        raise ConfigError(f"conceptseg-report: {foreign[0]} is no setting of report. Write report.KEY=VALUE; see docs/tables.md.")
    composed: dict[str, Any] = {}

    def keep(config: Any) -> int:
        composed.update(plain(config))
        check_frame(composed)
        return 0

    register()
    sys.argv[1:] = words
    run_hydra(keep, "evaluate")
    found: dict[str, Any] = composed["report"]
    return found


def _export(
    tables: Sequence[Any], runs: Path, folder: Path, pictures: int | None, methods: Sequence[str], selection: Selection
) -> int:
    quiet_libraries()
    from conceptseg.keys import digest
    from conceptseg.report.exports import write_exports
    from conceptseg.tables.page import free_stem, write_html, write_index

    for table in tables:
        content = digest([table.to_json(), asdict(selection), pictures, list(methods)], 8)
        stem = free_stem(table, folder, content)
        page = write_html(table, runs, folder, pictures, methods, stem, content)
        print(", ".join([str(page), *(file.name for file in write_exports(table, folder, selection, stem))]))
    print(f"All pages: {write_index(folder)}")
    return 0


def _records(tables: Sequence[Results], folder: Path, organization: str, named: bool) -> int:
    """Write Every Eval Ever records; of all tables, those that have computed numbers."""
    import time

    from conceptseg.report.every_eval_ever import write_records

    for table in tables if named else [one for one in tables if one.computed]:
        files = write_records(table, folder, organization, int(time.time()))
        print(f"{table.table}: {len(files)} records in {folder / table.table}")
    return 0


def _figure(tables: Sequence[Results], path: Path) -> int:
    """Write the figure of one table. Raises ConfigError for several tables, or one without numbers to draw."""
    from conceptseg.files import write_atomically
    from conceptseg.report.figure import figure_svg

    if len(tables) != 1 or not (drawn := figure_svg(tables[0], alone=True)):
        why = f"{len(tables)} tables were named" if len(tables) != 1 else f"{tables[0].table} has fewer than two methods to draw"
        raise ConfigError(f"drawing {path}: {why}. Name one table that has them: --table lab")
    write_atomically(path, drawn.encode())
    print(f"written: {path}")
    return 0
