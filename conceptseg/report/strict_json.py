"""Build dataclasses from plain data: a key too many, a key too few or a wrong type is an error that names its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from conceptseg.errors import ConceptSegError, ReportError, did_you_mean

T = TypeVar("T")
UNIONS = (Union, UnionType)  # a Literal | None is the former, str | None the latter


def build(cls: type[T], data: object, where: str, error: type[ConceptSegError] = ReportError) -> T:
    """Build a dataclass, and the dataclasses that its annotations name, from mappings, lists and plain values.

    Raises `error` for an unknown key, with the nearest one, for a missing key and for a wrong type. The message names the place:
    an item of a list by its `name`, else by its number.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: wanted an object with the keys of {cls.__name__}, got {_shown(data)}.")
    hints = _hints(cls)  # type: ignore[arg-type]
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise error(f'{where}: unknown key "{key}". {did_you_mean(str(key), known)}')
    missing = [name for name, field in known.items() if name not in data and field.default is MISSING]
    if missing:
        raise error(f"{where}: lacks {', '.join(missing)}.")
    return cls(**{key: _read(hints[key], value, f"{where}.{key}", error) for key, value in data.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(hint: Any, value: object, where: str, error: type[ConceptSegError]) -> Any:
    """The value as its annotation wants it; lists become tuples."""
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where, error)
    if get_origin(hint) is tuple:
        item, _ = get_args(hint)  # tuple[X, ...]
        if not isinstance(value, list | tuple):
            raise error(f"{where}: wanted {_wanted(hint)}, got {_shown(value)}.")
        return tuple(_read(item, one, f"{where}[{_place(number, one)}]", error) for number, one in enumerate(value))
    if get_origin(hint) is Mapping:
        _, item = get_args(hint)
        if not isinstance(value, Mapping):
            raise error(f"{where}: wanted {_wanted(hint)}, got {_shown(value)}.")
        return {str(name): _read(item, one, f"{where}.{name}", error) for name, one in value.items()}
    if get_origin(hint) in UNIONS:
        nested = [choice for choice in get_args(hint) if _takes(choice, value)]
        if nested:
            return _read(nested[0], value, where, error)
    if not _fits(value, hint):
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        nearest = f" {did_you_mean(value, choices)}" if choices and isinstance(value, str) else ""
        raise error(f"{where}: wanted {_wanted(hint)}, got {_shown(value)}.{nearest}")
    return value


def _takes(choice: Any, value: object) -> bool:
    """Whether a member of a union is the one that reads this list or mapping."""
    if get_origin(choice) is tuple:
        return isinstance(value, list | tuple)
    return isinstance(value, Mapping) and (is_dataclass(choice) or get_origin(choice) is Mapping)


def _place(number: int, item: object) -> str:
    name = item.get("name") if isinstance(item, Mapping) else None
    return f'"{name}"' if isinstance(name, str) else str(number)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in UNIONS:
        return any(_fits(value, choice) for choice in get_args(hint))
    if isinstance(value, bool):  # a bool is an int to Python, not to a reader
        return hint is bool
    return isinstance(hint, type) and isinstance(value, (int, float) if hint is float else hint)


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) in UNIONS:
        return " or ".join("null" if choice is NoneType else _wanted(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        item: Any = get_args(hint)[0]
        if item is str or not isinstance(item, type):
            return "a list of " + ("strings" if item is str else _wanted(item))
        return f"a list of {item.__name__} objects"
    if get_origin(hint) is Mapping:
        return "an object"
    if is_dataclass(hint) and isinstance(hint, type):
        return f"an object with the keys of {hint.__name__}"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[hint]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
