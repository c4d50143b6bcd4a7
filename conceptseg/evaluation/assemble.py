"""From a plain config to the objects of one evaluation, its identity and its run folder."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conceptseg import keys
from conceptseg.announcing import announced
from conceptseg.backbones.planned_weights import check_drawn
from conceptseg.config import added_places, check_frame, unresolved
from conceptseg.data.base import SegmentationDataset
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.evaluation.loop import Shard
from conceptseg.evaluation.perturbed import classifier_of
from conceptseg.extractors.base import Extractor
from conceptseg.metrics.definitions import definition_of
from conceptseg.metrics.installed import MapMetric
from conceptseg.metrics.measured import known
from conceptseg.metrics.summary import DRAWN
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import View, expand_views
from conceptseg.source import source_digests
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.store.schema import SCHEMA, SOURCE_FORM, Manifest
from conceptseg.targets import check_targets, instantiate, targets

MAPS_KEPT_FOR_VIEWS = 12
"""A run with more views than this (a sweep) keeps pictures of the first one only."""
NO_NUMBER = ("_target_", "device", "licence", "memory", "hub")
"""Settings of an extractor that say where it lies and runs, or what its reader should know."""
OF_THE_HUB = ("revision", "licence", "hub")
"""Settings of a backbone's sheet that are true of the repository it names, and of nothing else."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One extractor on one data set under one protocol, read through views; nothing has been run yet."""

    config: dict[str, Any]
    dataset: SegmentationDataset
    extractor: Extractor
    protocol: SegmentationProtocol
    views: dict[str, View]
    store: RunStore
    maps: MapKeeper
    shard: Shard
    manifest: Manifest

    @property
    def run_id(self) -> str:
        return self.store.folder.name


def assemble(config: Mapping[str, Any], in_table: bool = False, overrides: Sequence[str] | None = None) -> Evaluation:
    """Build the parts and open the run folder. Loads no weights.

    in_table: whether a row that scores nothing is allowed, since a table prints it as such. overrides: those that compose to the
    config, for the command that the manifest keeps; None where there are none to type. Raises ConfigError, ViewError,
    DataError or ResumeError; no folder is made for a configuration that is refused.
    """
    whole = dict(config)
    runtime = whole["runtime"]
    check_frame(whole)
    _check_report(whole["report"])
    allowed = runtime["allow_targets"]
    check_targets(whole, allowed)
    dataset, protocol, extractor = build_parts(whole)
    _check_windows(protocol, extractor)
    if reruns := [metric for metric in protocol.measures if metric.asks_again]:
        classifier_of(extractor, reruns)
    if not in_table:
        _check_decisions(protocol, extractor)
        check_measured(protocol, whole["report"]["columns"])
    views = expand_views(whole["views"], extractor.axes())
    for part in extractor.parts().values():
        check_drawn(part.checkpoint)
    identity = identity_of(whole, dataset, protocol, extractor)
    classes = [target for part in ("dataset", "protocol", "extractor") for _, target in targets(whole[part])]
    source = source_digests([*classes, *(f"{m.measure.__module__}.{m.measure.__qualname__}" for m in protocol.measures)])
    name = keys.run_id(identity)
    if runtime["on_code_change"] == "fork":
        name += "-" + keys.digest(source, 6)
    shard = shard_of(runtime)
    store = RunStore(Path(runtime["runs"]) / name, shard.index, shard.count)
    manifest: Manifest = {
        "schema": SCHEMA, "run_id": name, "identity": identity, "config": unresolved(recorded(whole, extractor), identity),
        "provenance": extractor.provenance, "weights": {n: p.checkpoint.origin() for n, p in extractor.parts().items()},
        "source": source, "source_form": SOURCE_FORM, "versions": keys.versions(), "machine": machine(), "git": git_state(),
    }  # fmt: skip
    if overrides is not None:
        manifest["command"] = ["conceptseg", *added_places(), *overrides]
    store.open(manifest, runtime["on_code_change"])
    kept = [v.key for v in views.values()]
    pictured = frozenset(kept if len(kept) <= MAPS_KEPT_FOR_VIEWS else kept[:1])
    keeper = MapKeeper(store.folder / "maps", pictured, store.samples, shard.index, shard.count)
    return Evaluation(whole, dataset, extractor, protocol, views, store, keeper, shard, manifest)


def build_parts(config: Mapping[str, Any]) -> tuple[SegmentationDataset, SegmentationProtocol, Extractor]:
    """The data set, the protocol and the method of a plain configuration; reads no data and no weights. Raises ConfigError."""
    allowed = config["runtime"]["allow_targets"]
    dataset: SegmentationDataset = instantiate(config["dataset"], "dataset", allowed)
    protocol: SegmentationProtocol = instantiate(config["protocol"], "protocol", allowed)
    extractor: Extractor = instantiate(config["extractor"], "extractor", allowed)
    return dataset, protocol, extractor


def identity_of(
    config: Mapping[str, Any], dataset: SegmentationDataset, protocol: SegmentationProtocol, extractor: Extractor
) -> dict[str, Any]:
    """Return the settings that name a run. Reads the data's files. Raises DataError or, for an unknown branch, ConfigError."""
    with announced(f"digesting the files of {dataset.name}", usually_short=True):
        fingerprint = dataset.fingerprint()
    with announced(f"digesting the weights of {type(extractor).__name__}", usually_short=True):
        method = method_identity(config["extractor"], extractor)
    return {
        "method": method,
        "dataset": {"name": dataset.name, "fingerprint": fingerprint},
        "protocol": protocol.identity(),
    }


