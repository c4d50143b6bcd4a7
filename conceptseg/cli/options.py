"""List the groups of conf/ and their options, without composing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from conceptseg.targets import packages

RECIPES = "lab"
"""A folder of conf/ that is no group: recipes of conceptseg-lab."""
FOLDERS = ("--config-dir", "-cd")


def added_folders(arguments: Sequence[str]) -> list[str]:
    """Folders of sheets that a command line adds."""
    return [
        word.partition("=")[2] or "".join(arguments[place + 1 : place + 2])
        for place, word in enumerate(arguments)
        if word.partition("=")[0] in FOLDERS
    ]


def searched_folders(arguments: Sequence[str]) -> list[str]:
    """Folders of sheets that a command line adds by --config-dir or hydra.searchpath."""
    lists = [word.partition("=")[2] for word in arguments if word.lstrip("+~").startswith("hydra.searchpath=")]
    named = [re.sub(r"^file://", "", place.strip(" '\"")) for places in lists for place in places.strip("[]").split(",")]
    return [*added_folders(arguments), *(place for place in named if place and "://" not in place)]


def groups(folders: Sequence[str] = ()) -> dict[str, dict[str, Path]]:
    """Group -> option -> its sheet: of this package, of installed packages that join it, and of added folders.

    Options in a folder of their group are named folder/option. A file whose name begins with _ is a part of other sheets.
    """
    places = [Path(str(resources.files("conceptseg.conf")))]
    for name in packages():
        spec = find_spec(name)
        places += [Path(place, "conf") for place in (spec.submodule_search_locations if spec else None) or ()]
    found: dict[str, dict[str, Path]] = {}
    for place in (*places, *map(Path, folders)):
        for path in place.rglob("*.yaml"):
            group, _, option = path.relative_to(place).with_suffix("").as_posix().partition("/")
            if option and group != RECIPES and not path.name.startswith("_"):
                found.setdefault(group, {})[option] = path
    return {group: dict(sorted(options.items())) for group, options in sorted(found.items())}
