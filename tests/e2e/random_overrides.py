"""Random lists of overrides, half of them senseless. `python tests/e2e/random_overrides.py 3000` runs that many lists.

Whatever is typed, a command ends within its time, prints no traceback, and leaves no run folder behind if it refuses.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

KEYS = (
    "extractor", "extractor.grid", "extractor.seed", "extractor.sigma", "extractor.backbone", "extractor.backbone.path",
    "extractor.backbone.dtype", "extractor.backbone.image_size", "extractor.backbone.revision", "extractor.noise",
    "extractor._target_", "dataset", "dataset.count", "dataset.seed", "dataset.size", "dataset.split", "dataset.objects",
    "dataset.root", "dataset.path", "dataset.limit", "dataset._target_", "protocol", "protocol.image_size", "protocol.mask_size",
    "protocol.background", "protocol.segmenters", "protocol.task", "protocol.caption", "protocol.version", "views", "views.x",
    "views.output.layers", "views.output.timesteps", "views.output.space", "views.output.softmax", "table", "table.new",
    "table.only", "table.columns", "table.backbones", "launcher", "launcher.shards", "experiment", "runtime", "runtime.threads",
    "runtime.batch_size", "runtime.max_failures", "runtime.shard_index", "runtime.shard_count", "runtime.on_code_change",
    "runtime.device", "runtime.keep_maps", "runtime.retry_failed", "runtime.allow_targets", "runtime.new", "report",
    "report.columns", "report.level", "report.draw", "report.pictures", "report.trackers", "report.costs", "report.benchmarks",
    "report.results_md", "hydra.run.dir", "new", "new.inner",
    "protocol.names", "protocol.names_file", "protocol.names_total", "protocol.names_seed", "protocol.background_rule",
    "protocol.measures", "protocol.select", "protocol.order", "protocol._target_", "protocol.segmenters.0.decision",
    "dataset.words", "dataset.classes", "dataset.mask_encoding", "dataset.void", "dataset.annotations", "dataset.name",
    "dataset.distractors", "dataset.placement", "extractor.randomise", "extractor.backbone.randomise",
    "backbone@extractor.backbone", "extractor.backbone.device", "launcher.parameters", "launcher.folder", "experiment@new",
    "table.rows", "table.blocks", "table.against", "table.title", "views.map", "runtime.runs", "runtime.download",
    "runtime.verbosity", "runtime.progress", "runtime.record_environment", "report.rows", "report.top", "report.sort",
    "report.digits", "report.intervals", "report.detail", "report.resamples", "report.development", "report.split_seed",
    "report.publish", "hydra.searchpath", "hydra.mode", "hydra.sweeper", "hydra.output_subdir", "hydra.verbose",
)  # fmt: skip
VALUES = (
    "", "null", "true", "0", "1", "-1", "3", "1.5", "-0.5", "nan", "inf", "1e400", "99999",
    "100000000000000000000", "a", "no", "''", "[]", "[[]]", "{}", "{a:1}", "[1,2]", "[1,1]", "[a]", "[null]",
    "[0.5]", "???", "${x}", "${oc.env:HOME}", "${runtime.device}", "..", "/dev/null", "/proc/nowhere",
    "nowhere", "lab:flx", "lab:vit", "os.system", "conceptseg.keys.digest", "oracle", "constant",
    "concept_attention", "lab_clip", "lab_flux", "scenes", "scenes_hard", "scenes_single", "scenes_multi",
    "map", "lab", "cpu", "cuda", "accept", "fork", "words", "per_cell", "output", "all", "last 2", "mean",
    "accuracy", "ap_image", "\u00e9", "a b", "x" * 300,
    "named", "distractors", "file", "threshold", "none", "coco", "folder", "{seed:0}", "{0:a}", "[map]", "{map:null}", "best",
    "full", "quiet", "[pointing_game]", "[{a:1}]", "a,b", "range(1,9)", "choice(a)", "${.}", "${..}", "${extractor}",
    "${oc.decode:1}", "${oc.create:{a:1}}", "${a}${a}", "'${'", "$(ls)", "*", "\\x1b[31m", "\t", "!!python/object:os.system",
    "1_000", "0x10", "12:30", "2024-01-01", "[-1,-1]", "[3,1]", "[1,2,3,4,5,6,7,8,9]", "file:///dev/null", "pkg://os",
)  # fmt: skip
PREFIXES = ("", "", "", "", "+", "++", "~")
BASE = (
    "extractor=constant",
    "dataset=scenes",
    "dataset.count=1",
    "dataset.objects=[1,1]",
    "protocol=scenes_single",
    "runtime.threads=1",
)
"""Alone, these give a table: a list that changes nothing runs to its end."""


def overrides(number: int) -> list[str]:
    """The list of that number: always the same."""
    draw = random.Random(number)
    chosen = [f"{draw.choice(PREFIXES)}{draw.choice(KEYS)}={draw.choice(VALUES)}" for _ in range(draw.choice((1, 1, 2, 3)))]
    return [*BASE, *chosen]


def faults(code: int, said: str, left: list[Path], seconds: float) -> list[str]:
    """Sentences about what a command must not do. left: run folders that have a manifest."""
    found = []
    if "Traceback" in said:
        found.append("a traceback: " + said.strip().splitlines()[-1])
    if code not in (0, 1):
        found.append(f"ended with {code}")
    if code == 1 and [folder for folder in left if not list(folder.glob("rows-*.jsonl"))]:
        found.append("a run folder of a refused configuration")
    if seconds > 60:
        found.append(f"took {seconds:.0f} s")
    return found


def main() -> None:
    import shutil
    import tempfile
    import time

    from commands import Commands, Warm

    first, last = (0, int(sys.argv[1])) if len(sys.argv) == 2 else (int(sys.argv[1]), int(sys.argv[2]))
    import os

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    scratch = Path(tempfile.mkdtemp())
    warm = Warm(environment, scratch, ("--package",))
    wrong = 0
    for number in range(first, last):
        folder = scratch / "here"
        folder.mkdir()
        started = time.monotonic()
        ended = Commands(warm, folder, environment).start(*overrides(number)).wait()
        left = sorted(manifest.parent for manifest in folder.glob("**/manifest.json"))
        problems = faults(ended.code, ended.out + ended.err, left, time.monotonic() - started)
        wrong += bool(problems)
        for problem in problems:
            print(f"{number} {overrides(number)[len(BASE) :]}: {problem}", flush=True)
        shutil.rmtree(folder)
    warm.stop()
    print(f"{last - first} lists, {wrong} with a fault")


if __name__ == "__main__":
    main()
