"""The frame of every configuration, its resolvers, and the rules that no YAML may break. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from omegaconf.resolvers import oc

from conceptseg.errors import ConfigError, in_range, one_of


@dataclass
class Runtime:
    """How a run is carried out; nothing here changes a number, so nothing here is part of a run id."""

    runs: str = "runs"
    """Folder that holds one folder a run."""
    device: str = "cpu"
    """Where backbones run: cpu, cuda, cuda:1, mps."""
    batch_size: int = 8
    """Samples that go through a model together."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""
    shard_index: int = -1
    """Which share of the batches this process takes; -1 reads RANK, else 0."""
    shard_count: int = -1
    """How many processes share the work; -1 reads WORLD_SIZE, else 1."""
    on_code_change: str = "refuse"
    """Policy for a run folder written by other code: refuse, accept, or fork into a new folder."""
    retry_failed: bool = False
    """Whether samples that failed before are tried again."""
    max_failures: int = 20
    """Failed samples after which a run stops."""
    keep_maps: bool = True
    """Whether 8-bit maps and predictions are kept for pictures."""
    progress: bool = True
    """Whether a progress bar is shown on a terminal."""
    verbosity: str = "normal"
    """Messages on stderr: quiet (-q), normal, or verbose (-v); the log of each run's folder keeps it all."""
    download: bool = False
    """Whether weights that this machine lacks are fetched from the hub; conceptseg plan says how many GB."""
    allow_targets: list[str] = field(default_factory=lambda: ["conceptseg."])
    """Packages whose classes a _target_ may name; only the command line may widen it."""
    record_environment: bool = False
    """Whether a run folder keeps values that settings read from the environment; only the command line may allow it."""


@dataclass
class Report:
    """How numbers are printed."""

    resamples: int = 10_000
    """Bootstrap resamples behind every interval."""
    level: float = 0.95
    """Share of resamples inside an interval."""
    draw: str = "images"
    """Unit of the bootstrap: images, or words (whole groups of images with the same words)."""
    results_md: str = "RESULTS.md"
    """File to which tables are published."""
    benchmarks: str = "benchmarks"
    """Folder to which results.json and the picture sheet of each table are published."""
    publish: bool = False
    """Whether a table is also published to results_md and benchmarks; it is always written below runtime.runs."""
    pictures: int = 8
    """Samples on a picture sheet."""
    costs: bool = False
    """Whether seconds, peak memory and forward passes are printed beside the numbers."""
    development: float = 0.5
    """Share of samples on which the best view of a sweep is chosen; its number is reported on the others."""
    split_seed: int = 0
    """Seed of that split, which goes by sample key."""
    trackers: list[str] = field(default_factory=list)
    """Experiment trackers that get every computed number: tensorboard, wandb, mlflow."""
    detail: str = "brief"
    """Extent of a table on the terminal: brief, or full (every row and column, definitions, notes and runs)."""
    columns: list[str] = field(default_factory=list)
    """Metrics that are shown; [] takes mIoU and mAP (CSV: all). A single evaluation computes them."""
    rows: list[str] = field(default_factory=list)
    """Rows that are shown, by name or pattern ("*DAAM*"); [] takes what report.top says."""
    top: int | None = None
    """Methods of a block that are shown; 0 takes all, null 7 on the brief screen and all elsewhere."""
    sort: str | None = None
    """Order of methods: best, sheet, or a metric; null is best on the brief screen, sheet elsewhere."""
    intervals: bool = True
    """Whether intervals are shown."""
    digits: int | None = None
    """Decimals of percentages computed here; null keeps the table's own."""


@dataclass
class Root:
    """One evaluation. The plug-in slots take whatever their class takes."""

    extractor: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=lambda: {"measures": []})
    """Every protocol takes measures, whether or not its sheet lists them."""
    views: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] | None = None
    launcher: dict[str, Any] | None = None
    runtime: Runtime = field(default_factory=Runtime)
    report: Report = field(default_factory=Report)


