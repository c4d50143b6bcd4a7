"""Classes that a configuration names by _target_: which may be imported, and how they are built. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, signature
from math import inf
from typing import Any, get_args, get_type_hints

from conceptseg.config import Runtime
from conceptseg.entry_points import PACKAGES, entry_points
from conceptseg.errors import ConceptSegError, ConfigError, did_you_mean


def targets(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every (config key, _target_) in a plain config."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield path, str(value)
            else:
                yield from targets(value, here)
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from targets(value, f"{path}[{number}]")


OWN = "conceptseg."
BASES = {
    "dataset": "conceptseg.data.base.SegmentationDataset",
    "extractor": "conceptseg.extractors.base.Extractor",
    "launcher": "conceptseg.evaluation.launchers.Launcher",
    "protocol": "conceptseg.protocols.SegmentationProtocol",
}
"""Part of a configuration -> the class that its _target_ must be a subclass of."""
NESTED_BASES = {
    "extractor": "conceptseg.backbones.base.Backbone",
    "protocol": "conceptseg.segment.segmenter.Segmenter",
}
"""Part -> the class that every _target_ inside it must be a subclass of."""


def packages() -> list[str]:
    """Modules that installed packages name in the entry point group `conceptseg.packages`."""
    return sorted({point.value.partition(":")[0] for point in entry_points(PACKAGES)})


def check_targets(config: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raises ConfigError for a _target_ outside the allowed packages, before anything is imported.

    allowed: prefixes such as "mylab."; installed packages of the entry point group count as allowed.
    Source of the rule: hydra issues #3258, #3412.
    """
    known = [OWN, *allowed, *(f"{name}." for name in packages())]
    known = list(dict.fromkeys(prefix if prefix.endswith(".") else f"{prefix}." for prefix in known))
    for path, target in targets(config):
        if not target.startswith(tuple(known)):
            raise ConfigError(
                f'{path}._target_ is "{target}", which is outside runtime.allow_targets ({", ".join(known)}). '
                f"A configuration can run the code that it names: if you trust the package, allow it on the command line, "
                f"runtime.allow_targets=[conceptseg.,{target.partition('.')[0]}.]"
            )


