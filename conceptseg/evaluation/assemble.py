"""From a plain config to the objects of one evaluation, its identity and its run folder."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from conceptseg import keys
from conceptseg.config import check_targets, instantiate
from conceptseg.data.base import SegmentationDataset
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.evaluation.loop import Shard
from conceptseg.extractors.base import Extractor
from conceptseg.metrics.definitions import definition_of
from conceptseg.metrics.summary import DRAWN
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import View, expand_views
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.store.schema import SCHEMA, Manifest

MAPS_KEPT_FOR_VIEWS = 12
"""A run with more views than this (a sweep) keeps pictures of the first one only."""


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


def assemble(config: Mapping[str, Any]) -> Evaluation:
    """Build the parts and open the run folder. Loads no weights. Raises ConfigError, ViewError, DataError or ResumeError."""
    whole = dict(config)
    runtime = whole["runtime"]
    _check_report(whole["report"])
    check_targets(whole, runtime["allow_targets"])
    dataset: SegmentationDataset = instantiate(whole["dataset"], "dataset")
    protocol: SegmentationProtocol = instantiate(whole["protocol"], "protocol")
    extractor: Extractor = instantiate(whole["extractor"], "extractor")
    views = expand_views(whole["views"], extractor.axes())
    identity = {
        "extractor": {k: v for k, v in whole["extractor"].items() if k not in ("backbone", "device")},
        "method": extractor.identity(),
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint()},
        "protocol": protocol.identity(),
    }
    source = keys.source_digests()
    name = keys.run_id(identity)
    choices = ("refuse", "accept", "fork")
    if runtime["on_code_change"] not in choices:
        raise ConfigError(
            f'runtime.on_code_change: unknown "{runtime["on_code_change"]}". {did_you_mean(runtime["on_code_change"], choices)}'
        )
    if runtime["on_code_change"] == "fork":
        name += "-" + keys.digest(source, 6)
    shard = shard_of(runtime)
    store = RunStore(Path(runtime["runs"]) / name, shard.index, shard.count)
    manifest: Manifest = {
        "schema": SCHEMA, "run_id": name, "identity": identity, "config": whole, "provenance": extractor.provenance,
        "source": source, "versions": keys.versions(), "machine": machine(), "git": git_state(),
    }  # fmt: skip
    store.open(manifest, runtime["on_code_change"])
    kept = [v.key for v in views.values()]
    pictured = frozenset(kept if len(kept) <= MAPS_KEPT_FOR_VIEWS else kept[:1])
    keeper = MapKeeper(store.folder / "maps", pictured, store.samples)
    return Evaluation(whole, dataset, extractor, protocol, views, store, keeper, shard, manifest)


def _check_report(report: Mapping[str, Any]) -> None:
    """What would otherwise be noticed when everything is computed."""
    if report["resamples"] < 1:
        raise ConfigError(f"report.resamples is {report['resamples']}; wanted 1 or more, such as 10000.")
    if not 0 < report["level"] < 1:
        raise ConfigError(f"report.level is {report['level']:g}; wanted a share between 0 and 1, such as 0.95.")
    if report["draw"] not in DRAWN:
        raise ConfigError(f'report.draw: unknown "{report["draw"]}". {did_you_mean(report["draw"], DRAWN)}')
    for name in report["columns"]:
        definition_of(name, "report.columns")


def shard_of(runtime: Mapping[str, Any]) -> Shard:
    """This process's share, from the settings or from what torchrun and accelerate put into the environment."""
    count = int(os.environ.get("WORLD_SIZE", "1")) if runtime["shard_count"] < 0 else runtime["shard_count"]
    index = int(os.environ.get("RANK", "0")) if runtime["shard_index"] < 0 else runtime["shard_index"]
    if not 0 <= index < count or runtime["shard_index"] < -1:
        raise ConfigError(
            f"runtime.shard_index is {index}, but there are {count} shards (runtime.shard_count): wanted 0 to {count - 1}."
        )
    if runtime["batch_size"] < 1:
        raise ConfigError(f"runtime.batch_size is {runtime['batch_size']}; wanted 1 or more.")
    return Shard(index, count, runtime["batch_size"])


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
