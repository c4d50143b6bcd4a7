"""conceptseg-runs: list, show, compare, remove and export runs. Needs no model."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from conceptseg import __version__
from conceptseg.errors import ConfigError, guarded
from conceptseg.store.folders import RunFolder, export, find, remove, run_folders
from conceptseg.types import Provenance

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="conceptseg-runs", description=__doc__)
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parts = found.add_subparsers(dest="command", required=True, metavar="list | show | compare | rm | export")
    listed = parts.add_parser("list", help="runs, the one that was written last first")
    listed.add_argument("--method", help="a part of the extractor's class name")
    listed.add_argument("--data", help="a part of the data set's name")
    listed.add_argument("--provenance", choices=get_args(Provenance), help="what the numbers rest on")
    listed.add_argument("--since", type=_day, metavar="YYYY-MM-DD", help="written on that day or later")
    listed.add_argument("--before", type=_day, metavar="YYYY-MM-DD", help="written before that day")
    listed.add_argument("--larger", type=_bytes, metavar="SIZE", help="more than this on disk, such as 10MB")
    listed.add_argument("--json", action="store_true", help="print JSON")
    shown = parts.add_parser("show", help="what a run is, its numbers, and the command that computes it")
    shown.add_argument("run", help="the beginning of an id")
    compared = parts.add_parser("compare", help="conceptseg-compare with beginnings of ids; takes its options", add_help=False)
    compared.add_argument("rest", nargs=argparse.REMAINDER)
    removed = parts.add_parser("rm", help="remove runs; never one that a process is writing")
    removed.add_argument("runs", nargs="+", metavar="run", help="the beginning of an id")
    removed.add_argument("--yes", action="store_true", help="do not ask")
    exported = parts.add_parser("export", help="runs with manifests, rows and maps in one file")
    exported.add_argument("runs", nargs="+", metavar="run", help="the beginning of an id")
    exported.add_argument("--to", type=Path, required=True, metavar="FILE", help=".zip, .tar, .tar.gz; .csv for rows alone")
    for part in (listed, shown, removed, exported):
        part.add_argument("--folder", type=Path, default=Path("runs"), help="where runs lie (runtime.runs)")
    return found


@guarded
def main() -> int:
    """Print or change what the command names."""
    said = parser().parse_args()
    if said.command == "list":
        return _list(said)
    if said.command == "show":
        return _show(find(said.folder, said.run))
    if said.command == "compare":
        return _compare(said.rest)
    found = list({run.run_id: run for run in (find(said.folder, name) for name in said.runs)}.values())
    if said.command == "export":
        export(found, said.to)
        print(f"{_counted(found)}: {said.to}, {_size(said.to.stat().st_size)}")
        return 0
    return _remove(found, said.yes)


def _list(said: argparse.Namespace) -> int:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    every, faults = run_folders(said.folder)
    found = [
        one
        for one in every
        if (said.method or "").casefold() in one.method.casefold()
        and (said.data or "").casefold() in one.data.casefold()
        and said.provenance in (None, one.manifest["provenance"])
        and (said.since is None or one.written >= said.since)
        and (said.before is None or one.written < said.before)
        and (said.larger is None or one.size > said.larger)
    ]
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    if said.json:
        print(json.dumps([_facts(one) for one in found], indent=1))
        return 0
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("run", "method", "data", "protocol", "n", "rests on", "written", "size"):
        table.add_column(Text(heading), justify="right" if heading in ("n", "size") else "left", no_wrap=heading == "run")
    for one in found:
        facts = _facts(one)
        written = one.written.strftime("%Y-%m-%d %H:%M")
        table.add_row(
            *map(
                Text,
                (one.run_id, one.method, one.data, one.protocol, str(facts["n"]), facts["provenance"], written, _size(one.size)),
            )
        )
    Console(width=None if Console().is_terminal else 140).print(table)
    print(f"{len(found)} of {len(every)} runs in {said.folder}, {_size(sum(one.size for one in found))}")
    return 0


def _facts(run: RunFolder) -> dict[str, Any]:
    return {
        "run": run.run_id, "method": run.method, "data": run.data, "protocol": run.protocol,
        "n": max((int(one.get("n", 0)) for one in run.readings()), default=0), "provenance": run.manifest["provenance"],
        "written": run.written.isoformat(timespec="seconds"), "bytes": run.size, "command": _command(run),
    }  # fmt: skip


def _command(run: RunFolder) -> str:
    """As it can be typed again in the folder where it was typed; empty where it was not kept."""
    return shlex.join(run.manifest.get("command", []))


def _show(run: RunFolder) -> int:
    facts = _facts(run)
    print(f"{run.run_id}: {run.method} on {run.data}, protocol {run.protocol}, {facts['n']} samples scored")
    print(f"written {facts['written']}, {_size(run.size)}, rests on: {facts['provenance']}, folder {run.folder}")
    for name, weights in sorted(run.manifest.get("weights", {}).items()):
        print(f"weights of {name}: " + ", ".join(f"{key} {value}" for key, value in weights.items() if value))
    print("versions: " + ", ".join(f"{name} {version}" for name, version in run.manifest["versions"].items()))
    for one in run.readings():
        values = {k: v["value"] for k, v in one.get("values", {}).items() if isinstance(v, dict) and v.get("value") is not None}
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "no number"
        print(f"  {one.get('name')}, {one.get('segmenter')}: n={one.get('n')}, {numbers}")
    command = facts["command"] or "not kept (a run of Python, or of an earlier version); its configuration is in manifest.json"
    print(f"command: {command}")
    return 0


def _compare(rest: Sequence[str]) -> int:
    from conceptseg.cli import compare

    said = compare.parser().parse_args(rest)
    whole = {}
    for spec in {*said.runs, *([said.baseline] if said.baseline else [])}:
        place, mark, reading = spec.partition("::")
        whole[spec] = spec if (Path(place) / "manifest.json").exists() else find(said.folder, place).run_id + mark + reading
    sys.argv = ["conceptseg-compare", *(whole.get(word, word) for word in rest)]
    compare.main()
    return 0


def _remove(found: Sequence[RunFolder], sure: bool) -> int:
    for run in found:
        print(f"{run.run_id}: {run.method} on {run.data}, {_size(run.size)}")
    if not sure:
        if not sys.stdin.isatty():
            raise ConfigError(f"removing {_counted(found)}: nobody can be asked here. Add --yes to remove them.")
        if input(f"Remove {_counted(found)}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing removed")
            return 1
    from conceptseg.tables.page import write_index

    for run in found:
        remove(run)
    print(f"{_counted(found)} removed, {_size(sum(run.size for run in found))}")
    for folder in {run.folder.parent for run in found}:
        write_index(folder)
    return 0


def _counted(runs: Sequence[RunFolder]) -> str:
    return f"{len(runs)} run" + ("" if len(runs) == 1 else "s")


def _day(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no day; wanted YYYY-MM-DD") from error


def _bytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is no size; wanted such as 500kB or 10MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
