"""Run every command that README.md and docs/*.md show, as it is printed, and list how each ended, as Markdown.

    python scripts/documented_commands.py                     # in an environment with conceptseg installed
    python scripts/documented_commands.py compare runs        # these pages alone

Each page's commands run in a folder of their own, in the order of the page, with its titled code blocks written there first.
Commands that need a network, weights, a GPU or other machines are not run; those of `conceptseg` are composed instead.
Ends with status 1 if a command failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
IN_REPOSITORY = re.compile(
    r"python scripts/|python benchmarks/|pip install|^pytest|git archive|conceptseg-report .*--check|edge_energy|table=mine"
)
"""Commands that belong to a checkout; tests/e2e runs those of the tutorials in a copy of it."""
UNMET = (
    (r"fetch_voc|fetch_imagenet|check_sheets|pip install|plan .*runtime.download|https://|hf://", "network"),
    (r"cuda|multi_gpu|torchrun|accelerate|--device", "GPU or several processes"),
    (r"launcher=(slurm|ray|local)", "a cluster, or ray"),
    (
        r"experiment=(ca_|daam_)|=sd2\b(?!.*plan)|flux_schnell|clip_vit_b_16|gtsegs_ijcv|dataset.root=\.\.\.|data/coco|VOCdevkit",
        "weights or data",
    ),
    (r"conceptseg-lab (train|sweep)", "hours"),
    (r"^conceptseg$|^conceptseg report\.|table=lab|^conceptseg-report|benchmarks/lab", "the lab table: minutes, give --runs"),
    (r"image=photo\.jpg", "a photo and weights"),
    (r"extractor\.\.\.|=\.\.\.|^conceptseg \.\.\.", "a blank to fill in"),
    (r"install=bash", "an interactive shell"),
    (r"conceptseg-runs rm \w+$", "an answer"),
    (r"former/|tokens\.safetensors$", "files of an earlier version, or of the line before"),
    (r"runtime\.shard_index=range", "minutes: the whole of eight shards one after another"),
)
"""Pattern -> what a command needs beyond this machine."""
FIRST = """conceptseg -m extractor.seed=0,1,2 dataset.count=4 'views.output.layers="1-3"' report.resamples=100 -q"""
"""Makes the runs that stand for `run_a`, `4242` and the like."""
CUTS = "conceptseg protocol=scenes_single experiment=thresholds 'dataset.objects=[1,1]' dataset.count=4 report.resamples=100 -q"
"""Makes the run of a command with --thresholds, which compares many cuts."""
STAND_INS = ("run_a", "run_b", "run_c", "runs/<a>", "runs/<b>", "<run id>", "4242", "ff95")
NAMES = re.compile("|".join(map(re.escape, STAND_INS)))


@dataclass(frozen=True)
class Ended:
    """A command of a page, and how it ended: the exit status, or why it was not run."""

    page: str
    command: str
    said: str
    seconds: float = 0.0
    failed: bool = False


def commands_of(page: Path) -> Iterator[str]:
    """Lines of a page's shell blocks, without their comments, with continued lines joined."""
    for kind, _, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "sh":
            for line in body.replace("\\\n", " ").splitlines():
                if found := re.sub(r"\s+#\s.*$", "", line).strip():
                    yield re.sub(r"\s+", " ", found) if "'" not in found and '"' not in found else found


def why_not(command: str) -> str:
    """Name the need of a command that this script does not have; empty for one that is run."""
    if IN_REPOSITORY.search(command):
        return "a checkout: run by tests/e2e or by hand"
    planned = command.startswith(("conceptseg plan", "conceptseg-doctor")) or "--dry-run" in command
    return "" if planned else next((need for pattern, need in UNMET if re.search(pattern, command)), "")


def run(command: str, folder: Path, limit: float) -> tuple[int, str]:
    """Exit status and the end of what was said; 124 after `limit` seconds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    try:
        ended = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=kept, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, f"longer than {limit:g} s"
    return ended.returncode, (ended.stdout + ended.stderr)[-1500:]


def page_ended(page: Path, folder: Path, limit: float) -> Iterator[Ended]:
    """Run a page's commands in `folder`."""
    for _, title, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(body, encoding="utf-8")
    commands = list(commands_of(page))
    stand_ins: dict[str, str] = {}
    ids: list[str] = []
    if any(NAMES.search(command) for command in commands):
        run(FIRST, folder, limit)
        ids = sorted(path.parent.name for path in (folder / "runs").glob("*/manifest.json"))
        for place, name in enumerate(STAND_INS):
            stand_ins[name] = ids[place % 3] if "runs/" not in name else f"runs/{ids[place % 3]}"
    cuts = ""
    if any("--thresholds" in command for command in commands):
        run(CUTS, folder, limit)
        (cuts,) = {path.parent.name for path in (folder / "runs").glob("*/manifest.json")} - {*ids}
    for command in commands:
        need = why_not(command)
        if need and not (need.endswith("--runs") and (folder / "runs" / "tables" / "lab").exists()):
            if command.split()[0] == "conceptseg" and "..." not in command:
                overrides = re.sub(r" (-m|--multirun)\b", "", command.removeprefix("conceptseg"))
                composed, said = run(f"conceptseg --cfg job {overrides}", folder, limit)
                yield Ended(page.stem, command, f"needs {need}; composes" if not composed else said, failed=bool(composed))
            else:
                yield Ended(page.stem, command, f"needs {need}")
            continue
        meant = dict.fromkeys(stand_ins, cuts) if "--thresholds" in command else stand_ins
        typed = re.sub("|".join(map(re.escape, meant)) or r"(?!)", lambda name, meant=meant: meant[name[0]], command)
        started = time.monotonic()
        code, said = run(typed, folder, limit)
        print(f"{page.stem}: {typed}: {code}" + (f"\n{said}" if code else ""), file=sys.stderr, flush=True)
        faults = code == 1 and command.startswith("conceptseg-doctor") and "\n- " in said
        status = f"{code}, with what this machine lacks" if faults else str(code)
        yield Ended(page.stem, command, status, time.monotonic() - started, bool(code) and not faults)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="names of pages without .md; all by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one command may take")
    parser.add_argument("--runs", type=Path, help="a folder of runs that each page begins with")
    said = parser.parse_args()
    every = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    pages = [page for page in every if page.stem in said.pages or (not said.pages and not page.stem.startswith("add_a_"))]
    print("| page | command | exit status | s |\n|---|---|---|---|", flush=True)
    failed = False
    for page in pages:
        with tempfile.TemporaryDirectory() as folder:
            if said.runs:
                shutil.copytree(said.runs, Path(folder, "runs"))
            for one in page_ended(page, Path(folder), said.limit):
                shown = one.command.replace("|", "\\|")
                status = one.said.splitlines()[-1] if one.said else ""
                print(f"| {one.page} | `{shown}` | {status} | {one.seconds:.0f} |", flush=True)
                failed |= one.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
