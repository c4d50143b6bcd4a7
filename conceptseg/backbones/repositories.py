"""Hub repositories that sheets name: what is known of each, which of its files are here, and how they are fetched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from conceptseg.backbones.base import Checkpoint, cached_commit
from conceptseg.errors import ConfigError, did_you_mean

READ = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
"""Names of files that loaders read."""
NOT_READ = ("*.fp16*", "*.bf16*", "*.non_ema*", "*onnx*", "*openvino*", "*flax*")
"""Names among them of other precisions and other runtimes."""


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


def cache_folder() -> Path:
    """Where the hub's client keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def free_bytes(folder: Path) -> int:
    """Bytes free where a folder lies, or will lie."""
    at = folder.absolute()
    while not at.exists():
        at = at.parent
    return shutil.disk_usage(at).free


def missing_files(checkpoint: Checkpoint, files: Sequence[str] = ()) -> list[str]:
    """Which of the files and folders of a hub repository the cache lacks; shards that an index names count. Downloads nothing.

    files: those that are read; empty for all that is there. Raises ConfigError for a path that is neither folder nor repository.
    """
    if checkpoint.folder() is not None:
        return []
    commit = cached_commit(checkpoint.path, checkpoint.revision)
    folder = cache_folder() / f"models--{checkpoint.path.replace('/', '--')}" / "snapshots" / (commit or "none")
    if not folder.is_dir():
        return [*files] or [checkpoint.path]
    lacking = [name for name in files if not _is_there(folder / name)]
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        if files and index.relative_to(folder).parts[0] not in files:
            continue
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lacking += sorted(
            (index.parent / shard).relative_to(folder).as_posix() for shard in shards if not (index.parent / shard).exists()
        )
    return lacking


def _is_there(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file()
    held = [file.name for file in path.iterdir() if file.exists()]
    weighs = "config.json" in held  # a model's folder; tokenizers and schedulers have other configs
    return any(name.endswith((".safetensors", ".safetensors.index.json")) for name in held) if weighs else bool(held)


def page_of(path: str) -> str:
    """A repository's page on the hub."""
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{path}"


def has_token() -> bool:
    """Whether the hub's client finds a token. It is never shown."""
    from huggingface_hub import get_token

    return bool(get_token())


def fetch(checkpoint: Checkpoint, repository: Repository) -> None:
    """Download the files that are read, those that the cache lacks. Raises ConfigError with the cause and the remedy."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    source = checkpoint.source()
    path, revision = source["pretrained_model_name_or_path"], source["revision"]
    wanted = [pattern for name in repository.files for pattern in _patterns(name)] or [*READ]
    try:
        snapshot_download(path, revision=revision, allow_patterns=wanted, ignore_patterns=[*NOT_READ])
    except GatedRepoError as error:
        raise ConfigError(
            f"downloading {path}: its licence has to be accepted on {page_of(path)}, and a token shown. Accept it there, then: "
            "hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"downloading {path}: it has no commit {revision}. See {page_of(path)}/commits/main and set "
            "extractor.backbone.revision."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"downloading {path}: no such repository, or a private one. Look at {page_of(path)}; for a private one: hf auth login"
        ) from error
    except Exception as error:  # its HTTP client's, the disk's, a lost connection: what came is kept and is not fetched again
        raise ConfigError(
            f"downloading {path} to {cache_folder()} failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}\n"
            "  What came is kept. Look at the network, HF_HUB_OFFLINE and the free disk, and run the same command again."
        ) from error
    if lacking := missing_files(checkpoint, repository.files):
        raise ConfigError(
            f"downloading {path}: the hub has no {', '.join(lacking)} at {revision}. Run scripts/check_sheets.py, which compares "
            "every sheet with the hub."
        )


def _patterns(name: str) -> list[str]:
    return [name] if "." in name else [f"{name}/{pattern}" for pattern in READ]
