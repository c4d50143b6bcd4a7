"""conceptseg --help: the commands, the groups with how to list each, and the settings of every run. Composes nothing."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from textwrap import shorten, wrap

from conceptseg.cli.options import added_folders, groups
from conceptseg.config import Report, Runtime
from conceptseg.errors import ConfigError, did_you_mean

WIDTH = 100
COMMANDS = """\
conceptseg: a benchmark harness for zero-shot segmentation with saliency methods.

  conceptseg                                        compute the lab table: minutes, no downloads
  conceptseg table=<name>                           compute another table
  conceptseg table=<name> 'table.only=[<row>]'      compute some of its rows
  conceptseg extractor=<option> dataset=<option>    compute one evaluation
  conceptseg plan [...]                             what it would take: GB, hours (--dry-run)
  conceptseg -q ..., conceptseg -v ...              say less, or everything
  conceptseg --cfg job [...]                        print the configuration; compute nothing
  conceptseg --help <group>                         list a group (views/lab) or settings (report)
"""
MORE = """\
The options have settings of their own, which --cfg job prints. Add a missing key with +key=value.

conceptseg-doctor checks machine, weights and data, conceptseg-report prints and checks tables,
conceptseg-compare tests runs against one another, conceptseg-runs lists, shows, removes and exports
runs, conceptseg-explain draws maps of one image, conceptseg-lab trains lab models, conceptseg-study
repeats the DAAM paper's experiments."""
WRITTEN = {"backbone": "backbone@extractor.backbone"}
"""Groups that are chosen under a longer name."""


def asked(arguments: Sequence[str]) -> list[str] | None:
    """The words beside --help or -h; None if neither is there, or if a setting is: its configuration is what Hydra shows then."""
    if not {"--help", "-h"} & {*arguments} or any("=" in word for word in arguments if not word.startswith("-")):
        return None
    words = [word for word in arguments if word not in ("--help", "-h")]
    folders = added_folders(words)
    return [word for word in words if not word.startswith("-") and word not in folders]


def print_help(arguments: Sequence[str]) -> int:
    """Print all of the help, or the options of groups and the settings that are named. Raises ConfigError for unknown ones."""
    offered = groups(added_folders(arguments))
    words = asked(arguments)
    for word in words or ():
        if word in FRAME:
            print(*_settings([word]), sep="\n")
            continue
        group, _, family = word.partition("@")[0].partition("/")
        if group not in offered:
            raise ConfigError(f'conceptseg --help: no group "{group}". {did_you_mean(group, [*offered, *FRAME])}')
        listed = {name: path for name, path in offered[group].items() if not family or name.startswith(f"{family}/")}
        print(*_options(group, listed), sep="\n")
    if not words:
        print(
            COMMANDS, *_groups({name: len(options) for name, options in offered.items()}), "", *_settings(FRAME), MORE, sep="\n"
        )
    return 0


def _groups(counts: dict[str, int]) -> Iterator[str]:
    yield "Groups (choose with group=option):"
    yield ""
    for name, count in counts.items():
        yield f"  {WRITTEN.get(name, name) + '=...':<32}{count:>3} options    conceptseg --help {name}"


def _options(group: str, listed: dict[str, Path]) -> Iterator[str]:
    """One line an option: its name and the beginning of its comment."""
    yield f"{group}: {len(listed)} options; choose one with {WRITTEN.get(group, group)}=<option>"
    yield ""
    width = max(map(len, listed), default=0) + 2
    for name, path in listed.items():
        yield f"  {name:<{width}}{shorten(_comment(path), max(30, WIDTH - 2 - width), placeholder=' ...')}"


def _comment(path: Path) -> str:
    """The first comment line of a sheet that is not for Hydra."""
    lines = (line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")


FRAME: dict[str, tuple[type, str]] = {
    "runtime": (Runtime, "how a run is carried out; no number depends on it"), "report": (Report, "how numbers are printed")
}  # fmt: skip
"""Settings that every run has."""


def _settings(parts: Iterable[str]) -> Iterator[str]:
    """Every setting of some parts of the frame with its default and the text under it in the schema."""
    for key in parts:
        schema, said = FRAME[key]
        yield f"{key}.*: {said} (change with key=value)"
        yield ""
        texts, defaults = _texts(schema), schema()
        for name in (field.name for field in fields(schema)):
            value = getattr(defaults, name)
            shown = (
                f"[{','.join(value)}]"
                if isinstance(value, list)
                else "null"
                if value is None
                else str(value).lower()
                if isinstance(value, bool)
                else value
            )
            setting = f"  {key}.{name}={shown}"
            if len(setting) > 38:
                setting = f"  {key}.{name}=[...]"
            first, *rest = wrap(texts[name], WIDTH - 39)
            yield f"{setting:<38} {first}"
            yield from (" " * 39 + line for line in rest)
        yield ""


def _texts(schema: type) -> dict[str, str]:
    """Field -> the string under it."""
    (body,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = ast.literal_eval(text.value)
    return found
