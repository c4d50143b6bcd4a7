"""conceptseg-doctor: say what this machine, the weights of a backbone, or a data set lacks, and how to mend it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from conceptseg.cli.composing import run_hydra, task_overrides
from conceptseg.config import plain, register
from conceptseg.errors import ConfigError, guarded, printable
from conceptseg.files import takes_files
from conceptseg.logs import quiet_libraries

HELP = """\
conceptseg-doctor: what this machine, the weights of a backbone, or a data set lacks, and how to mend it.

  conceptseg-doctor                                        the machine: device, torch, token, disk, extras
  conceptseg-doctor dataset=<name> [dataset.root=...]      and a data set: missing and damaged files
  conceptseg-doctor backbone@extractor.backbone=<name>     and the weights of a backbone: here or not, gate
  conceptseg-doctor runtime.device=cuda runtime.runs=...   and whether this device and folder can be used

Lines that begin with "-" are faults; with one the exit status is 1. Nothing is downloaded or written,
and the token is never shown."""
EXTRAS = {
    "int8": ("torchao",), "parser": ("spacy",), "ray": ("ray",), "slurm": ("submitit",),
    "trackers": ("accelerate", "tensorboard"),
}  # fmt: skip
"""Extra of pyproject.toml -> the modules it brings."""


@guarded
def doctor() -> int:
    """conceptseg-doctor [dataset=...] [backbone@extractor.backbone=...]: say what is lacking, and how to mend it."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(HELP)
        return 0
    if "--version" in sys.argv[1:]:
        from conceptseg import __version__

        print(f"conceptseg-doctor {__version__}")
        return 0
    quiet_libraries()
    register()
    return run_hydra(_doctor, "evaluate")


def _doctor(config: DictConfig) -> int:
    whole = plain(config)
    said = [override.lstrip("+~") for override in task_overrides()]
    faults = []
    for fault, line in _checked(whole, said):
        faults += [line] if fault else []
        print(printable(f"- {line}" if fault else line))
    return 1 if faults else 0


def _checked(config: Mapping[str, Any], said: Sequence[str]) -> Iterator[tuple[bool, str]]:
    """(whether it is a fault, line) of everything that is looked at."""
    yield from _machine(config["runtime"])
    yield from _weights(config["extractor"], asked=any(word.startswith(("backbone", "extractor", "experiment")) for word in said))
    if any(word.startswith(("dataset", "experiment")) for word in said):
        yield from _data(config)


def _machine(runtime: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    import torch

    from conceptseg.backbones.hub import cache_folder, has_token
    from conceptseg.backbones.repositories import free_bytes
    from conceptseg.evaluation.plan import device_bytes

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield False, f"python {platform.python_version()}, torch {torch.__version__} (built with {built}), {platform.system()}"
    try:
        name, memory = device_bytes(runtime["device"])
        yield False, f"device {runtime['device']}: {name}, {memory / 1e9:.3g} GB"
    except ConfigError as error:
        yield True, str(error)
    if runtime["device"] == "cpu" and torch.cuda.is_available():
        yield False, "an accelerator is there and not used; runtime.device=cuda uses it"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    token = "found" if has_token() else "none; gated models need one: hf auth login"
    yield False, f"hub: token {token}" + ("; HF_HUB_OFFLINE is set: nothing can be downloaded" if offline else "")
    cache, runs = cache_folder(), Path(runtime["runs"])
    yield False, f"hub's cache: {cache}, {free_bytes(cache) / 1e9:.3g} GB free"
    at = next(place for place in (runs.absolute(), *runs.absolute().parents) if place.exists())
    writable = takes_files(at)
    yield (
        not writable,
        f"runs: {runs}, {free_bytes(runs) / 1e9:.3g} GB free" + ("" if writable else f"; {at} can't be written to"),
    )
    lacking = {extra: [m for m in modules if find_spec(m) is None] for extra, modules in EXTRAS.items()}
    there = [extra for extra, modules in lacking.items() if not modules]
    yield False, f"extras: {', '.join(there) or 'none'}" + (
        f"; not installed: {', '.join(extra for extra, modules in lacking.items() if modules)} (pip install 'conceptseg[NAME]')"
        if any(lacking.values()) else ""
    )  # fmt: skip


def _weights(extractor: Mapping[str, Any], asked: bool) -> Iterator[tuple[bool, str]]:
    """Weights that the chosen method reads. Those of the default are not spoken of unless they are lacking."""
    from conceptseg.backbones.base import Checkpoint
    from conceptseg.backbones.hub import has_token, page_of
    from conceptseg.backbones.repositories import missing_files, repository_of, unread_of
    from conceptseg.evaluation.weights import checkpoints

    for _, settings in checkpoints(extractor):
        path, repository = str(settings["path"]), repository_of(settings)
        try:
            checkpoint = Checkpoint(path, settings.get("revision"))
            hub = checkpoint.folder() is None
            lacking = missing_files(checkpoint, repository.files, unread_of(settings))
        except ConfigError as error:
            yield True, f"weights: {error}"
            continue
        if not lacking:
            if asked:
                yield False, f"weights of {path}: here"
            continue
        assert hub
        size = "of unknown size" if repository.download is None else f"up to {repository.download:g} GB"
        yield (
            True,
            (
                f"weights of {path}: {', '.join(lacking)} not in the cache. Run with runtime.download=yes ({size}, "
                f"licence {settings.get('licence') or 'not known'})"
            ),
        )
        if repository.mirror_of:
            yield False, f"  a mirror of {repository.mirror_of}; that its files are equal is not verified"
        if repository.gated:
            yield (
                not has_token(),
                f"  gated: accept the licence on {page_of(path)}" + ("" if has_token() else ", then hf auth login"),
            )


def _data(config: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    from conceptseg.targets import instantiate

    dataset = instantiate(config["dataset"], "dataset", config["runtime"]["allow_targets"])
    problems = dataset.problems()
    for problem in problems:
        yield True, problem
    if not problems:
        yield False, f"{dataset.name}: {len(dataset.keys())} samples, nothing missing (fingerprint {dataset.fingerprint()})"
