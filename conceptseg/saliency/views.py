"""Views: which cells to read and how to fold them. A view is a pure read-out, never a reason to run a model again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from conceptseg.errors import ConfigError, ViewError, did_you_mean, one_of, real_number


class Normalize(StrEnum):
    """Normalisation of a cell's concept vectors before the dot product."""

    NONE = "none"
    LINEAR = "linear"
    UNIT = "unit"


class Softmax(StrEnum):
    """Where concepts compete: in every cell before the fold (the paper's), after the fold, or not at all.

    shapley is a name's mean softmax over all coalitions of names (see `shapley_over_concepts`), after the fold as of_mean is;
    shapley_per_cell takes it in every cell.
    """

    NONE = "none"
    PER_CELL = "per_cell"
    OF_MEAN = "of_mean"
    SHAPLEY = "shapley"
    SHAPLEY_PER_CELL = "shapley_per_cell"
    TOKENS = "tokens"


IN_CELLS = (Softmax.PER_CELL, Softmax.SHAPLEY_PER_CELL, Softmax.TOKENS)
"""Taken in every cell; the others after the fold."""


class Fold(StrEnum):
    """How cells (layers, timesteps, draws, and heads where a space has them) become one map."""

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True, slots=True)
class CellKind:
    """Contents of one cell. Two views that differ only in layers, timesteps or draws share cells."""

    space: str
    normalize: Normalize
    softmax: Softmax
    heads: Fold
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class View:
    """One read-out. timesteps are noise levels t in 0..1 (1 is pure noise); draws counts noise draws 0..draws-1."""

    space: str
    layers: tuple[int, ...] = ()
    timesteps: tuple[float, ...] = ()
    draws: int = 1
    normalize: Normalize = Normalize.NONE
    softmax: Softmax = Softmax.NONE
    temperature: float = 1.0
    fold: Fold = Fold.MEAN
    blur: float = 0.0

    @property
    def cell(self) -> CellKind:
        """The kind of cell this view folds. Softmax after the fold needs raw cells."""
        softmax = self.softmax if self.softmax in IN_CELLS else Softmax.NONE
        return CellKind(self.space, self.normalize, softmax, self.fold, 1.0 if softmax is Softmax.NONE else self.temperature)

    @property
    def key(self) -> str:
        """For example "output/L14-17/t0.5/n5/linear/softmax/mean/blur1"; stable, since rows are filed under it."""
        parts = [self.space]
        if self.layers:
            parts.append("L" + format_span(self.layers))
        if self.timesteps:
            parts.append("t" + ",".join(f"{t:.12g}" for t in self.timesteps))
            parts.append(f"n{self.draws}")
        if self.normalize is not Normalize.NONE:
            parts.append(str(self.normalize))
        if self.softmax is not Softmax.NONE:
            name = {
                Softmax.PER_CELL: "softmax", Softmax.OF_MEAN: "softmax-of-mean", Softmax.SHAPLEY: "shapley",
                Softmax.SHAPLEY_PER_CELL: "shapley-per-cell", Softmax.TOKENS: "softmax-over-tokens",
            }[self.softmax]  # fmt: skip
            parts.append(name + (f"x{self.temperature:g}" if self.temperature != 1 else ""))
        if self.layers:
            parts.append(str(self.fold))
        if self.blur:
            parts.append(f"blur{self.blur:g}")
        return "/".join(parts)


def axes_of(key: str) -> tuple[str, str, str]:
    """(all else, layers, noise levels) that a view's key names; empty where it has none.

    >>> axes_of("output/L14-17/t0.5/n5/linear/softmax/mean")
    ('output/n5/linear/softmax/mean', '14-17', '0.5')
    """
    layers = timesteps = ""
    rest: list[str] = []
    for part in key.split("/"):
        if rest and re.fullmatch(r"L\d[\d,-]*", part):
            layers = part[1:]
        elif rest and re.fullmatch(r"t\d[\d.,e-]*", part):
            timesteps = part[1:]
        else:
            rest.append(part)
    return "/".join(rest), layers, timesteps


