"""Every citation is one that a reader can open: listed in docs/bibliography.md, and no reference to a private text."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "bibliography.md").read_text(encoding="utf-8")
PLACES = ("conceptseg", "conf", "benchmarks", "docs", "scripts", "tests")
FILES = [
    path
    for place in PLACES
    for path in sorted((ROOT / place).rglob("*"))
    if path.suffix in (".py", ".yaml", ".md") and path != Path(__file__) and ".venv" not in path.parts
]
PRIVATE = re.compile(r"\bspec,? §|\bspec [a-z_]+\.md|\bnotes?,? §|baselines note|\bby spec\b|\bof the spec\b", re.IGNORECASE)
PAPER = re.compile(r"arXiv[: ]\s*(\d{4}\.\d{5})")
CODE = re.compile(r"[\w.-]+/[\w.-]+ at [0-9a-f]{7}\b")


def found(pattern: re.Pattern[str]) -> dict[str, list[str]]:
    """Match -> the files it stands in."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for match in pattern.finditer(text):
            places.setdefault(match.group(match.lastindex or 0), []).append(path.relative_to(ROOT).as_posix())
    return places


def test_no_citation_points_to_a_text_that_is_not_in_the_repository():
    assert not found(PRIVATE)


def test_every_cited_paper_is_in_the_bibliography():
    cited = found(PAPER)
    assert len(cited) > 20
    assert not {number: places for number, places in cited.items() if number not in PAGE}


def test_every_cited_commit_is_in_the_bibliography():
    cited = {name: places for name, places in found(CODE).items() if not name.startswith("black-forest-labs/FLUX")}
    assert "castorini/daam at 09564e0" in cited
    assert not {name: places for name, places in cited.items() if name not in PAGE}


@pytest.mark.parametrize("text", ["by spec §1.5", "Source: spec daam.md", "baselines note", "notes §7.1"])
def test_the_pattern_of_private_texts_finds_them(text):
    assert PRIVATE.search(text)
