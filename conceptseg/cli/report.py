"""conceptseg-report: print, check, write or export the tables of benchmarks/."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conceptseg.cli.composing import quiet_libraries
from conceptseg.errors import guarded, printable


@guarded
def report() -> int:
    """conceptseg-report [--check | --write | --export FOLDER]: print, check, write or export the tables of benchmarks/."""
    import argparse

    parser = argparse.ArgumentParser(prog="conceptseg-report", description=report.__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if RESULTS.md or a README.md of benchmarks/ is stale")
    parser.add_argument("--write", action="store_true", help="bring RESULTS.md and benchmarks/*/README.md up to date")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write each table as CSV, LaTeX and an HTML page")
    parser.add_argument("--table", action="append", help="only this one, or a results.json anywhere; may be given several times")
    parser.add_argument("--pictures", type=int, help="samples per block in a page, at most; all by default")
    parser.add_argument("--runs", default="runs", type=Path, help="folder of the run folders that pages show")
    parser.add_argument("--results", default="RESULTS.md", type=Path)
    parser.add_argument("--benchmarks", default="benchmarks", type=Path)
    said = parser.parse_args()
    from conceptseg.report.results import load
    from conceptseg.report.results_md import check, write
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
    asked = [Path(name) if name.endswith(".json") else said.benchmarks / name / "results.json" for name in said.table or ()]
    found = [load(path) for path in asked or sorted(said.benchmarks.glob("*/results.json"))]
    if said.export:
        return _export(found, said.runs, said.export, said.pictures)
    for table in found:
        print_table(table)
    print(f"{len(found)} tables in {said.benchmarks}")
    return 0


def _export(tables: Sequence[Any], runs: Path, folder: Path, pictures: int | None) -> int:
    quiet_libraries()
    from conceptseg.files import write_atomically
    from conceptseg.report.exports import to_csv, to_latex
    from conceptseg.tables.page import write_html

    for table in tables:
        write_atomically(folder / f"{table.table}.csv", to_csv(table).encode())
        write_atomically(folder / f"{table.table}.tex", to_latex(table).encode())
        print(f"{write_html(table, runs, folder, pictures)}, {table.table}.csv, {table.table}.tex")
    return 0
