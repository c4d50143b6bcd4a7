"""Dataclasses from JSON: a key too many, a key too few or a wrong type is an error that names its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from conceptseg.errors import ReportError, did_you_mean

Reader = Callable[[Any, str], Any]
T = TypeVar("T")


def build(cls: type[T], data: object, where: str, readers: Mapping[str, Reader]) -> T:
    """Build a dataclass from a JSON object: unknown and missing keys and wrong types are errors that name the place."""
    if not isinstance(data, Mapping):
        raise ReportError(f"{where}: wanted an object with the keys of {cls.__name__}, got {_shown(data)}.")
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise ReportError(f'{where}: unknown key "{key}". {did_you_mean(str(key), known)}')
    missing = [name for name, field in known.items() if name not in data and field.default is MISSING]
    if missing:
        raise ReportError(f"{where}: lacks {', '.join(missing)}. Write every key of {cls.__name__}.")
    made = {}
    for key, value in data.items():
        at = f"{where}.{key}"
        if key in readers:
            made[key] = readers[key](value, at)
        elif _fits(value, hints[key]):
            made[key] = value
        else:
            raise ReportError(f"{at}: wanted {_wanted(hints[key])}, got {_shown(value)}.")
    return cls(**made)


def list_of(cls: type, readers: Mapping[str, Reader] | None = None) -> Reader:
    """Reads a list of objects."""

    def read(data: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(data, list):
            raise ReportError(f"{where}: wanted a list, got {_shown(data)}.")
        return tuple(build(cls, item, f"{where}[{i}]", readers or {}) for i, item in enumerate(data))

    return read


def mapping_to(cls: type[T]) -> Reader:
    """Reads an object from any name to objects."""

    def read(data: Any, where: str) -> dict[str, T]:
        if not isinstance(data, Mapping):
            raise ReportError(f"{where}: wanted an object of {cls.__name__}s, got {_shown(data)}.")
        return {str(name): build(cls, value, f"{where}.{name}", {}) for name, value in data.items()}

    return read


def sentences(data: Any, where: str) -> tuple[str, ...]:
    """Reads a list of strings."""
    if not isinstance(data, list) or not all(isinstance(note, str) for note in data):
        raise ReportError(f"{where}: wanted a list of sentences, got {_shown(data)}.")
    return tuple(data)


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(value, choice) for choice in get_args(hint))
    if isinstance(value, bool):  # a bool is an int to Python, not to a reader
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _wanted(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if isinstance(hint, UnionType):
        return " or ".join("null" if choice is NoneType else _wanted(choice) for choice in get_args(hint))
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[hint]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
