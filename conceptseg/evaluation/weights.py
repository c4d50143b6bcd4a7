"""Weights of an evaluation: which are lacking here, and fetching them once the user has agreed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conceptseg.backbones.base import Backbone, Checkpoint
from conceptseg.backbones.hub import cache_folder, is_offline, page_of
from conceptseg.backbones.repositories import fetch, missing_files, repository_of, size_of, unread_of
from conceptseg.backbones.sheet_files import sheet_of
from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import Evaluation

log = logging.getLogger(__name__)


def checkpoints(config: Any, where: str = "extractor") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(key, settings) of every part of a configuration that reads a checkpoint."""
    if isinstance(config, Mapping):
        if "path" in config and "_target_" in config:
            yield where, config
        for key, value in config.items():
            yield from checkpoints(value, f"{where}.{key}")
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from checkpoints(value, f"{where}[{number}]")


def samples_to_compute(evaluation: Evaluation) -> int:
    """Samples that lack a row under some view and segmenter."""
    by_key = {view.key for view in evaluation.views.values()}
    extractor, retry = evaluation.extractor, evaluation.config["runtime"]["retry_failed"]
    segmenters = {s.key for s in evaluation.protocol.segmenters if extractor.comparable or not s.decision.startswith("argmax")}
    return sum(bool(evaluation.store.missing(key, by_key, segmenters, retry)) for key in tuple(evaluation.dataset.keys()))


def provide_weights(evaluation: Evaluation) -> None:
    """See to it that weights which a run needs are on this machine; a run with nothing left to compute needs none.

    Raises ConfigError where they would have to be downloaded and runtime.download does not say so.
    """
    config = evaluation.config
    lacking = []
    for key, settings in checkpoints(config["extractor"]):
        checkpoint, repository = Checkpoint(str(settings["path"]), settings.get("revision")), repository_of(settings)
        if checkpoint.folder() is None and (files := missing_files(checkpoint, repository.files, unread_of(settings))):
            lacking.append((key, settings, checkpoint, repository, files))
    if not lacking or not samples_to_compute(evaluation):
        return
    for key, settings, checkpoint, _, files in lacking:
        _obtain(f"{key}.path", settings, checkpoint, files, config["runtime"]["download"], "runtime.download=yes")


def provide_weights_of(method: Any, agreed: bool) -> None:
    """Download what the models of a built method lack. Raises ConfigError where the user has not agreed to it."""
    for part in vars(method).values():
        if isinstance(part, Backbone) and part.checkpoint.folder() is None:
            settings = {**(sheet_of(part.checkpoint.path) or {}), "load": getattr(part, "load", "whole")}
            repository = repository_of(settings)
            if files := missing_files(part.checkpoint, repository.files, unread_of(settings)):
                _obtain("model", settings, part.checkpoint, files, agreed, "download=yes")


def _obtain(
    key: str, settings: Mapping[str, Any], checkpoint: Checkpoint, files: Sequence[str], agreed: bool, consent: str
) -> None:
    repository = repository_of(settings)
    size = size_of(repository)
    if not agreed:
        gate = f" Its licence has to be accepted first on {page_of(checkpoint.path)} (hf auth login)." if repository.gated else ""
        raise ConfigError(
            f'{key} "{checkpoint.path}": {", ".join(files)} of it are not on this machine, and nothing is downloaded '
            f"unasked.\n  To fetch them, {size} to {cache_folder()}, licence {settings.get('licence') or 'not known'}: the same "
            f"command with {consent}.{gate}\n  Or use the lab: "
            f"{'model=lab:flux' if key == 'model' else 'backbone@extractor.backbone=lab_flux'}."
        )
    if is_offline():
        raise ConfigError(f"{consent} can't fetch {checkpoint.path}, since HF_HUB_OFFLINE is set. Unset it.")
    log.warning("%s is not whole on this machine. Fetching it, %s to %s", checkpoint.path, size, cache_folder())
    fetch(checkpoint, repository, unread_of(settings))
