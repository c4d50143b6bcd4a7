"""Rehearse a sheet of conf/backbone at full geometry: write its checkpoint with random weights, run its evaluation on a photo.

    python scripts/rehearse.py clip_vit_b_16_openai --data VOCdevkit             write, run, report, delete
    python scripts/rehearse.py flux_schnell --data VOCdevkit --into /big/disk    a folder for what is written
    python scripts/rehearse.py sdxl --data VOCdevkit extractor.backbone.image_size=512      settings of the evaluation
    python scripts/rehearse.py sd2 --write-only --into FOLDER                    the checkpoint alone, which is kept
    python scripts/rehearse.py sd2 --data VOCdevkit --written FOLDER             the evaluation alone
    python scripts/rehearse.py --json results.json                               the table of docs/rehearsal.md

The evaluation is the command that a user types, in a process of its own, up to the row, which says that its weights are random.
Measured are the seconds of each stage and the memory of the process, sampled, against what `conceptseg plan` reckons with.
Layouts and evaluations stand in rehearsal.yaml. Linux only. Exits with 1 if no row was scored.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from random_checkpoint import write_repository

from conceptseg.backbones.repositories import free_bytes, repository_of
from conceptseg.backbones.sheet_files import sheet_of
from conceptseg.config import composed
from conceptseg.errors import ConfigError, did_you_mean, guarded
from conceptseg.evaluation.assemble import build_parts, machine
from conceptseg.evaluation.plan import peak_bytes, weight_bytes
from conceptseg.evaluation.weights import checkpoints
from conceptseg.store.run import RunStore

HERE = Path(__file__).resolve().parent
LAYOUTS = HERE / "rehearsal.yaml"
SHEETS = HERE.parent / "conf" / "backbone"
PERIOD = 0.1
"""Seconds between two samples of a process's memory."""
POINTS = 40
"""Points of a memory curve that are kept."""
SPARE = 2e9
"""Bytes of disk that are left free."""
_STEP = re.compile(r"^(?P<what>.+?)(?: \.\.\.|: (?P<seconds>[0-9.]+) s)$")
"""A line of conceptseg.announcing: a step that begins, or has ended after some seconds."""


