"""Hub repositories that sheets name: what is known of each, which of its files are here, and how they are fetched."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from conceptseg.backbones.base import Checkpoint, cached_commit
from conceptseg.backbones.hub import (
    cache_folder,
    damage,
    drop_damaged,
    hub_cause,
    is_transient,
    lacking_files,
    page_of,
    shards_of,
    size_in_words,
)
from conceptseg.errors import ConfigError, did_you_mean

READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
"""Names of files that loaders read."""
NOT_READ = ("*.fp16*", "*.bf16*", "*.non_ema*", "*onnx*", "*openvino*", "*flax*")
"""Names among them of other precisions and other runtimes."""
UNREAD_ENCODING = ("single_transformer_blocks.", "norm_out.", "proj_out.")
"""Beginnings of names of tensors that `transformers.encode_only` leaves out, whichever layer is read last."""
PAUSES = (5, 20)
"""Seconds before a download that may pass is tried again."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Repository:
    """Facts under `hub` in a sheet of conf/backbone. None and empty mean unknown."""

    gated: bool | None = None
    """Whether its licence has to be accepted on its page, and a token shown."""
    download: float | None = None
    """GB (10^9 bytes) of `files`."""
    size_from: str = ""
    """Where `download` is from."""
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Part -> its parameters in billions: model, transformer, unet, text, vae."""
    files: Sequence[str] = ()
    """Files and folders that are read."""
    pinned: str = ""
    """Where the commit is from, and when it was seen there."""
    mirror_of: str = ""
    """Repository@commit of which this one is a copy by somebody else."""
    digests: Mapping[str, str] | None = None
    """File -> sha256 in the repository that this one is a copy of."""


def repository_of(settings: Mapping[str, Any]) -> Repository:
    """Return the facts about a backbone's repository from its settings. Raises ConfigError for an unknown key under `hub`."""
    said = dict(settings.get("hub") or {})
    known = [one.name for one in fields(Repository)]
    if unknown := sorted(said.keys() - known):
        raise ConfigError(f"hub.{unknown[0]} of {settings.get('path')}: no such key. {did_you_mean(unknown[0], known)}")
    return Repository(**said)


def free_bytes(folder: Path) -> int:
    """Bytes free where a folder lies, or will lie."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def missing_files(checkpoint: Checkpoint, files: Sequence[str] = (), unread: Sequence[str] = ()) -> list[str]:
    """Which of the files and folders of a hub repository the cache lacks; shards that an index names count. Downloads nothing.

    files: those that are read; empty for all that is there. unread: as in `fetch`. Raises ConfigError for a path that is neither
    folder nor repository.
    """
    if checkpoint.folder() is not None:
        return []
    return lacking_files(checkpoint.path, cached_commit(checkpoint.path, checkpoint.revision), files, unread)


def fetch(checkpoint: Checkpoint, repository: Repository, unread: Sequence[str] = ()) -> None:
    """Download the files that are read, those that the cache lacks, and compare what came with the hub's checksums.

    unread: beginnings of tensor names that are not read: a shard that holds no others stays where it is. What may pass, a lost
    connection or a hub out of order, is tried again after each of PAUSES. Raises ConfigError with the cause and the remedy.
    """
    path, revision = checkpoint.path, checkpoint.source()["revision"]
    at = Checkpoint(path, revision)
    trying, since = f"downloading {path} to {cache_folder()} failed", time.time()
    for pause in (*PAUSES, None):
        try:
            _download(path, str(checkpoint.revision), repository, unread)  # a branch's name is kept with its commit
            if lacking := missing_files(at, repository.files, unread):
                _ask(path, revision)  # the client is content with what the cache has where the hub does not answer
            break
        except Exception as error:  # its HTTP client's, the disk's, a lost connection
            if pause is not None and is_transient(error):
                log.warning("%s: trying again in %d s", trying, pause)
                time.sleep(pause)
                continue
            cause = hub_cause(error, path, revision) or (
                f"{(str(error).strip() or type(error).__name__).splitlines()[0]}\n  Files that came whole are kept. Look at the "
                f"network and the free disk, and run the same command again."
            )
            drop_damaged(path, since)
            raise ConfigError(f"{trying}: {cause}") from error
    if damaged := drop_damaged(path, since):
        raise ConfigError(f"{trying}: {damage(damaged, path)}")
    if lacking:
        raise ConfigError(
            f"{trying}: there is no {', '.join(lacking)} at {revision}.\n  See {page_of(path)}/tree/{revision}, and compare the "
            f"sheet with the hub: scripts/check_sheets.py."
        )


def _download(path: str, revision: str, repository: Repository, unread: Sequence[str]) -> None:
    from huggingface_hub import snapshot_download

    wanted = [pattern for name in repository.files for pattern in _patterns(name)] or [*READ]
    ignored = [*NOT_READ]
    if unread:
        indices = [pattern for pattern in wanted if pattern.endswith(".json")]
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=indices, ignore_patterns=ignored))
        for index in folder.rglob("*.safetensors.index.json"):
            needed, shards = shards_of(index, unread)
            ignored += [(index.parent / shard).relative_to(folder).as_posix() for shard in shards - needed]
    snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=ignored)


def _ask(path: str, revision: str | None) -> None:
    """Raises the client's error where the hub does not answer for a repository."""
    from huggingface_hub import HfApi

    HfApi().model_info(path, revision=revision, timeout=10)


def size_of(repository: Repository) -> str:
    """How much is downloaded of a repository at most, in words."""
    return size_in_words(repository.download)


def unread_of(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Beginnings of names of tensors that a backbone with these settings never reads."""
    return UNREAD_ENCODING if settings.get("load") == "encode_only" else ()


def _patterns(name: str) -> list[str]:
    return [name] if "." in name else [f"{name}/{pattern}" for pattern in READ]
