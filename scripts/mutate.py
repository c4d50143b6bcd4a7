"""Measure how many small faults in the numeric core the tests find.

    python scripts/mutate.py --count 40 --seed 18          # a table, and the share that was found
    python scripts/mutate.py --count 40 --seed 18 --list   # the faults only
    python scripts/mutate.py --count 40 --seed 18 --only 7 12

Each fault (a swapped operator or argument, a dropped term, a changed constant, a negated condition) is written alone into a
temporary copy of the checkout. The test files that reach its module run there until one test fails: direct importers first, the
contract of the extractors that use it last. A test counts only if it passes in the copy without a fault. End-to-end tests do not
run: the lab table alone would find more, in minutes a fault.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
CORE = ("metrics", "saliency", "segment", "extractors", "protocols.py", "trace", "backbones")
FOR_PEOPLE = ("backbones/sheets.py", "extractors/explanation.py")
"""Files of these folders that make no number."""
TESTS = ("unit", "formulas", "golden", "explain")
CONTRACT = "tests/contract/test_extractors.py"
LIBRARIES = (
    "torch", "torchvision.transforms", "timm", "open_clip", "torchmetrics", "sklearn.metrics", "scipy.stats", "hypothesis",
    "diffusers.models.autoencoders", "diffusers.models.unets", "diffusers.models.transformers", "diffusers.loaders.peft",
    "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5", "datasets", "h5py", "pandas",
    "hydra", "matplotlib.pyplot",
)  # fmt: skip
EXTRACTORS = 6
"""Extractors that run in the contract where more than that use a module."""
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
SYMMETRIC = ("max", "min", "isinstance", "getattr", "hasattr", "super")
"""Calls whose first arguments may be swapped without effect, or whose swap raises at once."""
NOT_ARITHMETIC = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
"""Messages and imports: a fault there changes no number."""


@dataclass(frozen=True)
class Fault:
    """One expression of a file replaced by another."""

    file: str
    line: int
    start: int
    end: int
    """Where the expression lies, in bytes of the file."""
    old: str
    new: str

    def applied(self, text: bytes) -> bytes:
        return text[: self.start] + self.new.encode() + text[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {_short(self.old)}  ->  {_short(self.new)}"


@dataclass(frozen=True)
class Outcome:
    """verdict: found, survived or timeout; by: the first test that failed."""

    verdict: str
    by: str
    seconds: float


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"


# ---------------------------------------------------------------- faults


def faults(file: Path, root: Path) -> list[Fault]:
    """Every fault that this script can write into a file, in the order of its lines."""
    text = file.read_bytes()
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = []
    for node in _expressions(ast.parse(text)):
        start = lines[node.lineno - 1] + node.col_offset
        end = lines[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        for changed in _changed(node):
            new = f"({ast.unparse(changed)})"
            old = text[start:end].decode()
            found.append(Fault(file.relative_to(root).as_posix(), node.lineno, start, end, old, new))
    return found


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions that a number can depend on: no annotation, message, type alias or constant of a class."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "keywords") and not isinstance(node, ast.Call):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, NOT_ARITHMETIC):
                continue
            if isinstance(node, ast.ClassDef | ast.Module) and isinstance(child, ast.Assign | ast.AnnAssign | ast.Expr):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.expr):
                yield child
            yield from _expressions(child)


def _changed(node: ast.expr) -> Iterator[ast.expr]:
    new = copy.deepcopy(node)
    match new:
        case ast.BinOp(left=left, right=right) if any(
            isinstance(s, ast.Constant) and isinstance(s.value, str) for s in (left, right)
        ):
            return  # a path or a text
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            new.op = OPERATORS[type(op)]()  # type: ignore[assignment]
            yield new
            if isinstance(op, ast.Add | ast.Sub):
                yield copy.deepcopy(node.left)  # type: ignore[attr-defined]
        case ast.BinOp(op=ast.MatMult()):
            yield ast.BinOp(new.right, new.op, new.left)
        case ast.BoolOp():
            new.op = OPERATORS[type(new.op)]()  # type: ignore[assignment]
            yield new
        case ast.Compare(ops=[op, *_]) if type(op) in OPERATORS:
            new.ops[0] = OPERATORS[type(op)]()  # type: ignore[call-overload]
            yield new
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield new.operand
        case ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield new
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield ast.Constant(value * 1.5 if value else 0.5)
        case ast.Call(func=ast.Name(id=name)) if name in SYMMETRIC:
            return
        case ast.Call(args=[first, second, *_]) if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            new.args[:2] = [second, first]
            yield new


# ---------------------------------------------------------------- tests


class Imports:
    """Who imports whom, read from the source: of the package by dotted name, of the tests by file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules = {_dotted(file, root): file for file in sorted((root / "conceptseg").rglob("*.py"))}
        self.tests = {file.stem: file for file in sorted((root / "tests").rglob("*.py"))}
        self._of: dict[Path, set[Path]] = {}

    def of(self, file: Path) -> set[Path]:
        if file not in self._of:
            names = set()
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            found = {self.modules[name] for name in names & self.modules.keys()}
            self._of[file] = found | {self.tests[name] for name in names & self.tests.keys()}
        return self._of[file]

    def distance(self, file: Path, target: Path) -> int | None:
        """How many imports lie between a file and another; None where it does not reach it."""
        reached, edge, steps = {file}, {file}, 0
        while edge:
            if target in edge:
                return steps
            edge = {one for here in edge for one in self.of(here)} - reached
            reached |= edge
            steps += 1
        return None