@dataclass
class Memory:
    """Memory of a process over time, and lines that it wrote."""

    curve: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds since the start, resident bytes, of them bytes that are no page of a mapped file)."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    peak: int = 0
    """Most resident bytes, as the kernel counts them."""
    processor: float = 0.0
    """Processor seconds."""
    stopped: str = ""
    """Why the process was stopped; empty if it was not."""

    @property
    def peak_own(self) -> int:
        """Most resident bytes beside pages of mapped files, which the kernel takes back when it needs them."""
        return max((own for _, _, own in self.curve), default=0)

    def most(self, start: float, end: float) -> tuple[int, int]:
        """(resident, of them own) at the greatest between two times."""
        within = [(whole, own) for at, whole, own in self.curve if start <= at <= end]
        return max(within, default=(0, 0))

    def points(self, count: int = POINTS) -> list[list[float]]:
        """At most so many [seconds, GB resident, GB of them own], the greatest of each stretch."""
        size = max(1, -(-len(self.curve) // count))
        parts = [self.curve[at : at + size] for at in range(0, len(self.curve), size)]
        return [
            [round(p[-1][0], 1), round(max(x for _, x, _ in p) / 1e9, 2), round(max(x for _, _, x in p) / 1e9, 2)] for p in parts
        ]


def watched(command: Sequence[str], environment: Mapping[str, str], leave: float, cwd: Path) -> tuple[int, Memory]:
    """Run a command and watch its memory; it is stopped where the machine has fewer than `leave` GB left.

    Its lines are shown as they come. Returns its exit status too.
    """
    found, start = Memory(), time.monotonic()
    before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
    )
    assert process.stdout is not None

    def listen(stream: Any) -> None:
        for line in stream:
            found.lines.append((time.monotonic() - start, line.rstrip("\n")))
            print(f"  {found.lines[-1][0]:7.1f} s  {found.lines[-1][1]}", flush=True)

    listener = threading.Thread(target=listen, args=(process.stdout,))
    listener.start()
    while process.poll() is None:
        held = _kilobytes(Path(f"/proc/{process.pid}/status"))
        if "VmRSS" in held:
            found.curve.append((time.monotonic() - start, held["VmRSS"], held["RssAnon"]))
            found.peak = max(found.peak, held["VmHWM"])
        if _kilobytes(Path("/proc/meminfo"))["MemAvailable"] < leave * 1e9:
            found.stopped = f"stopped: fewer than {leave:g} GB of the machine's memory were left"
            process.kill()
        time.sleep(PERIOD)
    listener.join()
    found.processor = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before
    return process.returncode, found


def _kilobytes(file: Path) -> dict[str, int]:
    """Entries of a file of /proc that are in kB, in bytes."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:  # the process has ended
        return {}
    found = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return {name: int(words[0]) * 1024 for name, words in found.items() if words[1:] == ["kB"]}


@dataclass(frozen=True)
class Step:
    """A step that the command announced."""

    what: str
    start: float
    end: float
    seconds: float


def steps_of(lines: Sequence[tuple[float, str]]) -> list[Step]:
    """Steps with their begin and end, seconds since the start; those that were not announced before began `seconds` earlier."""
    found, begun = [], {}
    for at, line in lines:
        matched = _STEP.match(line)
        if matched is None:
            continue
        what, seconds = matched["what"], matched["seconds"]
        if seconds is None:
            begun[what] = at
        else:
            found.append(Step(what, begun.pop(what, at - float(seconds)), at, float(seconds)))
    return found


def stages_of(steps: Sequence[Step], cost: Mapping[str, Any], end: float) -> dict[str, float]:
    """Seconds by stage of a command that ended after `end` seconds.

    Steps inside others count once: weights that are read while texts are encoded are reading, and texts that are encoded while
    the model answers are encoding. They are if less time than the model took was left when they were done.
    """
    encoding = [step for step in steps if step.what.startswith("encoding")]
    reading = [step for step in steps if step.what.startswith("reading")]
    within = [step for step in reading if any(e.start <= step.start and step.end <= e.end for e in encoding)]
    spent = cost.get("stages", {})
    answering = [step for step in encoding if step.end + spent.get("model", 0.0) > end]
    beside = sum(step.seconds for step in reading if step not in within)
    return {
        "digest": sum(step.seconds for step in steps if step.what.startswith("digesting")),
        "load": sum(step.seconds for step in reading),
        "encode": sum(step.seconds for step in encoding) - sum(step.seconds for step in within),
        "forward": max(0.0, spent.get("model", 0.0) - beside - sum(step.seconds for step in answering)),
        "score": sum(spent.get(name, 0.0) for name in ("metrics", "pictures", "rows")),
    }


# ------------------------------------------------------------ one rehearsal


def rehearsed(name: str, layouts: Mapping[str, Any], overrides: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Write what a sheet reads, run its evaluation, and return what was measured. Raises ConfigError."""
    about = layouts["sheets"].get(name)
    if about is None:
        raise ConfigError(f'"{name}": {options.layouts} rehearses no such sheet. {did_you_mean(name, layouts["sheets"])}')
    models = {"backbone": name, **about.get("models", {})}
    with place_of(options.into, options.keep) as place:
        repositories: dict[str, dict[str, Any]] = {}
        for sheet in models.values():
            repositories[sheet] = written(sheet, layouts["repositories"], place, options.written)
        command = [
            *([] if any(word.startswith("experiment=") for word in about["run"]) else ["dataset=pascal_voc"]),
            *about["run"],
            *(f"backbone@extractor.{key}={sheet}" for key, sheet in models.items()),
            *(f"extractor.{key}.path={repositories[sheet]['folder']}" for key, sheet in models.items()),
            f"dataset.root={options.data}", "dataset.limit=1", "runtime.batch_size=1", f"runtime.runs={place / 'runs'}",
            *overrides,
        ]  # fmt: skip
        config = composed(command)
        weights = [weight_bytes(settings) for _, settings in checkpoints(config["extractor"])]
        held = sum(one["bytes"] for one in repositories.values())
        planned = held if None in weights else sum(one or 0 for one in weights)
        _, _, extractor = build_parts(config)
        peak = peak_bytes(config, extractor, 1, [one["bytes"] for one in repositories.values()])
        print(f"running, with {planned / 1e9:.2f} GB of weights planned", flush=True)
        environment = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        started = time.monotonic()
        status, memory = watched([sys.executable, "-m", "conceptseg", *command], environment, options.leave, place)
        seconds = time.monotonic() - started
        rows, manifest, cost = ended(place / "runs")
        steps = steps_of(memory.lines)
        elsewhere = [one["folder"].parent for one in repositories.values()]
        return {
            "sheet": name,
            "settings": [*about["run"], *overrides],
            "machine": {**machine(), "threads": os.environ.get("OMP_NUM_THREADS", "all")},
            "status": memory.stopped or ("row" if rows else f"no row (exit status {status})"),
            "rows": rows,
            "files": {sheet: {key: one[key] for key in ("bytes", "seconds")} for sheet, one in repositories.items()},
            "dtypes": dtypes_of(manifest),
            "run_id": manifest.get("run_id"),
            "provenance": manifest.get("provenance"),
            "planned_bytes": planned,
            "planned_peak_bytes": peak,
            "peak_bytes": memory.peak,
            "peak_own_bytes": memory.peak_own,
            "seconds": {
                **({} if options.written else {"write": sum(one["seconds"] for one in repositories.values())}),
                **stages_of(steps, cost, seconds), "command": seconds,
                "processor": memory.processor,
            },
            "steps": [
                {"what": said(step.what, place, elsewhere), "from": round(step.start, 1), "to": round(step.end, 1),
                 "GB": [round(one / 1e9, 2) for one in memory.most(step.start, step.end)]}
                for step in steps
            ],
            "curve": memory.points(),
            "last_lines": [] if rows else [said(line, place, elsewhere) for _, line in memory.lines[-12:]],
        }  # fmt: skip


def said(line: str, place: Path, folders: Sequence[Path]) -> str:
    """A line without the places of checkpoints and runs on this machine."""
    for folder in (place, *folders):
        line = line.replace(f"{folder}{os.sep}", "").replace(str(folder), "")
    return line


@contextmanager
def place_of(into: Path | None, keep: bool) -> Iterator[Path]:
    """A folder for what is written; deleted afterwards unless it is kept."""
    if into is not None:
        into.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="rehearsal_", dir=into)).resolve()
    try:
        yield place
    finally:
        if keep:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place)


