"""Who may import whom. Read from the source, so that an import inside a function counts like any other."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median

import pytest

import conceptseg

PACKAGE = Path(conceptseg.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Part -> the parts it may import; every part may import itself.
# "" is conceptseg/__init__.py: the version, and where conf/ lies.
GROUND = {"announcing", "downloads", "entry_points", "errors", "files", "keys", "reading", "types", ""}
PEERS = {"saliency", "segment", "metrics", "data", "backbones"}
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "announcing": set(),
    "entry_points": set(),
    "downloads": {"errors"},
    "errors": set(),
    "files": set(),
    "reading": {"errors"},
    "keys": {""},
    "logs": {"errors"},
    "types": {"errors"},
    "config": {"errors", "keys"},
    "targets": {"config", "entry_points", "errors"},
    "store": GROUND,
    **{peer: GROUND | PEERS for peer in PEERS},
    "extractors": GROUND | PEERS | {"targets", "trace"},
    "given_names": {"errors", "reading", "types"},
    "windows": {"errors", "segment", "types"},
    "protocols": GROUND | PEERS | {"given_names", "windows"},
    "report": {"errors", "files", "reading", "store", "metrics", "types"},
    "source": {"keys"},
    "evaluation": GROUND | PEERS | {"config", "extractors", "logs", "protocols", "source", "store", "targets", "windows"},
    "tables": GROUND | PEERS | {"config", "evaluation", "extractors", "given_names", "protocols", "report", "store", "targets"},
    "lab": GROUND | PEERS | {"config", "evaluation", "extractors", "protocols", "store"},
    "trace": GROUND | {"backbones"},
    "studies": GROUND | {"backbones", "data", "trace"},
    "cli": GROUND
    | {"backbones", "config", "data", "evaluation", "extractors", "lab", "logs", "metrics"}
    | {"entry_points", "report", "store", "studies", "tables", "targets"},
    "__main__": {"cli"},
}
HYDRA_COMMANDS = ("composing", "doctor", "evaluate", "lab", "plan", "refusals", "table")
MODELS = {"torch", "torchvision", "torchmetrics", "diffusers", "transformers", "open_clip"}


def part_of(path: Path) -> str:
    """The top-level part a file belongs to: "data" for data/words/__init__.py, "cli" for cli.py."""
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of every module that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "conceptseg" else {node.module}
    return frozenset(found)


def parts_imported(path: Path) -> set[str]:
    inside = {name.split(".")[1:] and name.split(".")[1] for name in imports(path) if name.split(".")[0] == "conceptseg"}
    return {"" if name in ([], "__version__") else name for name in inside}


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_imports_only_parts_below_its_own(path):
    part = part_of(path)
    assert part in ALLOWED, f"{part} is new: give it a place in ALLOWED"
    assert parts_imported(path) - {part} <= ALLOWED[part]


def test_no_two_parts_import_each_other():
    graph = {part: set() for part in ALLOWED}
    for path in MODULES:
        graph[part_of(path)] |= parts_imported(path) - {part_of(path)}
    assert not circle(graph)


def test_no_two_files_import_each_other():
    """Also inside one part, and by an import inside a function."""
    names = {module_name(path): path for path in MODULES}
    graph = {
        name: {n if n in names else n.rpartition(".")[0] for n in imports(path) if n.startswith("conceptseg.")}
        & names.keys() - {name}
        for name, path in names.items()
    }
    assert not circle(graph)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that are left when everything that needs nothing of the rest is taken away, again and again."""
    left = dict(graph)
    while ready := [node for node, needs in left.items() if not needs & left.keys()]:
        for node in ready:
            del left[node]
    return sorted(left)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_nothing_imports_cli_but_the_main_module():
    assert {named(p) for p in MODULES if part_of(p) != "cli" and "cli" in parts_imported(p)} == {"__main__.py"}


def test_only_config_targets_cli_and_the_recipes_import_hydra_or_omegaconf():
    found = {named(p) for p in MODULES if {n.split(".")[0] for n in imports(p)} & {"hydra", "omegaconf"}}
    assert found == {"config.py", "targets.py", "lab/recipes.py", *(f"cli/{name}.py" for name in HYDRA_COMMANDS)}


def test_reports_import_no_model():
    for path in (PACKAGE / "report").glob("*.py"):
        assert not {n.split(".")[0] for n in imports(path)} & MODELS, path


def test_no_module_is_called_utils_or_helpers():
    assert not [p for p in MODULES if p.stem in ("utils", "util", "helpers", "common", "misc")]


def loaded_by(code: str) -> set[str]:
    """Top-level names of sys.modules after running the code in a fresh interpreter."""
    tail = "\nimport sys; print('\\nLOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    said = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    return set(said.stdout.rpartition("LOADED ")[2].split())


def test_importing_the_package_loads_no_torch_and_no_hydra():
    assert not loaded_by("import conceptseg") & {*MODELS, "hydra", "omegaconf", "numpy"}


def test_importing_the_configuration_loads_no_torch():
    assert not loaded_by("import conceptseg.config, conceptseg.keys, conceptseg.errors") & MODELS


def test_importing_the_report_loads_no_torch():
    code = "import conceptseg.report.results_md, conceptseg.report.terminal, conceptseg.report.results"
    assert not loaded_by(code) & MODELS


def test_answering_loads_no_torch():
    """One after the other in one process."""
    code = f"""
import sys
from conceptseg.cli.evaluate import evaluate
for argument in ("--help", "--version", "--cfg=job"):
    sys.argv = ["conceptseg", argument]
    try:
        evaluate()
    except SystemExit as end:
        assert not end.code, (argument, end.code)
    assert not sys.modules.keys() & {MODELS}, argument
"""
    assert not loaded_by(code) & MODELS


def test_help_takes_a_few_times_as_long_as_importing_hydra(tmp_path):
    """CPU seconds of processes, medians of three after one that writes bytecode. Measured: 4 to 6 times; torch alone adds 8.

    A ratio, since machines differ in speed and may be busy.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60
        )
        assert said.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times = [(seconds("-m", "conceptseg", "--help"), seconds("-c", "import hydra, omegaconf")) for _ in range(4)][1:]
    assert median(ours / theirs for ours, theirs in times) < 9, times
