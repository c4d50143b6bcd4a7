"""The wheel holds everything that the checkout does, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "benchmarks", "conceptseg", "conf")


def called(*command: str, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    said = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=kept | environment, timeout=280)
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Built without isolation from a copy of the repository: no network, and no build folder left in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for part in PARTS:
        at = REPO / part
        if at.is_dir():
            shutil.copytree(at, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif at.exists():
            shutil.copy(at, copy / part)
    called(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy), cwd=copy)
    (found,) = out.glob("conceptseg-*.whl")
    return found


@pytest.fixture(scope="session")
def names(wheel) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    called(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check",
        "--target", str(folder), str(wheel), cwd=folder,
    )  # fmt: skip
    return folder


@pytest.fixture
def python(installed, tmp_path):
    """Runs the interpreter in an empty folder, with the installed wheel before everything else."""

    def run(*arguments: str) -> str:
        return called(sys.executable, *arguments, cwd=tmp_path, PYTHONPATH=str(installed))

    return run


def inside(folder: Path, pattern: str, prefix: str) -> set[str]:
    found = {f"{prefix}/{p.relative_to(folder).as_posix()}" for p in folder.rglob(pattern) if p.is_file()}
    assert found, f"no {pattern} in {folder}"
    return {name for name in found if "__pycache__" not in name}


def test_every_module_ships(names):
    assert inside(REPO / "conceptseg", "*.py", "conceptseg") <= names


def test_every_sheet_of_conf_ships(names):
    assert inside(REPO / "conf", "*.yaml", "conceptseg/conf") <= names


def test_published_numbers_and_the_pages_template_ship(names):
    assert inside(REPO / "benchmarks", "quoted.yaml", "conceptseg/benchmarks") <= names
    assert inside(REPO / "conceptseg" / "report" / "templates", "*", "conceptseg/report/templates") <= names
    assert not any(name.endswith(("results.json", ".png")) for name in names if "benchmarks" in name)


def test_every_list_of_words_ships(names):
    assert inside(REPO / "conceptseg" / "data", "*.csv", "conceptseg/data") <= names


def test_the_lab_weights_ship_with_their_cards(names):
    assert inside(REPO / "conceptseg" / "lab" / "weights", "*", "conceptseg/lab/weights") <= names


def test_the_package_says_that_it_is_typed(names):
    assert "conceptseg/py.typed" in names


def test_nothing_but_the_package_ships(names):
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"conceptseg"}


def test_the_wheel_is_small_enough_for_an_index(wheel):
    assert wheel.stat().st_size < 25e6


def test_the_installed_package_is_the_one_that_is_imported(python, installed):
    said = python("-c", "import conceptseg, conceptseg.conf; print(conceptseg.__file__); print(conceptseg.conf.__file__)")
    assert all(Path(line).is_relative_to(installed) for line in said.split())


def test_a_configuration_composes_from_the_wheel_alone(python):
    said = python("-m", "conceptseg", "--cfg", "job")
    assert "_target_: conceptseg.extractors.concept_attention.ConceptAttention" in said


def test_a_lab_model_evaluates_two_scenes_from_the_wheel_alone(python, tmp_path):
    """The smallest of them: all lie in one folder, and what that holds is compared file by file above."""
    args = ("extractor=rollout", "dataset.count=2", "dataset.objects=[1,1]", "protocol=scenes_single", "report.resamples=50")
    said = python("-m", "conceptseg", *args, "runtime.progress=false")
    assert "Rollout" in said and len(list(tmp_path.glob("runs/*/rows-0of1.jsonl"))) == 1
