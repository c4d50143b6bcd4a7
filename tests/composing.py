"""How tests compose: the package's own conf, through Hydra, without a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

import conceptseg
from conceptseg.cli.composing import SheetsReadOnce, read_sheets_once
from conceptseg.config import plain, register

CONF = Path(conceptseg.__file__).parents[1] / "conf"
RECIPES = "lab"
"""A folder of conf/ that is no Hydra group: conceptseg-lab reads it."""
GROUPS: dict[str, list[str]] = {
    folder.name: sorted(sheet.relative_to(folder).with_suffix("").as_posix() for sheet in folder.rglob("[!_]*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in (RECIPES, "__pycache__")
}
"""Options of every group, those in folders as folder/option; files that begin with _ are parts of other sheets."""
OPTIONS: list[tuple[str, str]] = [(group, option) for group, options in GROUPS.items() for option in options]


def chosen(group: str, option: str) -> str:
    """Return the override for the command line; a backbone belongs to its extractor."""
    return f"{'backbone@extractor.backbone' if group == 'backbone' else group}={option}"


def sheet(group: str, option: str) -> dict[str, Any]:
    """A sheet and those of its group that it extends, read from their text. For collection, where composing takes too long."""
    own = yaml.safe_load((CONF / group / f"{option}.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for extended in own.pop("defaults", []):
        found |= sheet(group, extended) if extended != "_self_" else {}
    return found | own


@contextmanager
def hydra() -> Iterator[Any]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@cache
def _sheets() -> SheetsReadOnce:
    """One for the whole process, in which no test changes a sheet of conf/."""
    loader = GlobalHydra.instance().config_loader()
    read_sheets_once()
    return loader.repository


@cache
def composed(*overrides: str) -> DictConfig:
    with hydra() as loader:
        loader.repository = _sheets()
        return compose(config_name="evaluate", overrides=list(overrides))


@cache
def _resolved(*overrides: str) -> dict[str, Any]:
    found: dict[str, Any] = plain(composed(*overrides))
    return found


def plainly(*overrides: str) -> dict[str, Any]:
    """A fresh, resolved copy."""
    return deepcopy(_resolved(*overrides))
