"""List the groups of conf/ and their options, without composing."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

RECIPES = "lab"
"""A folder of conf/ that is no group: recipes of conceptseg-lab."""


def groups(more: Path | None = None) -> dict[str, dict[str, Path]]:
    """Group -> option -> its sheet, in the package and in a folder `more` of the user's own.

    Options in a folder of their group are named folder/option. A file whose name begins with _ is a part of other sheets.
    """
    found: dict[str, dict[str, Path]] = {}
    for place in (Path(str(resources.files("conceptseg.conf"))), more):
        for path in sorted(place.rglob("*.yaml")) if place else ():
            group, _, option = path.relative_to(place or path).with_suffix("").as_posix().partition("/")
            if option and group != RECIPES and not path.name.startswith("_"):
                found.setdefault(group, {})[option] = path
    return {group: dict(sorted(options.items())) for group, options in sorted(found.items())}
