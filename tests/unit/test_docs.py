"""The documentation names what the code has, and its site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.report.blocks import Behind, Block, TableRow
from conceptseg.report.columns import Column, Value
from conceptseg.report.quoted import QuotedRow
from conceptseg.report.results import Results
from conceptseg.store.cost import Cost
from conceptseg.store.schema import Manifest, Row

REPO = Path(__file__).parents[2]
DOCS = REPO / "docs"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [Row, Manifest, Cost, Results, Column, Block, TableRow, Value, Behind, QuotedRow])
def test_every_key_of_a_file_is_in_the_schema(kind):
    names = [f.name for f in fields(kind)] if hasattr(kind, "__dataclass_fields__") else list(kind.__annotations__)
    assert [name for name in names if f"| `{name}` |" not in page("results_schema")] == []


def test_every_protocol_metric_and_paper_table_is_named():
    text = page("protocols")
    assert [p.stem for p in (REPO / "conf" / "protocol").glob("[!_]*.yaml") if f"`{p.stem}`" not in text] == []
    assert [name for name in DEFINITIONS if f"`{name}`" not in text] == []
    tables = [
        p.relative_to(REPO / "conf" / "table").with_suffix("").as_posix() for p in (REPO / "conf" / "table").glob("*/[!_]*.yaml")
    ]
    assert [name for name in tables if f"`{name}`" not in page("reproduce")] == []


def test_the_tests_that_findings_name_exist():
    source = "\n".join(p.read_text(encoding="utf-8") for p in (REPO / "tests").rglob("test_*.py"))
    named = {word.strip("`.,;()") for word in page("reproduction").split() if word.startswith("`test")}
    assert named and all(f"def {name}(" in source or (REPO / name).exists() or (REPO / "tests" / name).exists() for name in named)


def test_the_modules_of_the_api_reference_exist():
    """A page of docs/reference names them by `::: module`."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)]
    assert len(named) > 70 and [name for name in named if not (REPO / name.replace(".", "/")).with_suffix(".py").exists()] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    said = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=REPO, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr
    assert (tmp_path / "site" / "reproduction" / "index.html").exists()
