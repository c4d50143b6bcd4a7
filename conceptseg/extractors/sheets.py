"""Sheets of conf/extractor: a method's settings, its models and the view that its rows are read with. Needs no Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module, resources
from typing import Any

import yaml

from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.targets import packages

LAB_VIEWS = {
    "lab:flux": ("lab", "logits"),
    "lab:sd3": ("lab/sd3", "logits"),
    "lab:sd": ("lab/unet", "words"),
    "lab:sdxl": ("lab/sdxl", "words"),
}
"""The lab's checkpoint -> the view of conf/views that had the best average precision on development scenes."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """One file of conf/extractor. models: attribute -> sheet of conf/backbone, with the settings that this file changes."""

    name: str
    target: str
    settings: dict[str, Any]
    models: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    view: dict[str, Any] = field(default_factory=dict)
    """The first view of the sheet's own views."""

    @property
    def kind(self) -> Any:
        """The class that it names."""
        module, _, name = self.target.rpartition(".")
        return getattr(import_module(module), name)


def _folders() -> Iterator[Any]:
    for package in ("conceptseg", *packages()):
        yield resources.files(f"{package}.conf")


def read_sheet(group: str, name: str) -> dict[str, Any] | None:
    """A file of conf/<group> as plain data; None where no package has it."""
    for folder in _folders():
        file = folder.joinpath(group, f"{name}.yaml")
        if file.is_file():
            found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            return found
    return None


def names() -> list[str]:
    """Every method that conf/extractor of an installed package names."""
    found = {file.name for folder in _folders() for file in folder.joinpath("extractor").iterdir()}
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def extractor_sheet(name: str) -> Sheet:
    """Raises ConfigError for a name that no sheet has."""
    given = read_sheet("extractor", name) if name.replace("_", "a").isalnum() else None
    if given is None:
        raise ConfigError(f'there is no method "{name}". {did_you_mean(name, names())}')
    chosen: dict[str, str] = {}
    view: dict[str, Any] = {}
    for entry in given.pop("defaults", []):
        if isinstance(entry, Mapping):
            ((where, option),) = entry.items()
            group, _, package = where.strip("/").partition("@")
            if group == "backbone":
                chosen[package] = option
            elif group == "views":
                view = first_view(option)
    target = given.pop("_target_")
    models = {key: (option, dict(given.pop(key, {}))) for key, option in chosen.items()}
    return Sheet(name, target, given, models, view)


def first_view(option: str) -> dict[str, Any]:
    """Settings of the first view of conf/views/<option>, of its first space."""
    for view in (read_sheet("views", option) or {}).values():
        if isinstance(view, dict):
            space = view.get("space")
            return {**view, "space": space[0]} if isinstance(space, list) else dict(view)
    return {}


def lab_view(checkpoint: str, spaces: tuple[str, ...]) -> dict[str, Any]:
    """Settings of a lab checkpoint's own view; empty for other checkpoints, and where the method lacks the view's space."""
    option, name = LAB_VIEWS.get(checkpoint, ("", ""))
    found: dict[str, Any] = (read_sheet("views", option) or {}).get(name, {}) if option else {}
    return dict(found) if found.get("space") in spaces else {}


def sheet_of_class(kind: type) -> Sheet | None:
    """The sheet that is named as the class's module and names the class; None where there is none, as for a class of your own."""
    name = kind.__module__.rpartition(".")[2]
    return next(
        (s for s in map(extractor_sheet, [name] if name in names() else []) if s.target.endswith(f".{kind.__name__}")), None
    )
