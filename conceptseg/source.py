"""The code that a run's numbers come from: the import closure of its classes, digested statement by statement.

Read from source with `ast`; nothing is imported. Docstrings, comments, annotations of functions and blocks under TYPE_CHECKING
change no number and are left out, so that editing them does not part a run from its rows.
"""

from __future__ import annotations

import ast
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from conceptseg.keys import LIBRARIES

OURS = "conceptseg"
LOOP = "conceptseg.evaluation.loop"
"""Module that every run goes through: it imports protocols, views, segmenters and counts."""

NO_NUMBERS = frozenset(
    f"{OURS}.{name}"
    for name in (
        "backbones.sheets",  # finds a class by a checkpoint's name, for people; a run names its classes itself
        "backbones.sheet_files", "backbones.file_pages", "backbones.hub", "backbones.in_memory", "backbones.planned_weights",
        "announcing", "config", "data.digests", "entry_points", "errors",
        "extractors.explaining", "extractors.explanation", "extractors.sheets",
        "files", "keys", "source", "store", "targets",
    )
)  # fmt: skip
"""Modules and packages that parts import and that make no number of a run; neither they nor what they import is followed."""

_SKIPPED = {"annotation": (ast.arg,), "returns": (ast.FunctionDef, ast.AsyncFunctionDef), "ctx": (ast.expr,)}
"""Fields that change no number, by the nodes of which that is true."""


def source_digests(targets: Iterable[str]) -> dict[str, str]:
    """File -> digest, for each file that the classes and the evaluation loop import, directly or not, of their own packages.

    targets: dotted names of classes, such as "conceptseg.extractors.naclip.NACLIP". Files of this package are named relative to
    it, those of another package with its name in front. A package whose version the manifest holds anyway is left to that.
    """
    waiting = [name for name in (LOOP, *targets) if name.partition(".")[0] not in LIBRARIES]
    own = {name.partition(".")[0] for name in waiting}
    asked: set[str] = set(waiting)
    seen: set[str] = set()
    found: dict[str, str] = {}
    while waiting:
        for module, file in _modules(waiting.pop()):
            if module in NO_NUMBERS:
                break
            if module in seen:
                continue
            seen.add(module)
            state = os.stat(file)
            digest, imports = _read(file, state.st_mtime_ns, state.st_size)
            is_package = os.path.basename(file) == "__init__.py"
            found[_shown(module, is_package)] = digest
            package = module if is_package else module.rpartition(".")[0]
            names = {_absolute(name, level, package) for name, level in imports} - asked
            asked |= names
            waiting += [name for name in names if name.partition(".")[0] in own]
    return dict(sorted(found.items()))


def _modules(name: str) -> Iterator[tuple[str, str]]:
    """(module, file) of every package and module on the way to a dotted name; names of classes and functions end the way."""
    top, *rest = name.split(".")
    places, file = _top(top)
    if file is not None:
        yield top, file
    module = top
    for part in rest:
        module = f"{module}.{part}"
        candidates = [os.path.join(place, part) for place in places]
        places = [place for place in candidates if os.path.isdir(place)]
        files = [*(os.path.join(place, "__init__.py") for place in places), *(f"{place}.py" for place in candidates)]
        yield from ((module, file) for file in [file for file in files if os.path.isfile(file)][:1])
        if not places:
            return


@cache  # of this process: packages do not move while it runs
def _top(name: str) -> tuple[list[str], str | None]:
    """Folders of a top-level package and its file, found without importing it; nothing where it has no source."""
    if name == OURS:
        return [os.path.dirname(__file__)], None  # its own top says no more than its version
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return [], None
    file = spec.origin if spec.origin and spec.origin.endswith(".py") else None
    return list(spec.submodule_search_locations or ()), file


def _shown(module: str, is_package: bool) -> str:
    """A file as the manifest names it."""
    parts = module.split(".") + ["__init__"] * is_package
    return "/".join(parts[1:] if parts[0] == OURS else parts) + ".py"


def _absolute(name: str, level: int, package: str) -> str:
    """An imported name without leading dots."""
    if not level:
        return name
    kept = package.split(".")
    return ".".join(filter(None, [*kept[: len(kept) - level + 1], name]))


@lru_cache(4096)
def _read(file: str, changed: int, size: int) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Digest of a file's statements, and what it imports: (name, dots in front). Read again only where it was written since."""
    text = Path(file).read_bytes()
    try:
        tree = ast.parse(text)
    except SyntaxError:  # written while this run goes on: other code, whatever it will be
        return hashlib.sha256(text).hexdigest()[:12], ()
    said: list[str] = []
    imports: dict[tuple[str, int], None] = {}
    _tell(tree, said, imports)
    return hashlib.sha256("".join(said).encode("utf-8", "surrogatepass")).hexdigest()[:12], tuple(imports)


def _tell(value: object, said: list[str], imports: dict[tuple[str, int], None]) -> None:
    """Append a tree as text that is the same in every version of Python: no empty fields, no line numbers."""
    if isinstance(value, list):
        said.append("[")
        for one in value:
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                continue  # a docstring, of whatever stands above it
            if isinstance(one, ast.If) and _only_types(one.test):
                _tell(one.orelse, said, imports)
            else:
                _tell(one, said, imports)
        said.append("]")
    elif isinstance(value, ast.AST):
        if isinstance(value, ast.Import):
            imports.update({(alias.name, 0): None for alias in value.names})
        elif isinstance(value, ast.ImportFrom):
            module = f"{value.module}." if value.module else ""
            imports.update({(module + alias.name, value.level): None for alias in value.names})
        said.append(f"{type(value).__name__}(")
        for name in value._fields:
            field = getattr(value, name, None)
            if (field is None and not isinstance(value, ast.Constant)) or field == [] or name in ("kind", "type_comment"):
                continue
            if name in _SKIPPED and isinstance(value, _SKIPPED[name]):
                continue
            said.append(f"{name}=")
            _tell(field, said, imports)
        said.append(")")
    else:
        said.append(f"{value!r},")


def _only_types(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"