def settings_of(sheet: str) -> dict[str, Any]:
    """Settings of a sheet of conf/backbone. Raises ConfigError for an unknown one."""
    found = sheet_of(sheet)
    if found is None:
        raise ConfigError(f'"{sheet}": no such sheet. {did_you_mean(sheet, [path.stem for path in SHEETS.glob("*.yaml")])}')
    return dict(found)


def written(sheet: str, repositories: Mapping[str, Any], place: Path, before: Path | None = None) -> dict[str, Any]:
    """Write the checkpoint of one sheet. Returns its folder, bytes and the seconds it took. Raises ConfigError.

    before: a folder that may hold it already, from --write-only.
    """
    settings = settings_of(sheet)
    path = str(settings["path"])
    if path not in repositories:
        raise ConfigError(f'"{sheet}" reads {path}, whose layout is not described. {did_you_mean(path, repositories)}')
    name = path.strip("./").replace("/", "--")
    if before is not None and (before / name).is_dir():
        return {"folder": (before / name).resolve(), "bytes": bytes_of(before / name), "seconds": 0.0}
    size = repository_of(settings).download or 1.0
    if free_bytes(place) < size * 1e9 + SPARE:
        raise ConfigError(
            f"writing {path} takes {size:g} GB, and {free_bytes(place) / 1e9:.0f} GB are free in {place}. Name a folder: --into."
        )
    started = time.monotonic()
    write_repository(place / name, repositories[path])
    seconds, count = time.monotonic() - started, bytes_of(place / name)
    print(f"{sheet}: {count / 1e9:.2f} GB written in {seconds:.1f} s to {place / name}", flush=True)
    return {"folder": place / name, "bytes": count, "seconds": seconds}


def bytes_of(folder: Path) -> int:
    """Bytes of the files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def ended(runs: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(scored rows in short, manifest, cost) of the run in a folder; empty where there is none."""
    for file in runs.glob("*/manifest.json"):
        manifest = json.loads(file.read_text(encoding="utf-8"))
        rows = [
            {key: row.get(key) for key in ("sample", "view", "segmenter", "status", "error") if row.get(key) is not None}
            for row in RunStore(file.parent).rows().values()
        ]
        costs = [json.loads(one.read_text(encoding="utf-8")) for one in file.parent.glob("cost-*.json")]
        return [row for row in rows if row["status"] == "ok"], manifest, costs[0] if costs else {}
    return [], {}, {}


