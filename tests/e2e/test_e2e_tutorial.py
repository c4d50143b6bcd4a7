"""docs/add_a_method.md, "In the repository", block by block in a copy of it: up to the method's row in a table."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TESTS

REPO = TESTS.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # four processes, each of which imports every library anew
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("benchmarks", "conceptseg", "conf", "scripts", "tests/contract", *(f"tests/{path.name}" for path in TESTS.glob("*.py")))


@pytest.fixture(scope="module")
def done(tmp_path_factory, child_environment, request):
    """Every block carried out: (folder, what each command said)."""
    root = tmp_path_factory.mktemp("tutorial")
    for name in COPIED:
        at = root / name
        at.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).is_dir():
            shutil.copytree(REPO / name, at, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPO / name, at)
    shutil.copy(REPO / "pyproject.toml", root)
    site = child_environment["PYTHONPATH"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**child_environment, "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests"), site)), "PATH": path}
    said = {}
    page = (REPO / "docs" / "add_a_method.md").read_text(encoding="utf-8").partition("\n## In the repository")[2]
    for kind, title, body in BLOCK.findall(page):
        if title:
            (root / title).parent.mkdir(parents=True, exist_ok=True)
            (root / title).write_text(body, encoding="utf-8")
        elif kind == "sh":
            ended = subprocess.run(body, shell=True, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
            assert ended.returncode == 0, f"{body}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
            said[body.strip()] = ended.stdout
    return root, said


def test_the_new_method_is_under_the_contract(done):
    _, said = done
    (contract,) = [out for command, out in said.items() if command.startswith("pytest")]
    assert "no tests ran" not in contract and "failed" not in contract


def test_the_method_has_its_row_in_the_table_and_in_the_report(done):
    root, said = done
    table = json.loads((root / "benchmarks" / "mine" / "results.json").read_text())
    row = table["blocks"][0]["rows"][-1]
    assert (row["name"], row["status"], row["n"], row["told"]) == ("Edge energy", "ok", 12, "nothing")
    assert 0 < row["values"]["ap_image"]["low"] <= row["values"]["ap_image"]["high"] < 1
    assert "Edge energy" in said["conceptseg table=mine report.resamples=200 report.publish=yes"]
    assert "| Edge energy |" in (root / "RESULTS.md").read_text()
