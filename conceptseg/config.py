"""The frame of every configuration, its resolvers, and the rules that no YAML may break. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conceptseg.errors import ConfigError, did_you_mean


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
    """What to do with a run folder written by other code: refuse, accept, or fork into a new folder."""
    retry_failed: bool = False
    """Whether samples that failed before are tried again."""
    max_failures: int = 20
    """Failed samples after which a run stops."""
    keep_maps: bool = True
    """Whether 8-bit maps and predictions are kept for pictures."""
    progress: bool = True
    """Whether a progress bar is shown."""
    allow_targets: list[str] = field(default_factory=lambda: ["conceptseg."])
    """Prefixes that a _target_ may begin with: a config is code, so only known code runs."""


@dataclass
class Report:
    """How numbers are printed."""

    resamples: int = 10_000
    """Bootstrap resamples behind every interval."""
    level: float = 0.95
    """Share of resamples inside an interval."""
    results_md: str = "RESULTS.md"
    """File whose section a table replaces."""
    benchmarks: str = "benchmarks"
    """Folder that holds results.json and the picture sheet of each table."""
    publish: str = "auto"
    """Whether a table goes to results_md and benchmarks: yes, no, or auto (only when nothing but runtime was overridden)."""
    pictures: int = 8
    """Samples on a picture sheet."""
    columns: list[str] = field(default_factory=lambda: ["accuracy", "miou_dataset", "miou_image", "foreground_iou", "ap_image"])
    """Metrics printed for a single evaluation."""


@dataclass
class Root:
    """One evaluation. The plug-in slots take whatever their class takes."""

    extractor: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    views: dict[str, Any] = field(default_factory=dict)
    table: dict[str, Any] | None = None
    runtime: Runtime = field(default_factory=Runtime)
    report: Report = field(default_factory=Report)


def register() -> None:
    """Put the schema where Hydra finds it; safe to call twice."""
    ConfigStore.instance().store(name="root_schema", node=Root)


def plain(config: Any) -> Any:
    """A resolved config as dicts and lists."""
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config


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


def check_targets(config: Mapping[str, Any], allowed: list[str]) -> None:
    """Raises ConfigError for a _target_ outside the allowed prefixes. Source of the rule: hydra issues #3258, #3412."""
    for path, target in targets(config):
        if not any(target.startswith(prefix) for prefix in allowed):
            raise ConfigError(
                f'{path}._target_ is "{target}", which is outside runtime.allow_targets ({", ".join(allowed)}). '
                f"A config can run any code it names: add the prefix only if you trust it."
            )


def instantiate(config: Mapping[str, Any], path: str) -> Any:
    """The object a plain config describes, nested ones first. Raises the constructor's own ConceptSegError bare."""
    import inspect

    if "_target_" not in config:
        raise ConfigError(f"{path}: no _target_, so nothing can be built. Choose an option of this group.")
    module_name, _, rest = str(config["_target_"]).rpartition(".")
    try:
        kind = getattr(import_module(module_name), rest)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f'{path}._target_ "{config["_target_"]}" can\'t be imported: {error}.') from error
    given = {k: _built(v, f"{path}.{k}") for k, v in config.items() if k != "_target_"}
    accepted = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for key in given:
            if key not in accepted:
                raise ConfigError(f"{path}.{key}: {kind.__name__} takes no such setting. {did_you_mean(key, accepted)}")
    missing = [n for n, p in accepted.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if absent := [n for n in missing if n not in given]:
        raise ConfigError(f"{path}.{absent[0]} is not set, and {kind.__name__} needs it.")
    try:
        return kind(**given)
    except TypeError as error:
        raise ConfigError(f"{path}: building {kind.__name__} failed: {error}.") from error


def _built(value: Any, path: str) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return instantiate(value, path)
        return {k: _built(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_built(v, f"{path}[{i}]") for i, v in enumerate(value)]
    return value
