"""Other checkouts and changed code: a tree uses its own configuration, and only code that makes a run's numbers parts it from
its rows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TESTS, Commands, Warm

REPO = TESTS.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FINISHED = ("oracle", "naclip")
ON_FOUR = ("dataset=scenes", "protocol=scenes_single", "dataset.objects=[1,1]", "dataset.count=4")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A second checkout beside the one that is installed."""
    root = tmp_path_factory.mktemp("second") / "checkout"
    for part in ("conceptseg", "conf", "benchmarks", "scripts"):
        shutil.copytree(REPO / part, root / part, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    return root


@pytest.fixture(scope="module")
def warm_there(tree, child_environment, tmp_path_factory, libraries) -> Iterator[Warm]:
    """Forks commands that import the second checkout."""
    path = os.pathsep.join((str(tree), child_environment["PYTHONPATH"]))
    parent = Warm({**child_environment, "PYTHONPATH": path}, tmp_path_factory.mktemp("said"), origin=libraries, tree=(tree,))
    yield parent
    parent.stop()


@pytest.fixture
def there(warm_there, tmp_path) -> Commands:
    """Commands of the second checkout, started elsewhere."""
    return Commands(warm_there, tmp_path, warm_there.environment)


# ---------------------------------------------------------------- one tree


WHERE = """
import json
from importlib import resources
import conceptseg
from hydra import compose, initialize_config_module
from conceptseg.config import register
from conceptseg.report.quoted import shipped
register()
with initialize_config_module("conceptseg.conf", version_base="1.3"):
    composed = compose("evaluate", overrides=["extractor=naclip"])
print(json.dumps({
    "code": conceptseg.__file__, "conf": str(resources.files("conceptseg.conf")),
    "benchmarks": str(resources.files("conceptseg.benchmarks")), "claim": str(shipped("conceptattention-voc_single")),
    "sigma": composed.extractor.sigma,
}))
"""


def test_a_second_checkout_reads_its_own_configuration_and_quoted_numbers(there, tree):
    sheet = tree / "conf" / "extractor" / "naclip.yaml"
    text = sheet.read_text()
    sheet.write_text(text.replace("sigma: 5.0", "sigma: 7.5"))
    found = json.loads(there.run_cold("-c", WHERE).out.splitlines()[-1])
    sheet.write_text(text)
    assert found.pop("sigma") == 7.5
    assert {name: Path(place).is_relative_to(tree) for name, place in found.items()} == dict.fromkeys(found, True)


def test_nothing_else_of_a_checkout_joins_the_package(there, tree):
    (tree / "tests").mkdir(exist_ok=True)
    (tree / "tests" / "__init__.py").touch()
    for name in ("tests", "scripts", "docs"):
        there.run_cold("-c", f"import conceptseg.{name}", code=1)


def test_a_tree_without_configuration_does_not_borrow_that_of_another(there, tree, tmp_path):
    shutil.copytree(tree / "conceptseg", tmp_path / "bare" / "conceptseg", ignore=shutil.ignore_patterns("weights"))
    bare = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "bare"), there.environment["PYTHONPATH"]))}
    said = there.run_cold("-c", "import conceptseg.conf", code=1, env=bare)
    assert "ModuleNotFoundError: conceptseg.conf: " in said.err and "Copy conf/ beside conceptseg/" in said.err
    there.run_cold("-c", "import conceptseg.config, conceptseg.errors", env=bare)


# ---------------------------------------------------------------- what a change of code costs


def rows(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("runs/*/rows-*.jsonl"))}


def evaluate(commands: Commands, *overrides: str, code: int = 0):
    return commands.run(*overrides, *ON_FOUR, code=code)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_a_new_method_costs_nobody_a_row_and_a_changed_statement_costs_its_own(there, tree):
    evaluate(there, "hydra.mode=MULTIRUN", f"extractor={','.join(FINISHED)}")
    before = rows(there.folder)
    assert len(before) == len(FINISHED)

    # docs/add_a_method.md, beside finished runs
    there.run_cold(str(tree / "scripts" / "new_baseline.py"), "own_clip")
    extractors = tree / "conceptseg" / "extractors"
    assert (extractors / "own_clip.py").exists()
    edit(extractors / "naclip.py", '"""NACLIP (', '"""Neighbour-aware CLIP, NACLIP (')
    edit(extractors / "controls.py", "class Oracle(", "# the upper bound of every table\nclass Oracle(")
    said = evaluate(there, "hydra.mode=MULTIRUN", f"extractor={','.join((*FINISHED, 'own_clip'))}").said
    assert said.count("0 samples computed, 4 held already") == len(FINISHED)
    assert said.count("4 samples computed, 0 held already") == 1
    assert {name: rows(there.folder)[name] for name in before} == before
    assert len(rows(there.folder)) == len(FINISHED) + 1

    # a statement
    edit(extractors / "naclip.py", "version = 1", "version = 1\n    another = 2")
    refused = evaluate(there, "extractor=naclip", code=1)
    assert "was written by other code: extractors/naclip.py changed" in refused.said
    assert "runtime.on_code_change=accept" in refused.said and "Traceback" not in refused.err
    assert "0 samples computed, 4 held already" in evaluate(there, "extractor=oracle").said
    assert "0 samples computed, 4 held already" in evaluate(there, "extractor=naclip", "runtime.on_code_change=accept").said
    assert {name: rows(there.folder)[name] for name in before} == before


OUTSIDE = '''
"""Bright: the grey value."""

import torch

from conceptseg.extractors.base import OneView


class Bright(OneView):
    """Told nothing."""

    version = 1
    told = "nothing"
    trained_on = "nothing"
    comparable = False

    def saliency(self, batch):
        grey = [torch.from_numpy(task.image.mean(axis=2)).float() for task in batch.tasks]
        return torch.stack([g.expand(len(batch.concepts[0]), -1, -1) for g in grey])
'''


def test_a_method_of_another_package_answers_for_its_own_files(commands):
    (commands.folder / "mine_outside").mkdir()
    file = commands.folder / "mine_outside" / "bright.py"
    file.write_text(OUTSIDE)
    settings = (
        "extractor=constant", "extractor._target_=mine_outside.bright.Bright",
        "runtime.allow_targets=[conceptseg.,mine_outside.]",
    )  # fmt: skip

    def again(code=0):
        return evaluate(commands, *settings, code=code)

    again()
    edit(file, "Told nothing.", "Told nothing at all.")
    assert "0 samples computed, 4 held already" in again().said
    edit(file, ".mean(axis=2)", ".max(axis=2)")
    assert "mine_outside/bright.py changed" in again(code=1).said
