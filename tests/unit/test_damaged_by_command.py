"""Damaged rows before every command that reads rows: each is told, none changes a number, and a run computes them again.

`python tests/unit/test_damaged_by_command.py ROUNDS` flips one random bit in each line, in so many rounds.
"""

from __future__ import annotations

import csv
import json
import logging
import random
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import FIELDS, TEXTS, damaged_lines, flipped

from conceptseg.cli.compare import main as compare
from conceptseg.cli.evaluate import evaluate
from conceptseg.cli.report import report
from conceptseg.cli.runs import main as runs
from conceptseg.store import run as storing

KINDS = [*FIELDS, *TEXTS]
KEPT = 4
"""Lines that are left whole."""
ARGS = (
    "dataset=scenes", "dataset.size=16", f"dataset.count={(len(KINDS) + KEPT) // 2}", "dataset.objects=[1,1]",
    "protocol=imagenet_standard", "report.resamples=20", "report.pictures=2", "runtime.progress=false", "runtime.threads=1",
    "runtime.batch_size=80",
)  # fmt: skip


def called(command, *words):
    """Return stdout, stderr and the exit code of a command."""
    out, err = sys.stdout, sys.stderr
    import io

    sys.stdout, sys.stderr, sys.argv = io.StringIO(), io.StringIO(), [command.__name__, *words]
    heard = logging.StreamHandler(sys.stderr)
    logging.getLogger("conceptseg.store.run").addHandler(heard)
    try:
        command()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        said = sys.stdout.getvalue() + sys.stderr.getvalue()
        logging.getLogger("conceptseg.store.run").removeHandler(heard)
        sys.stdout, sys.stderr = out, err
    return code, said


def prepared():
    """Two runs on the same data, in the working folder: the file of rows that is damaged, and the ids."""
    found = []
    for name in ("centre_prior", "constant"):
        code, said = called(evaluate, f"extractor={name}", *ARGS, *(["runtime.keep_maps=false"] if name == "constant" else []))
        assert code == 0, said
        (new,) = {path.parent.name for path in Path("runs").glob("*/manifest.json")} - set(found)
        found.append(new)
    return Path("runs") / found[0] / "rows-0of1.jsonl", found


def by_name(rows):
    """Rows without times and seals, by sample and segmenter."""
    left_out = ("seconds", "check", "run")
    return {(row["sample"], row["segmenter"]): {k: v for k, v in row.items() if k not in left_out} for row in rows}


def checked(file, ids, lines):
    """Drive every command over a file of these lines. Returns the numbers of the lines that were told, and what went wrong."""
    right = [json.loads(line) for line in file.read_bytes().splitlines()]
    before = (file.parent / "readings.json").read_bytes()
    file.write_bytes(b"".join(lines))
    wrong, told = [], {}
    commands = {
        "compare": (compare, ids[1], ids[0], "--resamples", "20", "--json", "compared.json"),
        "csv": (runs, "export", ids[0], "--to", "rows.csv"),
        "zip": (runs, "export", ids[0], "--to", "run.zip"),
        "show": (runs, "show", ids[0]),
        "list": (runs, "list"),
        "page": (report, "--table", f"runs/{ids[0]}/table.json", "--export", "page"),
        "resume": (evaluate, "extractor=centre_prior", *ARGS),
        "again": (evaluate, "extractor=centre_prior", *ARGS),
    }
    for name, (command, *words) in commands.items():
        code, said = called(command, *words)
        told[name] = {number for number in range(1, len(lines) + 1) if f"rows-0of1.jsonl, line {number}: " in said}
        if code not in (0, 1) or "Traceback" in said or (code == 1 and name != "compare"):
            wrong.append(f"{name}: ended with {code}: {said[-600:]}")
    for name in ("csv", "zip", "page", "resume"):
        if told[name] != told["compare"]:
            wrong.append(f"{name} tells of lines {sorted(told[name])}, compare of {sorted(told['compare'])}")
    with open("rows.csv", encoding="utf-8") as exported:
        held = {(row["sample"], row["segmenter"]): row["inter"] for row in csv.DictReader(exported)}
    if changed := [one for one, inter in held.items() if inter != json.dumps(by_name(right).get(one, {}).get("inter"))]:
        wrong.append(f"the export changed {changed}")
    with zipfile.ZipFile("run.zip") as archive:
        if archive.read(f"{ids[0]}/rows-0of1.jsonl") != b"".join(lines):
            wrong.append("the archive holds other rows")
    if by_name(storing.RunStore(file.parent).rows().values()) != by_name(right):
        wrong.append("the rows after a run are not those before")
    if (file.parent / "readings.json").read_bytes() != before:
        wrong.append("the readings after a run are not those before")
    for name in ("rows.csv", "run.zip"):
        Path(name).unlink()
    return told["compare"], held.keys(), wrong


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storing, "WARNINGS", 1000)
    monkeypatch.setattr(sys, "argv", [])
    levels = {name: (list(logging.getLogger(name).handlers), logging.getLogger(name).level) for name in (None, "conceptseg")}
    yield
    for name, (handlers, level) in levels.items():
        logging.getLogger(name).handlers, _ = handlers, logging.getLogger(name).setLevel(level)


def test_every_kind_of_damage_is_told_by_every_command_that_reads_rows(here):
    file, ids = prepared()
    lines = file.read_bytes().splitlines(True)
    assert len(lines) == len(KINDS) + KEPT
    damaged = [dict(damaged_lines(line))[kind] for kind, line in zip(KINDS, lines, strict=False)] + lines[-KEPT:]
    told, held, wrong = checked(file, ids, damaged)
    assert not wrong, "\n".join(wrong)
    assert told == set(range(1, len(KINDS) + 1)) and len(held) == KEPT


def main() -> None:
    """Flips of bits, a bit a line, and counts."""
    import os
    import tempfile

    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1  # commands are called with arguments of their own
    storing.WARNINGS = 1000
    os.chdir(tempfile.mkdtemp())
    file, ids = prepared()
    whole, draw = file.read_bytes(), random.Random(0)
    count = told_of = kept = 0
    for _ in range(rounds):
        lines = whole.splitlines(True)
        spoilt = [flipped(line, draw.randrange(8 * len(line))) for line in lines]
        told, held, wrong = checked(file, ids, spoilt)
        count, told_of, kept = count + len(lines), told_of + len(told), kept + len(held)
        file.write_bytes(whole)
        print(count, "flips,", told_of, "told,", kept, "rows held,", len(wrong), "wrong", *wrong, sep="\n", flush=True)


if __name__ == "__main__":
    main()