def _check_decisions(protocol: SegmentationProtocol, extractor: Extractor) -> None:
    """Raise ConfigError where a protocol decides between words only, and the extractor's maps of words can't be compared."""
    if not extractor.comparable and all(s.decision.startswith("argmax") for s in protocol.segmenters):
        raise ConfigError(
            f"protocol {protocol.label} gives a pixel to the word with the greatest score, and {type(extractor).__name__}'s maps "
            "of different words can't be compared: nothing would be scored. Take a protocol that cuts one word's map, such as "
            "protocol=scenes_single 'dataset.objects=[1,1]' (its key: protocol.segmenters)"
        )


def _check_windows(protocol: SegmentationProtocol, extractor: Extractor) -> None:
    """Raise ConfigError where a protocol shows images in windows, and the extractor's maps of two images have no one scale."""
    if protocol.windows is not None and not extractor.windowed:
        raise ConfigError(
            f"protocol {protocol.name} shows each image in {protocol.windows.label}, and {type(extractor).__name__}'s maps of "
            "two windows can't be averaged: they have no common scale, or depend on the whole image. Show images whole "
            "(protocol.window=null protocol.window_stride=null, or protocol=voc20 or voc21), or choose a method that compares "
            "patches with words, such as extractor=sclip or naclip."
        )


def check_measured(protocol: SegmentationProtocol, metrics: Sequence[str]) -> None:
    """Raise ConfigError for a metric of maps that the protocol does not measure, so that its rows hold no such number."""
    measured = [metric.name for metric in protocol.measures]
    for name in metrics:
        if name not in measured and isinstance(known(name), MapMetric):
            raise ConfigError(
                f'"{name}" is measured from maps, and protocol {protocol.label} measures {", ".join(measured) or "nothing"}. '
                f"Set protocol.measures=[{','.join([*measured, name])}], or leave the metric out of the columns."
            )


def method_identity(settings: Mapping[str, Any], extractor: Extractor) -> dict[str, Any]:
    """Return the identities of the method and its models, and every plain setting that those do not cover.

    Where parts lie and run (`_target_`, device) and what a sheet tells its reader change no number and stay out. Raises
    ConfigError for a model among the settings that says nothing of itself, because the method holds it under another name.
    """
    said = extractor.identity()
    package = str(settings["_target_"]).partition(".")[0]
    plain = {name: value for name, value in settings.items() if name not in {*NO_NUMBER, *said} - {"version"}}
    if nested := [name for name, value in plain.items() if any(targets(value))]:
        raise ConfigError(
            f"extractor.{nested[0]} is a model, but {type(extractor).__name__}.identity() does not name it, so that runs of two "
            f"models would share their rows. Keep it as self.{nested[0]}, or add it to identity()."
        )
    return {**said, "settings": plain, **({} if package == "conceptseg" else {"package": package})}


def recorded(config: Mapping[str, Any], extractor: Extractor) -> dict[str, Any]:
    """The configuration as the manifest keeps it: without a sheet's commit and licence where a local folder took the place of
    the repository that they are true of."""
    settings = dict(config["extractor"])
    for name, part in extractor.parts().items():
        if part.checkpoint.pinned() is None and isinstance(settings.get(name), Mapping):
            settings[name] = {key: value for key, value in settings[name].items() if key not in OF_THE_HUB}
    return {**config, "extractor": settings}


def _check_report(report: Mapping[str, Any]) -> None:
    """Check settings whose errors would otherwise appear only after everything is computed."""
    if report["draw"] not in DRAWN:
        raise ConfigError(f'report.draw: unknown "{report["draw"]}". {did_you_mean(report["draw"], DRAWN)}')
    for name in report["columns"]:
        definition_of(name, "report.columns")


def shard_of(runtime: Mapping[str, Any]) -> Shard:
    """This process's share, from the settings or from what torchrun and accelerate put into the environment."""
    count = _of_environment("WORLD_SIZE", 1) if runtime["shard_count"] < 0 else runtime["shard_count"]
    index = _of_environment("RANK", 0) if runtime["shard_index"] < 0 else runtime["shard_index"]
    if not 0 <= index < count or runtime["shard_index"] < -1:
        raise ConfigError(
            f"runtime.shard_index is {index}, but there are {count} shards (runtime.shard_count): wanted 0 to {count - 1}."
        )
    return Shard(index, count, runtime["batch_size"])


def _of_environment(name: str, default: int) -> int:
    """A number that torchrun or accelerate put into the environment. Raises ConfigError for anything else."""
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdigit():
        setting = "runtime.shard_index" if name == "RANK" else "runtime.shard_count"
        raise ConfigError(f'the environment variable {name} is "{value}"; wanted a number. Unset it, or set {setting}.')
    return int(value)


@cache  # of this process
def machine() -> dict[str, str]:
    """Kind of machine; no host name."""
    import torch

    return {
        "system": platform.system(), "processor": platform.machine(), "cores": str(os.cpu_count()),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }  # fmt: skip


@cache
def git_state() -> dict[str, str]:
    """Commit of the checkout this package lies in and whether it was clean; empty for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        status = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"commit": commit.stdout.strip(), "clean": str(not status.stdout.strip()).lower()} if commit.returncode == 0 else {}