@dataclass(frozen=True, slots=True)
class Axes:
    """Axes that an extractor offers to views. layers and timesteps are () if the method has no such axis."""

    spaces: tuple[str, ...]
    layers: tuple[int, ...] = ()
    has_timesteps: bool = False
    has_vectors: bool = True
    """Whether scores are dot products of concept vectors, which `normalize` changes; attention probabilities are not."""


def parse_span(text: Any, offered: Sequence[int]) -> tuple[int, ...]:
    """Layers from "14-17", "0,2,5-7", "all", "last 4", "last half" (10 of 19) or a list.

    Raises ViewError for a layer that is not offered.

    >>> parse_span("0,2-3", range(5))
    (0, 2, 3)
    """
    if isinstance(text, int):
        chosen = [text]
    elif not isinstance(text, str):
        if not isinstance(text, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in text):
            raise ConfigError(f'views.layers is {text!r}; wanted a list of numbers, "14-17", "all" or "last 4".')
        chosen = [int(v) for v in text]
    elif text == "all":
        chosen = list(offered)
    elif text == "last half":
        chosen = list(offered)[len(offered) // 2 :]
    elif text.startswith("last"):
        count = text.removeprefix("last").strip()
        if not count.isdecimal() or not 0 < int(count) <= len(offered):
            raise ViewError(f'views.layers "{text}": wanted "last N" with N from 1 to {len(offered)}.')
        chosen = list(offered)[-int(count) :]
    else:
        chosen = []
        for part in text.replace(" ", "").split(","):
            ends = part.split("-")
            if len(ends) > 2 or not all(e.isdecimal() for e in ends):
                raise ViewError(
                    f'views.layers "{text}": can\'t read "{part}". Write "14-17", "0,2,5-7", "all" or "last 4", '
                    f"or a list; this backbone has layers {format_span(tuple(offered))}."
                )
            chosen += range(int(ends[0]), min(int(ends[-1]), max(offered, default=0) + 99) + 1)  # enough to name what is absent
    if absent := sorted(set(chosen) - set(offered)):
        raise ViewError(
            f'views.layers "{text}" asks for {", ".join(map(str, absent))}, but this backbone has layers '
            f"{format_span(tuple(offered))}. Change views.layers or choose another backbone."
        )
    return tuple(dict.fromkeys(sorted(chosen)))


def format_span(layers: Sequence[int]) -> str:
    """The shortest text that `parse_span` reads back: (0, 2, 3) -> "0,2-3"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _choice(kind: type[StrEnum], value: Any, key: str) -> Any:
    try:
        return kind(str(value).lower())
    except ValueError:
        raise ConfigError(f'{key}: unknown "{value}". {did_you_mean(str(value), list(kind))}') from None


def expand_views(settings: Mapping[str, Any], axes: Axes) -> dict[str, View]:
    """Named views from their settings, checked against what the extractor offers.

    A setting's `space` may be a list; `each: layer`, `timestep` or `layer_timestep` makes one view of every one: that is
    how a sweep is written. Names then get a tail, such as "sweep output L3". Raises ViewError or ConfigError.
    """
    views: dict[str, View] = {}
    if not settings:
        raise ViewError("views is empty: name at least one, for example views=map or views=concept_attention.")
    for name, setting in settings.items():
        if not isinstance(setting, Mapping):
            raise ConfigError(f"views.{name} is {setting!r}; wanted the settings of a view, such as {{space: {axes.spaces[0]}}}.")
        for tail, view in _expand(f"views.{name}", dict(setting), axes):
            views[" ".join([name, *tail])] = view
    return views


def _expand(where: str, given: dict[str, Any], axes: Axes) -> Iterator[tuple[list[str], View]]:
    spaces = given.pop("space", axes.spaces[0])
    spaces = [spaces] if isinstance(spaces, str) else spaces
    if not isinstance(spaces, Sequence) or not spaces or not all(isinstance(space, str) for space in spaces):
        raise ConfigError(f"{where}.space is {spaces!r}; wanted a name, or a list of names: {', '.join(axes.spaces[:8])}.")
    each = given.pop("each", None)
    if each is not None:
        one_of(f"{where}.each", each, ("layer", "timestep", "layer_timestep"))
    layers = parse_span(given.pop("layers", "all"), axes.layers) if axes.layers else ()
    levels = given.pop("timesteps", ()) if axes.has_timesteps else ()
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise ConfigError(f"{where}.timesteps is {levels!r}; wanted a list of noise levels in (0, 1], such as [0.5].")
    timesteps = tuple(real_number(f"{where}.timesteps", t) for t in levels)
    draws = given.pop("draws", 1) if axes.has_timesteps else 1
    if not isinstance(draws, int) or isinstance(draws, bool):
        raise ConfigError(f"{where}.draws is {draws!r}; wanted a whole number of noise draws.")
    for absent in ("layers", "timesteps", "draws"):
        given.pop(absent, None)
    if axes.has_timesteps and not timesteps:
        raise ViewError(f"{where}.timesteps is empty, but this extractor reads a noised image: give noise levels in (0, 1].")
    if bad := [t for t in timesteps if not 0 < t <= 1]:
        raise ViewError(f"{where}.timesteps: {bad[0]:g} is out of range; noise levels lie in (0, 1], where 1 is pure noise.")
    if axes.layers and not layers:
        raise ViewError(f"{where}.layers is empty: name at least one layer.")
    if draws < 1:
        raise ViewError(f"{where}.draws is {draws}: at least one noise draw is needed.")
    options: dict[str, Any] = {
        "normalize": _choice(Normalize, given.pop("normalize", "none"), f"{where}.normalize"),
        "softmax": _choice(Softmax, given.pop("softmax", "none"), f"{where}.softmax"),
        "fold": _choice(Fold, given.pop("fold", "mean"), f"{where}.fold"),
        "temperature": real_number(f"{where}.temperature", given.pop("temperature", 1.0), least=1e-6),
        "blur": real_number(f"{where}.blur", given.pop("blur", 0.0), least=0),
        "draws": draws,
    }
    if given:
        key = sorted(given)[0]
        raise ConfigError(f"{where}.{key}: a view has no such setting. {did_you_mean(key, ['each', *View.__slots__])}")
    neutral = View("map")
    for key in ("normalize", "softmax", "temperature", "fold", "blur"):
        if not axes.layers and options[key] != getattr(neutral, key):
            raise ViewError(f"{where}.{key} is {options[key]}, but this extractor gives one map and has no cells: leave it out.")
    if not axes.has_vectors and options["normalize"] is not Normalize.NONE:
        raise ViewError(f"{where}.normalize is {options['normalize']}, but this extractor's scores are not products of vectors.")
    if options["softmax"] is Softmax.NONE and options["temperature"] != 1:
        raise ViewError(f"{where}.temperature is {options['temperature']:g}, but {where}.softmax is none: nothing would use it.")
    for space in spaces:
        if space not in axes.spaces:
            raise ViewError(f'{where}.space: unknown space "{space}". {did_you_mean(space, axes.spaces)}')
        for some_layers in [(k,) for k in layers] if each in ("layer", "layer_timestep") else [layers]:
            for some_times in [(t,) for t in timesteps] if each in ("timestep", "layer_timestep") else [timesteps]:
                tail = [space] if len(spaces) > 1 else []
                tail += [f"L{some_layers[0]}"] if each in ("layer", "layer_timestep") else []
                tail += [f"t{some_times[0]:g}"] if each in ("timestep", "layer_timestep") else []
                yield tail, View(space, some_layers, some_times, **options)