def _dotted(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def tests_of(module: Path, imports: Imports, farthest: int) -> list[list[str]]:
    """Arguments of pytest, a list per call: near files first, then the contract of extractors that use the module."""
    root = imports.root
    ranked = []
    for folder in TESTS:
        for file in sorted((root / "tests" / folder).glob("test_*.py")):
            steps = imports.distance(file, module)
            if steps is not None and steps <= farthest:
                ranked.append((steps, file.stat().st_size, file.relative_to(root).as_posix()))
    calls = []
    if ">>>" in module.read_text(encoding="utf-8"):
        calls.append(["--doctest-modules", module.relative_to(root).as_posix()])
    for wanted in range(1, farthest + 1):
        if files := [name for steps, _, name in sorted(ranked) if steps == wanted]:
            calls.append(files)
    names = []
    for sheet in sorted((root / "conf" / "extractor").glob("[!_]*.yaml")):
        text = sheet.read_text(encoding="utf-8")
        classes = [name.rpartition(".")[0] for name in re.findall(r"_target_: (conceptseg\S+)", text)]
        for backbone in re.findall(r"^\s+- /?backbone@\S+: (\S+)", text, re.MULTILINE):
            text = (root / "conf" / "backbone" / f"{backbone}.yaml").read_text(encoding="utf-8")
            classes += [name.rpartition(".")[0] for name in re.findall(r"_target_: (conceptseg\S+)", text)]
        if any(imports.distance(imports.modules[name], module) is not None for name in classes if name in imports.modules):
            names.append(f"[{sheet.stem}]")
    if names and "metrics" not in module.parts and "segment" not in module.parts:
        some = names[:: -(-len(names) // EXTRACTORS)]
        calls.append([CONTRACT, "-k", " or ".join(some)])
    return calls


def import_libraries() -> None:
    """Once, in the parent: every call of pytest is a fork of it, and imports the package alone."""
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HYDRA_FULL_ERROR",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
    ):
        os.environ[name] = "1"  # as tests/conftest.py sets them before anything is imported
    sys.dont_write_bytecode = True
    for name in LIBRARIES:
        import_module(name)


def run_tests(root: Path, arguments: list[str], limit: float) -> tuple[int | None, str]:
    """Exit status of pytest, None where it ran past `limit` seconds, and the first test that failed."""
    said = root / "said.txt"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.setsid()
            os.chdir(root)
            sys.path[:0] = [str(root)]
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            status = pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--timeout=120", *arguments])
            sys.stdout.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
        time.sleep(0.1)
    status = os.waitstatus_to_exitcode(ended[1])
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said.read_text(errors="replace"), re.MULTILINE)
    return status, failed[0] if failed else f"pytest ended with {status}"


def judged(fault: Fault, root: Path, imports: Imports, farthest: int, limit: float) -> Outcome:
    """Write a fault into the copy, run the tests that reach it, and take it out again."""
    file, started = root / fault.file, time.monotonic()
    clean = file.read_bytes()
    calls = tests_of(file, imports, farthest)
    file.write_bytes(fault.applied(clean))
    try:
        for arguments in calls:
            status, failed = run_tests(root, arguments, limit)
            if status is None:
                return Outcome("timeout", "", time.monotonic() - started)
            if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                return Outcome("found", failed, time.monotonic() - started)
        return Outcome("survived", "", time.monotonic() - started)
    finally:
        file.write_bytes(clean)


def copied(to: Path) -> Path:
    """A copy of the files that git knows or would add, with the changes that the checkout holds."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=REPO, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (REPO / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO / name, to / name)
    return to


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--limit", type=float, default=900, help="seconds that one call of pytest may take")
    parser.add_argument("--distance", type=int, default=3, help="imports between a test file and the module with the fault")
    parser.add_argument("--list", action="store_true", help="print the faults, run nothing")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="faults to run, by their number in the list")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = copied(Path(folder))
        package = root / "conceptseg"
        files = [
            f for name in CORE for f in ([package / name] if name.endswith(".py") else sorted((package / name).rglob("*.py")))
        ]
        files = [file for file in files if file.relative_to(package).as_posix() not in FOR_PEOPLE]
        every = [fault for file in files for fault in faults(file, root)]
        drawn = sorted(random.Random(settings.seed).sample(every, settings.count), key=lambda f: (f.file, f.start))
        chosen = [(n, f) for n, f in enumerate(drawn, 1) if not settings.only or n in settings.only]
        print(f"{len(drawn)} of {len(every)} faults in {len(files)} files, seed {settings.seed}", flush=True)
        imports, outcomes = Imports(root), []
        if not settings.list:
            import_libraries()
        for number, fault in chosen:
            if settings.list:
                print(f"{number:3}  {fault}")
                continue
            outcome = judged(fault, root, imports, settings.distance, settings.limit)
            outcomes.append(outcome)
            print(f"{number:3}  {outcome.verdict:8} {outcome.seconds:5.0f} s  {fault}  {outcome.by}", flush=True)
        if settings.list:
            return 0
        if judges := sorted({outcome.by for outcome in outcomes if outcome.by}):
            status, failed = run_tests(root, [name for name in judges if "::" in name], settings.limit)
            if status:
                print(f"{failed or 'a test'} fails without a fault too: the verdicts above are worth nothing until it passes")
                return 1
        counts = {name: sum(outcome.verdict == name for outcome in outcomes) for name in ("found", "survived", "timeout")}
        print(", ".join(f"{count} {name}" for name, count in counts.items()) + f", of {len(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
