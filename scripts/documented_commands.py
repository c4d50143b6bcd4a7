"""Run every command that README.md and docs/*.md show, as it is printed, and list how each ended, as Markdown.

    python scripts/documented_commands.py                          # in an environment with conceptseg installed
    python scripts/documented_commands.py compare runs --write     # these pages alone, written into docs/documented_commands.md

Each page's commands run in a folder of their own, in the order of the page, with its titled code blocks written there first.
A page with commands of a checkout runs in a clone of this one. Commands that need what `UNMET` names are not run; those of
`conceptseg` are composed instead. Ends with status 1 if a command failed.
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
IN_CHECKOUT = re.compile(r"new_baseline\.py|git archive|conceptseg-report .*--check")
"""Commands that belong to a checkout: their page runs in a clone."""
UNMET = (
    (r"^python3 -m venv .*conceptseg$", "makes the environment that all others ran in"),
    (r"^python3 -m venv .*pytest$", "runs the whole test suite"),
    (r"fetch_voc|fetch_imagenet|check_sheets|pip install|plan .*runtime.download|https://|hf://", "needs a network"),
    (r"scripts/rehearse\.py", "needs weights of many GB; docs/rehearsal.md says how each rehearsal ended"),
    (r"python benchmarks/speed/", "measures speed: docs/speed.md has its figures"),
    (r"cuda|multi_gpu|torchrun|accelerate|--device|gpu_check|model=flux_schnell", "needs one GPU or several"),
    (r"launcher=slurm", "needs Slurm"),
    (r"launcher=ray", "needs Ray"),
    (
        r"experiment=(ca_|daam_)|=sd2\b(?!.*plan)|gtsegs_ijcv|dataset.root=\.\.\.|data/coco|VOCdevkit|image=photo\.jpg"
        r"|dinov2_vits14|runs/<DINO>|dataset=imagenet_segmentation",
        "needs weights or data",
    ),
    (r"conceptseg-lab train flux$", "trains for 85 minutes"),
    (r"conceptseg-lab train flux steps=", "draws 36,000 scenes first; tests/e2e/test_lab_training.py trains"),
    (r"runtime\.shard_index=range", "runs eight shards one after another: more than 10 minutes here"),
    (r"conceptseg-runs rm \w+$", "asks for an answer, on a terminal"),
    (r"table=lab|^conceptseg$|^conceptseg report\.|^conceptseg-report", "takes minutes: give --runs"),
)
"""Pattern -> why a command is not run."""
TUTORIALS = "add_a_"
"""Begins the names of pages whose commands install packages and add files; tests/e2e runs them."""
FIRST = (
    "conceptseg -m backbone@extractor.backbone=lab_flux,lab_sd3 extractor.concept_self_attention=true,false dataset.count=4 "
    """'views.output.layers="1-3"' report.resamples=100 -q"""
)
"""Makes the runs that stand for `run_a`, `4242` and the like."""
CUTS = (
    "conceptseg protocol=scenes_single experiment=thresholds extractor.seed=7 'dataset.objects=[1,1]' dataset.count=4 "
    "report.resamples=100 -q"
)
"""Makes the run of a command with --thresholds, which compares many cuts."""
NEWEST = "<run id>"
"""Stands for the run of the page's last evaluation."""
STAND_INS = ("run_a", "run_b", "run_c", "4242", "ff95")
NAMES = re.compile("|".join(map(re.escape, STAND_INS)))
LIST = REPO / "docs" / "documented_commands.md"
COLUMNS = "| page | command | exit status | s |\n|---|---|---|---|"
HEAD = """# Documented commands

Every command of the README and of these pages, as it ended in a fresh clone and a fresh environment, on a machine with 2 busy
cores, no GPU and no network. Where a page names runs (`run_a`, `4242`), small runs stand in for them. "composes" means that the
settings of a command that was not run are accepted. `python scripts/documented_commands.py --runs FOLDER --write` writes this
list; FOLDER holds the runs of the lab's table.

"""


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
            for line in re.sub(r"\s*\\\n\s*", " ", body).splitlines():
                if found := re.sub(r"\s+#\s.*$", "", line).strip():
                    yield re.sub(r"\s+", " ", found) if "'" not in found and '"' not in found else found


def why_not(command: str) -> str:
    """Say why a command is not run; empty for one that is."""
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


def runs_of(folder: Path) -> list[str]:
    """Ids of a folder's runs, the one read last at the end."""
    return [path.parent.name for path in sorted(folder.glob("runs/*/readings.json"), key=lambda path: path.stat().st_mtime)]


