"""Explain refused settings: name the first override that does not fit, and the nearest choice."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conceptseg.cli.options import groups, searched_folders
from conceptseg.config import MOVED_VIEWS
from conceptseg.errors import did_you_mean


def explain_refusal(overrides: Sequence[str]) -> str | None:
    """The first override that can't be read, or does not fit the configuration, with the nearest choice; None if all seem to."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    if unreadable := next(filter(None, map(_unreadable, overrides)), None):
        return unreadable
    folders = searched_folders(sys.argv[1:])
    offered = {name: list(options) for name, options in groups(folders).items()}
    GlobalHydra.instance().clear()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        chosen, options = [], []
        for override in overrides:
            key, _, value = override.lstrip("+~").partition("=")
            if (group := key.partition("@")[0]) in offered:
                chosen.append(override)
                if value in offered[group] or (group == "views" and value in MOVED_VIEWS):
                    options.append(override)
                elif value not in ("null", ""):
                    for one in value.split(",") if re.fullmatch(r"[\w/.,-]+", value) else [value]:  # a sweep names several
                        if one not in offered[group] and "," not in one:
                            return f'{key}: unknown option "{one}". {did_you_mean(one, offered[group])}'
        places = f"hydra.searchpath=[{','.join(f'file://{Path(folder).absolute()}' for folder in folders)}]"
        known = _keys_of([*options, *([places] if folders else [])])  # what a key may be depends on the options
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if override in chosen or override[0] in "+~" or key.startswith("hydra"):
            continue
        if refused := _unknown_key(key, known, offered):
            return f"{refused} To add one, write +{key}=..."
    return None


def _keys_of(options: Sequence[str]) -> dict[Any, Any]:
    """The configuration with these options chosen, or the default one where they don't go together."""
    from hydra import compose
    from hydra.errors import HydraException

    try:
        config = compose("evaluate", overrides=list(options))
    except (HydraException, OmegaConfBaseException, ValueError):
        config = compose("evaluate")
    found: dict[Any, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return found


def _unreadable(override: str) -> str | None:
    """Explain why Hydra's grammar refuses an override, and how to write it; None if it can be read."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    parser = OverridesParser.create()
    key, _, value = override.partition("=")
    quoted = f'{key}="{value}"' if '"' not in value else f"{key}='{value}'"
    try:
        parser.parse_overrides([override])
    except OverrideParseException as error:
        reason = str(error).splitlines()[0]
    else:
        return None
    try:
        parser.parse_overrides([quoted])
    except OverrideParseException:
        quoted = ""
    advice = f" Braces, brackets, commas, colons and quotes want quotes of their own: {shlex.quote(quoted)}" if quoted else ""
    return f"{override}: the value of {key.lstrip('+~')} can't be read ({reason}).{advice}"


def _unknown_key(key: str, known: Mapping[Any, Any], groups: Iterable[str]) -> str | None:
    at: Any = known
    parts = key.split(".")
    for depth, part in enumerate(parts):
        choices = {*map(str, at), *(groups if depth == 0 else ())} if isinstance(at, Mapping) else set()
        if part not in choices:
            return f"{'.'.join(parts[: depth + 1])}: there is no such key. {did_you_mean(part, choices) if choices else ''}"
        at = at.get(part) if isinstance(at, Mapping) else None
    return None
