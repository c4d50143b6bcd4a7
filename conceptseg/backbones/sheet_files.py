"""The sheets of conf/backbone: what is known of each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from typing import Any

import yaml


def sheets() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every sheet of conf/backbone."""
    folder = resources.files("conceptseg.conf").joinpath("backbone")
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if isinstance(settings, dict) and "_target_" in settings:
                yield file.name.removesuffix(".yaml"), settings


def sheet_of(path: str) -> dict[str, Any] | None:
    """Settings of the sheet of this name, or of the first sheet whose checkpoint this is; None where there is none."""
    known = dict(sheets())
    found = known.get(path) or next((sheet for sheet in known.values() if sheet.get("path") == path), None)
    return None if found is None else dict(found)