def check_allowance(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raises ConfigError if a sheet has set runtime.allow_targets or runtime.record_environment: only the command line may."""
    own = Runtime().allow_targets
    said = {override.lstrip("+~").partition("=")[0] for override in overrides}
    if config["runtime"]["record_environment"] and "runtime.record_environment" not in said:
        raise ConfigError(
            "runtime.record_environment is true by a configuration file. A file must not decide whether values of the "
            "environment are kept: set runtime.record_environment=true on the command line."
        )
    if "runtime.allow_targets" not in said and list(config["runtime"]["allow_targets"]) != own:
        raise ConfigError(
            f"runtime.allow_targets is {config['runtime']['allow_targets']} by a configuration file; wanted {own}. A file must "
            "not decide which code may run: if you trust the package, set runtime.allow_targets on the command line."
        )


def instantiate(config: Mapping[str, Any], path: str, allowed: Iterable[str] = ()) -> Any:
    """The object a plain config describes, nested ones first, built by Hydra.

    path: the part, a key of BASES. Raises ConfigError for a class that is no subclass of the part's base, for a package that
    is not allowed, and for a setting that a class does not take, before anything is built; errors of ours that a constructor
    raises come out bare, not wrapped.
    """
    if "_target_" not in config:
        raise ConfigError(f"{path}: no _target_, so nothing can be built. Choose an option of this group.")
    check_targets({path: config}, allowed)
    _check_settings(config, path, BASES[path], NESTED_BASES.get(path))
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as build

    try:
        return build(dict(config), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, ConceptSegError):
            raise error.__cause__ from error
        raise ConfigError(f"{path}: {error}") from error


def settings_of(kind: type) -> dict[str, Parameter]:
    """Every setting that a class takes, its own first, and then those that its **others hand on to a base class.

    >>> class Base:
    ...     def __init__(self, size: int, seed: int = 0) -> None: ...
    >>> class Derived(Base):
    ...     def __init__(self, rate: float, **others: int) -> None: ...
    >>> list(settings_of(Derived))
    ['rate', 'size', 'seed']
    """
    found: dict[str, Parameter] = {}
    rest: list[Parameter] = []
    for base in [one for one in kind.__mro__[:-1] if "__init__" in vars(one)]:
        _, *own = signature(base.__init__).parameters.values()  # type: ignore[misc]
        rest = [one for one in own if one.kind is one.VAR_KEYWORD]
        found |= {one.name: one for one in own if one not in rest and one.name not in found}
        if not rest:
            break
    return found | {one.name: one for one in rest}


def _annotations(kind: type) -> dict[str, Any]:
    """Setting -> its annotation, those that a class hands on to its base included."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):
        if hasattr(base, "__dataclass_fields__"):
            found |= get_type_hints(base)
        elif "__init__" in vars(base):
            found |= get_type_hints(base.__init__)  # type: ignore[misc]
    return found


def check_types(settings: Mapping[str, Any], kind: type, path: str) -> None:
    """Raises ConfigError for a value that does not fit the annotation of its parameter, and for numbers that are not finite."""
    from beartype import BeartypeConf
    from beartype.door import is_bearable

    try:
        hints = _annotations(kind)
    except (NameError, TypeError):  # a class of somebody else's whose annotations can't be read where it is not defined
        hints = {}
    for key, value in settings.items():
        if any(number != number or number in (inf, -inf) for number in _floats(value)):
            raise ConfigError(f"{path}.{key} is {value}; wanted finite numbers.")
        hint = hints.get(key, Any)
        if hint is Any or any("_target_" in part for part in _mappings(value)):
            continue
        fits = is_bearable(value, hint, conf=BeartypeConf(is_pep484_tower=True))
        if not fits or (isinstance(value, bool) and bool not in (hint, *get_args(hint))):
            raise ConfigError(f"{path}.{key} is {value!r}; {kind.__name__} wants {_in_words(hint)}.")


def _in_words(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else re.sub(r"[\w.]+\.(?=\w)", "", str(hint))


def _floats(value: Any) -> Iterator[float]:
    """Every float in plain data, however deep."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _floats(inner)


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """A value that is a mapping, or the mappings in a list."""
    yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, Mapping))


def _imported(target: str, path: str) -> Any:
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'{path}._target_ "{target}" can\'t be imported: {error}.') from error


def _check_settings(config: Any, path: str, base: str | None, nested: str | None) -> None:
    """Every nested _target_ against its base class, and every keyword against its signature."""
    if isinstance(config, list):
        for number, value in enumerate(config):
            _check_settings(value, f"{path}[{number}]", nested, nested)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        _check_settings(value, f"{path}.{key}", nested, nested)
    if "_target_" not in config:
        return
    target = str(config["_target_"])
    if base is None:
        raise ConfigError(f'{path}._target_ is "{target}", but this part of a configuration takes plain settings only.')
    kind = _imported(target, path)
    if not (isinstance(kind, type) and issubclass(kind, _imported(base, path))):
        raise ConfigError(f'{path}._target_ is "{target}"; wanted a subclass of {base}. Choose an option of this group.')
    name = kind.__name__
    given = [str(key) for key in config if key != "_target_"]
    if special := [key for key in given if key.startswith("_")]:
        raise ConfigError(f"{path}.{special[0]}: Hydra's own keys other than _target_ are not read here. Remove it.")
    accepted = settings_of(kind)
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for key in given:
            if key not in accepted:
                raise ConfigError(f"{path}.{key}: {name} takes no such setting. {did_you_mean(key, accepted)}")
    check_types({key: config[key] for key in given}, kind, path)
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and key not in given:
            raise ConfigError(f"{path}.{key} is not set, and {name} needs it.")