def page_ended(page: Path, folder: Path, limit: float) -> Iterator[Ended]:
    """Run a page's commands in `folder`."""
    for _, title, body in BLOCK.findall(page.read_text(encoding="utf-8")):
        if title:
            (folder / title).parent.mkdir(parents=True, exist_ok=True)
            (folder / title).write_text(body, encoding="utf-8")
    commands = list(commands_of(page))
    before = set(runs_of(folder))
    stand_ins: dict[str, str] = {}
    if any(NAMES.search(command) for command in commands):
        run(FIRST, folder, limit)
        made = [one for one in runs_of(folder) if one not in before]
        stand_ins = {name: made[place % 3] for place, name in enumerate(STAND_INS)}
    cuts: dict[str, str] = {}
    if any("--thresholds" in command and NEWEST not in command for command in commands):
        run(CUTS, folder, limit)
        cuts = dict.fromkeys(STAND_INS, runs_of(folder)[-1])
    for command in commands:
        reason = "run by tests/e2e" if page.stem.startswith(TUTORIALS) else why_not(command)
        if reason and not (reason.endswith("--runs") and (folder / "runs" / "tables" / "lab").exists()):
            if command.startswith("conceptseg ") and " -m " not in command and not page.stem.startswith(TUTORIALS):
                composed, said = run(f"conceptseg --cfg job {command.removeprefix('conceptseg')}", folder, limit)
                reason = f"{reason}; " + ("does not compose" if composed else "composes")
                if composed:
                    print(f"{page.stem}: {command}: {said}", file=sys.stderr, flush=True)
            yield Ended(page.stem, command, f"not run: {reason}", failed="does not" in reason)
            continue
        meant = cuts if "--thresholds" in command and NEWEST not in command else stand_ins
        typed = re.sub("|".join(map(re.escape, meant)) or r"(?!)", lambda name, meant=meant: meant[name[0]], command)
        if NEWEST in typed:
            typed = typed.replace(NEWEST, runs_of(folder)[-1])
        started = time.monotonic()
        code, said = run(typed, folder, limit)
        print(f"{page.stem}: {typed}: {code}" + (f"\n{said}" if code else ""), file=sys.stderr, flush=True)
        faults = code == 1 and command.startswith("conceptseg-doctor") and "\n- " in said
        status = f"{code}, with what this machine lacks" if faults else str(code)
        yield Ended(page.stem, command, status, time.monotonic() - started, bool(code) and not faults)


def line_of(one: Ended) -> str:
    """A line of the list."""
    shown = one.command.replace("|", "\\|")
    return f"| {one.page} | `{shown}` | {one.said} | {f'{one.seconds:.0f}' if one.seconds else ''} |"


def write(found: dict[str, list[str]], order: list[str]) -> None:
    """Write the list, with the lines of pages that were not run now as they stand."""
    lines = LIST.read_text(encoding="utf-8").splitlines() if LIST.exists() else []
    held = {name: [line for line in lines if line.startswith(f"| {name} | `")] for name in order} | found
    every = [line for name in order for line in held.get(name, [])]
    statuses = [line.rsplit(" | ", 2)[1] for line in every]
    counts = [
        f"{statuses.count('0')} ended with 0",
        f"{sum('lacks' in one for one in statuses)} with 1, as a doctor does that finds something missing",
        f"{sum(one.startswith('not run') for one in statuses)} were not run",
    ]
    failed = sum(one[0].isdigit() and one != "0" and "lacks" not in one for one in statuses)
    counted = f"Of {len(every)} commands {', '.join(counts)}, {failed} failed."
    pages = {name: REPO / "README.md" if name == "README" else REPO / "docs" / f"{name}.md" for name in order}
    if open_ones := [name for name, page in pages.items() if len(held.get(name, [])) < len(list(commands_of(page)))]:
        counted += f" Not run as a whole since they changed: {', '.join(open_ones)}."
    LIST.write_text(HEAD + counted + "\n\n" + "\n".join([COLUMNS, *every]) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="names of pages without .md; all by default")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one command may take")
    parser.add_argument("--runs", type=Path, help="a folder of runs that each page begins with")
    parser.add_argument("--write", action="store_true", help=f"write the list into {LIST.relative_to(REPO)}")
    said = parser.parse_args()
    every = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
    pages = [page for page in every if not said.pages or page.stem in said.pages]
    print(COLUMNS, flush=True)
    failed = False
    for page in pages:
        lines = []
        with tempfile.TemporaryDirectory() as folder:
            if any(IN_CHECKOUT.search(command) for command in commands_of(page)) and not page.stem.startswith(TUTORIALS):
                subprocess.run(["git", "clone", "-q", "--shared", REPO, folder], check=True)
            if said.runs:
                shutil.copytree(said.runs, Path(folder, "runs"))
            for one in page_ended(page, Path(folder), said.limit):
                lines.append(line_of(one))
                print(lines[-1], flush=True)
                failed |= one.failed
        if said.write:
            write({page.stem: lines}, [one.stem for one in every])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