MOVED_VIEWS = {
    f"{family}_{name}": f"{family}/{name}"
    for family, names in {
        "daam": "grids grids_sdxl released_sd2 released_sdxl steps",
        "lab": "development sd3 sdxl sweep sweep_unet unet unet_development",
        "released": "ablation imagenet imagenet_cross layers pipeline sd35 sd35_prompt timesteps voc_multi voc_single",
        "standard": "layers timesteps",
        "sweep": "layers",
    }.items()
    for name in names.split()
}
"""Former name -> name of the views that moved into a folder; both are accepted."""


def register() -> None:
    """Put the schema, and the former names of views, where Hydra finds them; safe to call twice."""
    OmegaConf.register_new_resolver("oc.env", _environment_variable, replace=True)
    store = ConfigStore.instance()
    if "root_schema.yaml" in store.repo:
        return
    store.store(name="root_schema", node=Root)
    for old, new in MOVED_VIEWS.items():
        store.store(group="views", name=old, node={"defaults": [f"/views/{new}@_here_"]})


LIMITS: dict[str, tuple[float, float]] = {
    "runtime.batch_size": (1, 100_000),
    "runtime.threads": (0, 4096),
    "runtime.shard_index": (-1, 1_000_000),
    "runtime.max_failures": (1, inf),
    "report.resamples": (1, 10_000_000),
    "report.pictures": (0, 100_000),
}
"""Smallest and greatest value of settings of the frame."""
DETAILS = ("brief", "full")
WHEN_CODE_CHANGED = ("refuse", "accept", "fork")