def dtypes_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Model -> kind of dtype -> dtype, as the run's identity has them."""

    def found(held: Any, key: str) -> Iterator[tuple[str, dict[str, str]]]:
        if isinstance(held, Mapping):
            mine = {k: str(v).removeprefix("torch.") for k, v in held.items() if k.endswith("dtype") and v}
            if mine:
                yield key, mine
            for name, value in held.items():
                yield from found(value, name)

    return dict(found(manifest.get("identity", {}).get("method", {}), "method"))


def line_of(result: Mapping[str, Any]) -> str:
    """One line for people."""
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result["seconds"].items())
    return (
        f"{result['sheet']}: {result['status']}; peak {result['peak_bytes'] / 1e9:.2f} GB resident, of it "
        f"{result['peak_own_bytes'] / 1e9:.2f} GB beside mapped files; planned {result['planned_bytes'] / 1e9:.2f} GB of "
        f"weights, {result['planned_peak_bytes'] / 1e9:.2f} GB in all; {spent}"
    )


HEAD = (
    "| sheet | settings | files GB | dtype: weights / arithmetic | planned GB: weights / peak | peak resident GB / beside files "
    "| planned / measured "
    "| write s | digest s | load s | encode s | forward s | score s | processor s | GPU s | GPU peak GB |"
)


SECONDS = ("write", "digest", "load", "encode", "forward", "score", "processor")


def table_of(results: Mapping[str, Any]) -> list[str]:
    """Lines of a Markdown table of results; what was not measured reads "not run"."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for _, one in sorted(results.items(), key=lambda item: item[1]["planned_bytes"]):
        kinds = [f"{d['dtype']} / {d.get('compute_dtype', d['dtype'])}" for d in one["dtypes"].values() if "dtype" in d]
        spent = one["seconds"]
        lines.append(
            f"| {one['sheet']} | {' '.join(f'`{word}`' for word in one['settings'])} "
            f"| {sum(f['bytes'] for f in one['files'].values()) / 1e9:.2f} | {', '.join(dict.fromkeys(kinds))} "
            f"| {one['planned_bytes'] / 1e9:.2f} / {one['planned_peak_bytes'] / 1e9:.2f} "
            f"| **{one['peak_bytes'] / 1e9:.2f}** / {one['peak_own_bytes'] / 1e9:.2f} "
            f"| {one['planned_peak_bytes'] / one['peak_bytes']:.2f} "
            + "".join(f"| {spent[name]:.0f} " if name in spent else "| - " for name in SECONDS)
            + "| not run | not run |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheet", nargs="?", help="a sheet of conf/backbone")
    parser.add_argument("overrides", nargs="*", help="settings of the evaluation, as conceptseg takes them")
    parser.add_argument("--data", type=Path, help="a VOC folder (VOCdevkit)")
    parser.add_argument("--into", type=Path, help="a folder for the checkpoint and the run; default: for temporary files")
    parser.add_argument("--keep", action="store_true", help="do not delete what was written")
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint into --into, and run nothing")
    parser.add_argument("--written", type=Path, help="a folder into which --write-only wrote checkpoints; they are kept")
    parser.add_argument("--leave", type=float, default=2.0, help="GB of memory that the machine keeps; the run is stopped before")
    parser.add_argument("--json", type=Path, help="a file that results are added to, by sheet; without a sheet it is shown")
    parser.add_argument("--layouts", type=Path, default=LAYOUTS, help="layouts and evaluations; default: rehearsal.yaml")
    options = parser.parse_intermixed_args(arguments)
    if options.sheet is None:
        if options.json is None:
            parser.error("name a sheet, or with --json a file of results")
        print("\n".join(table_of(json.loads(options.json.read_text(encoding="utf-8")))))
        return 0
    layouts = yaml.safe_load(options.layouts.read_text(encoding="utf-8"))
    if options.write_only:
        if options.into is None:
            raise ConfigError("--write-only needs --into, a folder for the checkpoint.")
        options.into.mkdir(parents=True, exist_ok=True)
        written(options.sheet, layouts["repositories"], options.into.resolve())
        return 0
    if options.data is None or not options.data.is_dir():
        raise ConfigError(f"--data is {options.data}; wanted a VOC folder (scripts/fetch_voc.py fetches VOC 2012).")
    options.data = options.data.resolve()
    result = rehearsed(options.sheet, layouts, options.overrides, options)
    print(line_of(result))
    if options.json is not None:
        held = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        key = " ".join([options.sheet, *options.overrides])
        options.json.write_text(json.dumps({**held, key: result}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0 if result["rows"] else 1


if __name__ == "__main__":
    sys.exit(guarded(main)())
