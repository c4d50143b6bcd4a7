"""Recipes of the lab: one YAML a model in conf/lab, with overrides checked against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from math import inf
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conceptseg.config import check_interpolations
from conceptseg.errors import ConfigError, did_you_mean, real_number, whole_number


def load_recipe(name: str, overrides: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """The recipe conf/lab/<name>.yaml, on a GPU with its `gpu` settings laid over it, then with "key=value" overrides.

    Raises ConfigError for an unknown name, for an unknown key (of `phases` and `gpu` too), for a value of another kind or out of
    range, and for a share of plain scenes where there are none.
    """
    folder = resources.files("conceptseg.conf").joinpath("lab")
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in names:
        raise ConfigError(f'conceptseg-lab train: no recipe "{name}". {did_you_mean(name, names)}')
    recipe = OmegaConf.create(folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(recipe, DictConfig)
    on_gpu = recipe.pop("gpu", {})
    _check_keys(on_gpu, recipe, f"conf/lab/{name}.yaml, gpu")
    OmegaConf.set_struct(recipe, True)
    if device.startswith("cuda"):
        recipe.merge_with(on_gpu)
    try:
        whole = OmegaConf.merge(recipe, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        key = next((o.split("=")[0] for o in overrides if OmegaConf.select(recipe, o.split("=")[0]) is None), "")
        part, _, last = key.rpartition(".")
        known = OmegaConf.select(recipe, part) if part else recipe
        nearest = did_you_mean(last, map(str, known if isinstance(known, DictConfig) else recipe))
        raise ConfigError(f'conceptseg-lab train {name}: can\'t set "{key}". {nearest}') from error
    check_interpolations(whole)
    found: dict[str, Any] = OmegaConf.to_container(whole, resolve=True)  # type: ignore[assignment]
    for number, phase in enumerate(found.get("phases", ())):
        _check_keys(phase, {"from", *found}, f"conceptseg-lab train {name}: phases[{number}]")
        if "from" not in phase:
            raise ConfigError(f"conceptseg-lab train {name}: phases[{number}] lacks from, the step at which it begins.")
    _check_values(found, OmegaConf.to_container(recipe), f"conceptseg-lab train {name}: ")
    asks = [part for part in (found, *found.get("phases", ())) if part.get("plain_share")]
    if asks and not found["plain_scenes"]:
        raise ConfigError(
            f"conceptseg-lab train {name}: plain_share is {asks[0]['plain_share']:g}, but plain_scenes is 0, so there are none. "
            "Set plain_scenes, or plain_share=0 here and in phases."
        )
    found["learning_rate"] = float(found["learning_rate"])
    return found


COUNTS = ("steps", "horizon", "batch", "scenes", "checkpoint_every", "image_size", "scene_size", "width", "layers", "heads")
"""Settings that are 1 or more; other whole numbers are 0 or more."""


def _check_values(found: Mapping[str, Any], recipe: Any, where: str) -> None:
    """Raises ConfigError for a value of another kind than the recipe's own, a share outside 0 to 1, and numbers that can't be."""
    for key, value in found.items():
        own, at = recipe.get(key), f"{where}{key}"
        if key in ("learning_rate", "from"):
            with suppress(TypeError, ValueError):
                value = float(value)  # YAML 1.1 reads 1.5e-3 as a word
            real_number(at, value, 0)
        elif isinstance(own, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{at} is {value!r}; wanted settings, such as {at.rpartition(' ')[2]}.{next(iter(own))}=...")
            _check_values(value, own, f"{at}.")
        elif key == "phases":
            for number, phase in enumerate(value):
                _check_values(phase, recipe, f"{at}[{number}].")
        elif isinstance(own, bool | str | list):
            if not isinstance(value, type(own)):
                raise ConfigError(f"{at} is {value!r}; wanted a value such as {own!r}.")
            if isinstance(own, list) and isinstance(value, list) and not any(isinstance(one, bool | str) for one in own):
                for one in value:
                    real_number(at, one)
        elif isinstance(own, int):
            whole_number(at, value, int(key in COUNTS))
        elif isinstance(own, float):
            real_number(at, value, 0, 1 if key.endswith("_share") else inf)


def _check_keys(part: Iterable[Any], known: Iterable[Any], where: str) -> None:
    """Raises ConfigError for a key that the recipe does not have: it would be laid over it and never be read."""
    choices = {str(key) for key in known}
    for key in part:
        if str(key) not in choices:
            raise ConfigError(f'{where}: unknown key "{key}". {did_you_mean(str(key), choices)}')