def check_frame(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a setting of runtime or report that can't be, before anything is built, made or written."""
    runtime, report = config["runtime"], config["report"]
    for name, (least, most) in LIMITS.items():
        part, _, key = name.partition(".")
        value = config[part][key]
        if not least <= value <= most:
            upto = f" to {most:,.0f}" if most < inf else " or more"
            raise ConfigError(f"{name} is {value}; wanted {least}{upto}.")
    if runtime["shard_count"] != -1 and not 1 <= runtime["shard_count"] <= 1_000_000:
        raise ConfigError(f"runtime.shard_count is {runtime['shard_count']}; wanted 1 to 1,000,000, or -1 to read WORLD_SIZE.")
    if not 0 < report["level"] < 1:
        raise ConfigError(f"report.level is {report['level']:g}; wanted a share between 0 and 1, such as 0.95.")
    one_of("runtime.on_code_change", runtime["on_code_change"], WHEN_CODE_CHANGED)
    for part, key, kind in (("runtime", "runs", "folder"), ("report", "benchmarks", "folder"), ("report", "results_md", "file")):
        _check_place(f"{part}.{key}", config[part][key], kind)
    one_of("report.detail", report["detail"], DETAILS)
    in_range("report.top", report["top"], 0, 100_000)
    in_range("report.digits", report["digits"], 0, 10)


def _check_place(name: str, value: str, kind: str) -> None:
    """A folder or file that may not exist yet, but must not be of another kind."""
    if not value.strip() or "\0" in value:
        raise ConfigError(f"{name} is {value!r}; wanted the path of a {kind}.")
    try:
        there = Path(value).exists()
        wrong = there and (not Path(value).is_dir() if kind == "folder" else not Path(value).is_file())
    except OSError as error:
        raise ConfigError(f"{name}: can't look at {value}: {error.strerror}. Name another {kind}.") from error
    if wrong:
        raise ConfigError(f"{name} is {value}, which exists and is no {kind}. Name another {kind}.")


def added_places() -> list[str]:
    """The override that adds the places of sheets that this command added, by --config-dir or hydra.searchpath; [] for none."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    places = [
        place if re.fullmatch(r"[\w./:-]+", place := f"{source.schema}://{source.path}") else f'"{place}"'
        for source in HydraConfig.get().runtime.config_sources
        if source.provider == "command-line" or source.provider.startswith("hydra.searchpath")
    ]
    return [f"hydra.searchpath=[{','.join(places)}]"] if places else []


ENVIRONMENT = "environment"
"""Key of a plain config: each setting that reads the environment, as [["dataset", "root"], "${oc.env:X}"]."""
_variables_read: list[str] = []


def _environment_variable(name: str, *default: str | None) -> str | None:
    """OmegaConf's oc.env, which notes what it was asked for."""
    _variables_read.append(name)
    return oc.env(name, *default)


def plain(config: Any) -> Any:
    """A resolved config as dicts and lists; settings that read the environment are listed in it under `ENVIRONMENT`.

    Raises ConfigError where `check_interpolations` does, and for a value that is `???`.
    """
    if not isinstance(config, DictConfig):
        return config
    check_interpolations(config)
    try:
        found = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        name = error.full_key
        raise ConfigError(f"{name} is ???, which stands for a value that is not set yet. Set {name}=... to one.") from error
    read = [[keys, text] for keys, text in _interpolations(OmegaConf.to_container(config)) if _reads_environment(config, keys)]
    if read and isinstance(found, dict):
        found[ENVIRONMENT] = read
    return found


MOST_INTERPOLATIONS = 2_000
"""Interpolations that resolving a configuration may take, each counted as often as it is resolved."""
MOST_LETTERS = 10_000_000
"""Letters that all texts of a resolved configuration may have together."""
DEEPEST = 100
"""Levels of the deepest value that an interpolation may name."""
_INNERMOST = re.compile(r"\$\{((?:[^${}]|\{[^${}]*\})*)\}")
_COMPUTED = "\0"
"""Stands for an interpolation inside another."""


def check_interpolations(config: Any) -> None:
    """Raises ConfigError where a few interpolations would be resolved to very many values, or nest too deep; resolves none.

    `a: ${b}${b}`, `b: ${c}${c}` and so on double with every line. An interpolation whose key is itself computed counts as much
    as the costliest value.
    """
    root = OmegaConf.to_container(config._get_root(), resolve=False)
    costs: dict[tuple[Any, ...], tuple[int, int]] = {}
    within: set[tuple[Any, ...]] = set()

    def cost(keys: tuple[Any, ...]) -> tuple[int, int]:
        """Interpolations and letters of the value at these keys; a value inside itself is left to OmegaConf, which refuses it."""
        if keys in within:
            return 0, 0
        if keys not in costs:
            within.add(keys)
            costs[keys] = _measured(keys)
            within.remove(keys)
            if costs[keys][0] > MOST_INTERPOLATIONS or costs[keys][1] > MOST_LETTERS:
                raise ConfigError(
                    f"{'.'.join(map(str, keys)) or 'the configuration'}: its interpolations (${{...}}) would be resolved to "
                    f"{costs[keys][0]:,} values and {costs[keys][1]:,} letters; at most {MOST_INTERPOLATIONS:,} and "
                    f"{MOST_LETTERS:,} are. Write the values themselves."
                )
        return costs[keys]

    def _measured(keys: tuple[Any, ...]) -> tuple[int, int]:
        held = _held(root, keys)
        if isinstance(held, Mapping | list):
            found = [cost((*keys, key)) for key in (held if isinstance(held, Mapping) else range(len(held)))]
            return sum(one for one, _ in found), sum(letters for _, letters in found)
        if not isinstance(held, str):
            return 0, 0
        times, letters = 0, len(held)
        while match := _INNERMOST.search(held):
            held = held[: match.start()] + _COMPUTED + held[match.end() :]
            times += 1
            for place in _places(match[1], keys):
                costliest = max(costs.values(), default=(0, 0))
                more = costliest if place is None else cost(place)
                times, letters = times + more[0], letters + more[1]
        return times, letters

    def _places(inside: str, keys: tuple[Any, ...]) -> list[tuple[Any, ...] | None]:
        """Keys that the text of an interpolation names; None for one that is computed."""
        _, colon, arguments = inside.partition(":")
        found: list[tuple[Any, ...] | None] = []
        for name in re.split(r"[\s,]+", arguments) if colon else [inside]:
            dots = len(name) - len(name.lstrip("."))
            parts = tuple(filter(None, re.split(r"[.\[\]]+", name[dots:].strip(" '\""))))
            if len(parts) > DEEPEST:
                raise ConfigError(
                    f"{'.'.join(map(str, keys))}: an interpolation (${{...}}) names a value {len(parts):,} levels deep."
                )
            if _COMPUTED in name:
                found += [] if colon else [None]
            elif name and _held(root, place := (*keys[: len(keys) - dots], *parts) if dots else parts) is not None:
                found.append(place)
        return found

    try:
        cost(())
    except RecursionError as error:
        raise ConfigError("the configuration's interpolations (${...}) or values nest too deep. Write the values.") from error


def _held(root: Any, keys: Sequence[Any]) -> Any:
    """The value at some keys; None where there is none."""
    for key in keys:
        try:
            if isinstance(root, Mapping):
                root = root[key if key in root else next(one for one in root if str(one) == str(key))]
            else:
                root = root[int(key)] if isinstance(root, list) else None
        except (LookupError, ValueError, StopIteration):
            return None
    return root


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that a run folder keeps, with what it reads from the environment now."""
    found: dict[str, Any] = plain(OmegaConf.create(dict(config)))
    return found


def _interpolations(held: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], str]]:
    """Keys and text of every value that interpolates."""
    if isinstance(held, Mapping | list):
        for key, value in held.items() if isinstance(held, Mapping) else enumerate(held):
            yield from _interpolations(value, (*keys, key))
    elif isinstance(held, str) and "${" in held:
        yield list(keys), held


def _reads_environment(config: DictConfig, keys: Sequence[Any]) -> bool:
    """Whether resolving this value reads the environment, by itself or through another setting."""
    _variables_read.clear()
    held: Any = config
    for key in keys:
        held = held[key]
    if isinstance(held, DictConfig | ListConfig):
        OmegaConf.to_container(held, resolve=True)
    return bool(_variables_read)


def unresolved(config: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """A plain config as a run folder keeps it: settings that read the environment as they were written.

    identity: what the run is named after, which holds the values of settings that decide numbers. Raises ConfigError where one of
    those was read from the environment, unless runtime.record_environment allows to keep it.
    """
    found: dict[str, Any] = deepcopy(dict(config))
    if config["runtime"]["record_environment"]:
        return found
    kept = {str(value) for value in _leaves(identity)}
    for keys, text in config.get(ENVIRONMENT, ()):
        held: Any = found
        for key in keys[:-1]:
            held = held[key]
        value, held[keys[-1]] = held[keys[-1]], text
        secrets = {str(leaf) for leaf in _leaves(value)}
        if keys[0] not in ("runtime", "report", "launcher") and secrets & kept:
            name = ".".join(map(str, keys))
            raise ConfigError(
                f"{name} reads the environment ({text}), and its value would be kept in the run's manifest, since it decides "
                "numbers. Write the value itself, or allow it on the command line: runtime.record_environment=true."
            )
    return found


def _leaves(held: Any) -> Iterator[Any]:
    """Every value that is neither a mapping nor a list."""
    if isinstance(held, Mapping | list | tuple):
        for inner in held.values() if isinstance(held, Mapping) else held:
            yield from _leaves(inner)
    else:
        yield held


def composed(overrides: Sequence[str], name: str = "evaluate") -> dict[str, Any]:
    """The configuration that a command with these overrides composes, as plain data; Hydra is left as it was found.

    Raises ConfigError for overrides that do not fit.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    before = Singleton.get_state()
    GlobalHydra.instance().clear()
    register()
    try:
        with initialize_config_module("conceptseg.conf", version_base="1.3"):
            found: dict[str, Any] = plain(compose(name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"composing {', '.join(overrides)} failed: {' '.join(str(error).split())}") from error
    finally:
        Singleton.set_state(before)
    return found
