"""Every command that the README and the documentation show composes: no page names a setting that is gone."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composing import CONF, plainly

from conceptseg.cli.evaluate import SHORT
from conceptseg.cli.table import row_settings

PAGES = [CONF.parent / "README.md", *sorted((CONF.parent / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if not page.name.startswith("add_a_")]  # run in e2e, with the sheets that they write
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def overrides_of(page: Path) -> list[tuple[str, ...]]:
    """Overrides of each shown `conceptseg` command; lines with a blank to fill in or a value swept over are left out."""
    found = []
    for line in "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ").splitlines():
        name, *words = shlex.split(line, comments=True) or [""]
        if name != "conceptseg" or any(
            blank in line for blank in ("extractor=...", "<", " -m ", "hydra.searchpath", "=mine", "edge_energy")
        ):
            continue
        found.append(tuple(row_settings([SHORT.get(word, word) for word in words if "=" in word])[0]))
    return found


SHOWN = [pytest.param(found, id=f"{page.stem}: {' '.join(found)}") for page in PAGES for found in overrides_of(page) if found]


def test_the_pages_show_commands():
    assert len(SHOWN) > 12


@pytest.mark.parametrize("overrides", SHOWN)
def test_a_command_that_is_shown_composes(overrides):
    assert plainly(*overrides)["extractor"]
