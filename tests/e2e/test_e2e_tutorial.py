"""docs/add_a_method.md, "In the repository", block by block in a copy of it: up to the method's row in a table."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
from commands import TESTS, Commands, Warm, as_python

REPO = TESTS.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COPIED = ("benchmarks", "conceptseg", "conf", "scripts", "tests/contract", *(f"tests/{path.name}" for path in TESTS.glob("*.py")))


def carry_out(commands: Commands, line: str) -> str:
    """Run a command of the page in a process of its own, which imports the copy of the repository; returns what it printed."""
    name, *words = shlex.split(line)
    what, *arguments = words if name == "python" else (name, *words)
    ended = commands.start(*arguments, name="python", before=as_python(what)).wait()
    assert ended.code == 0, f"{line}\n{ended.out[-3000:]}\n{ended.err[-3000:]}"
    return ended.out


@pytest.fixture(scope="module")
def done(tmp_path_factory, child_environment, libraries):
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
    warm = Warm(child_environment, tmp_path_factory.mktemp("said"), origin=libraries, tree=(root, root / "tests"))
    commands = Commands(warm, root, child_environment)
    said = {}
    page = (REPO / "docs" / "add_a_method.md").read_text(encoding="utf-8").partition("\n## In the repository")[2]
    for kind, title, body in BLOCK.findall(page):
        if title:
            (root / title).parent.mkdir(parents=True, exist_ok=True)
            (root / title).write_text(body, encoding="utf-8")
        elif kind == "sh":
            said |= {line: carry_out(commands, line) for line in body.splitlines()}
    warm.stop()
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
