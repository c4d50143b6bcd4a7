"""The sheets of conf/backbone: what is known of each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib import resources
from typing import Any

import yaml


@cache
def _read() -> dict[str, dict[str, Any]]:
    """Read once in a process: a table looks up the checkpoints of all its rows, and YAML is slow."""
    folder = resources.files("conceptseg.conf").joinpath("backbone")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    held = {file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}
    return {name: settings for name, settings in held.items() if isinstance(settings, dict) and "_target_" in settings}


def sheets() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every sheet of conf/backbone."""
    yield from deepcopy(_read()).items()


def sheet_of(path: str) -> dict[str, Any] | None:
    """Settings of the sheet of this name, or of the first sheet whose checkpoint this is; None where there is none."""
    known = _read()
    found = known.get(path) or next((sheet for sheet in known.values() if sheet.get("path") == path), None)
    return deepcopy(found)
