"""Common parts of backbones: sources of weights, noise that depends on the sample alone, and image sizes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from conceptseg.backbones.hub import announce_download, damage, drop_damaged, hub_cause, page_of, repository_folder
from conceptseg.backbones.random_weights import RandomWeights
from conceptseg.data.digests import Extent, content_digests
from conceptseg.errors import ConceptSegError, ConfigError, did_you_mean
from conceptseg.keys import digest
from conceptseg.types import Provenance

log = logging.getLogger(__name__)
for notices in ("diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree"):
    logging.getLogger(notices).setLevel(logging.ERROR)  # of importing torchao, whose checkpoints are not read here

RESIZES = ("nearest", "bilinear", "bicubic")
GREATEST_SIDE = 8192  # pixels that a model may be shown

LOADING_ERRORS = (
    OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError, AssertionError, ArithmeticError,
    SafetensorError,
)  # fmt: skip
"""Errors that loaders raise for invalid configs and weights."""
DENOISERS = ("transformer", "unet")
"""Folders of a pipeline in one of which its denoiser lies."""
COMMIT = re.compile(r"[0-9a-f]{40}")
SHIPPED = "digests.json"
"""File in conceptseg/lab/weights: the digest of each model there."""
FOR_READERS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp4")
"""Endings of files beside weights that no loader reads; card.json and hidden files are left out too."""


class Backbone(ABC):
    """Base of every class that wraps a model. A configuration may name only subclasses of it as a part of an extractor."""

    checkpoint: Checkpoint
    classifies: ClassVar[bool] = False
    """Whether it names one of its own classes, so that deletion and insertion can ask it again."""
    denoises: ClassVar[bool] = False
    """Whether it denoises latents, of images of any size that its tokens tile: see `LatentCheckpoint`."""

    @property
    def provenance(self) -> Provenance:
        """State what is known of its weights."""
        return self.checkpoint.provenance

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that decides its numbers, for the run id: `checkpoint.identity()` and each setting that the model or its
        input depends on. Neither the device nor a local path belongs to it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a model's parts are read from: a hub repository with a pinned revision, a folder, or "lab:<name>"."""

    path: str
    revision: str | None = None
    random: RandomWeights | None = None
    """Which of the weights are drawn anew once they are read; None keeps them."""

    @property
    def provenance(self) -> Provenance:
        """ "weights" for files of a pinned commit on the hub, also where `path` is their folder in the hub's cache; "lab" for
        what ships with the package, by its digest; "local" for every other folder; "random" where weights are drawn anew, or
        the folder's own card says so."""
        if self.random is not None:
            return "random"
        if self.pinned() is not None:
            return "weights"
        if self.digest() in shipped_digests().values():
            return "lab"
        return "random" if (self.card() or {}).get("provenance") == "random" else "local"

    def pinned(self) -> tuple[str, str | None] | None:
        """(repository, commit) of a hub repository; None for a folder that is no snapshot of one in the hub's cache.

        A folder in the cache is what it says it is unless `revision` names another commit.
        """
        folder = self.folder()
        if folder is None:
            return self.path, self.commit()
        from huggingface_hub.constants import HF_HUB_CACHE

        parts = Path(os.path.relpath(folder.resolve(), Path(HF_HUB_CACHE).resolve())).parts
        if len(parts) != 3 or not parts[0].startswith("models--") or parts[1] != "snapshots" or not COMMIT.fullmatch(parts[2]):
            return None
        if self.revision not in (None, parts[2]):
            return None
        return parts[0].removeprefix("models--").replace("--", "/"), parts[2]

    def digest(self) -> str:
        """Of every file of a local folder that a loader may read: names and contents. Raises ConfigError for a repository."""
        folder = self.folder()
        if folder is None:
            raise ConfigError(f'extractor.backbone.path "{self.path}" is a hub repository, which has a commit and no digest.')
        named = [(file.relative_to(folder), file) for file in sorted(folder.rglob("*")) if file.is_file()]
        read = [
            (name.as_posix(), file)
            for name, file in named
            if name.name != "card.json" and name.suffix not in FOR_READERS and not any(p.startswith(".") for p in name.parts)
        ]
        return _folder_digest(folder.absolute(), tuple((name, _state_of(file)) for name, file in read))

    def origin(self) -> dict[str, str | None]:
        """Describe these weights for the manifest: provenance, and repository with commit, or the digest of a folder."""
        pinned = self.pinned()
        repository, revision = pinned or (None, None)
        return {
            "provenance": self.provenance, "repository": repository, "revision": revision,
            "digest": None if pinned else self.digest(),
        }  # fmt: skip

    def folder(self) -> Path | None:
        """The local folder, or None for a hub repository."""
        if self.path.startswith("lab:"):
            name = self.path.removeprefix("lab:")
            shipped = Path(str(resources.files("conceptseg.lab"))) / "weights"
            if not (shipped / name / "card.json").exists():
                names = [p.parent.name for p in shipped.glob("*/card.json")]
                raise ConfigError(
                    f'extractor.backbone.path "{self.path}": no such lab model. {did_you_mean(name, names)} '
                    f"Train one with: conceptseg-lab train {name}"
                )
            return shipped / name
        local = Path(self.path)
        if local.is_dir():
            return local
        if self.path.startswith((".", "/", "~")) or self.path.count("/") != 1:
            raise ConfigError(
                f'extractor.backbone.path "{self.path}": no such folder, and not the name of a hub repository '
                f'(wanted "owner/name", a folder, or "lab:<name>").'
            )
        return None

    def card(self) -> dict[str, Any] | None:
        """card.json of a local folder, if it has one."""
        folder = self.folder()
        if folder is None or not (folder / "card.json").exists():
            return None
        card: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        return card

    def source(self) -> dict[str, Any]:
        """Keywords for `from_pretrained`: the repository or folder, and the revision, which a hub repository must have."""
        folder = self.folder()
        if folder is not None:
            return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}
        if (commit := self.commit()) is None:
            raise ConfigError(
                f'extractor.backbone.revision is empty, but "{self.path}" is a hub repository: pin the '
                f"commit to be read, so that the numbers can be reproduced:\n"
                f"  conceptseg ... extractor.backbone.revision=<40 hex digits>  "
                f"(of a second model extractor.proxy.revision, .judge.revision or .masks.revision)\n"
                f"  To pin it: extractor.backbone.revision=main is resolved to a commit, printed, and kept in the manifest."
            )
        return {"pretrained_model_name_or_path": self.path, "revision": commit}

    def commit(self) -> str | None:
        """The commit that `revision` names; None where it is not set. Raises ConfigError for a branch that can't be resolved."""
        if not self.revision or COMMIT.fullmatch(self.revision):
            return self.revision or None
        return resolved_commit(self.path, self.revision)

    @contextmanager
    def loading(self, part: str) -> Iterator[None]:
        """Turns whatever a loader raises into one message: what was tried, the cause, and the remedy.

        A loader downloads what the hub's cache lacks: its size is said before, and its checksums are compared afterwards.
        """
        folder, pinned, since = self.folder(), self.pinned(), time.time()
        where = folder or f"the hub, {self.path} at {self.revision}"
        tried = f'extractor.backbone.path "{self.path}": reading its {part} from {where} failed'
        if folder is None and pinned is not None:
            announce_download(*pinned)
        try:
            yield
        except ConceptSegError:
            raise
        except Exception as error:
            if folder is None and (damaged := drop_damaged(self.path, since)):
                raise ConfigError(f"{tried}: {damage(damaged, self.path)}") from error
            if folder is None and (cause := hub_cause(error, self.path, self.revision)):
                raise ConfigError(f"{tried}: {cause}") from error
            if not isinstance(error, LOADING_ERRORS):
                raise
            remedy = "Download it first, or use the lab: backbone@extractor.backbone=lab_flux."
            if folder is None:
                remedy = (
                    f"See {page_of(self.path)}/tree/{self.revision}, and compare the sheet with the hub: scripts/check_sheets.py."
                )
            raise ConfigError(
                f"{tried}: {_first_line(error)}\n  Wanted a complete checkpoint in diffusers layout. {remedy}"
            ) from error
        if folder is None and (damaged := drop_damaged(self.path, since)):
            raise ConfigError(f"{tried}: {damage(damaged, self.path)}")

    def identity(self) -> dict[str, Any]:
        """Name these weights in a run id: repository and commit, or the digest of a local folder, wherever it lies."""
        pinned = self.pinned()
        drawn = {} if self.random is None else {"random": self.random.identity()}
        return {**({"files": self.digest()} if pinned is None else {"path": pinned[0], "revision": pinned[1]}), **drawn}

    def drawn(self, model: nn.Module) -> nn.Module:
        """The model that was read, with those weights drawn anew that `random` names. Raises ConfigError."""
        if self.random is not None:
            self.random.draw(model)
        return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@lru_cache(64)
def resolved_commit(repository: str, branch: str) -> str:
    """The commit that a branch or tag of a hub repository stands at: asked of the hub, else as the hub's cache last saw it.

    Logs it once a process. Raises ConfigError where neither knows it.
    """
    from huggingface_hub import HfApi

    found, reason = None, ""
    try:
        found = HfApi().model_info(repository, revision=branch, timeout=10).sha
    except Exception as error:  # also of its HTTP client, whose errors the library hands through
        reason = hub_cause(error, repository, branch) or _first_line(error)
    found = found or cached_commit(repository, branch)
    if found is None:
        raise ConfigError(
            f'extractor.backbone.revision "{branch}" of {repository} could not be resolved to a commit: {reason}\n'
            f"  Or name the commit: extractor.backbone.revision=<40 hex digits>, as listed on {page_of(repository)}/commits/main"
        )
    log.warning(
        "%s: %s is commit %s; extractor.backbone.revision=%s reads the same weights later", repository, branch, found, found
    )
    return found


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit that a revision stood at when the hub's cache last saw it; None if it never did. Asks nobody."""
    if revision is None or COMMIT.fullmatch(revision):
        return revision
    reference = repository_folder(repository) / "refs" / revision
    found = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    return found if COMMIT.fullmatch(found) else None


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint(Checkpoint):
    """Parts in memory under the names that a checkpoint's folders have. No files stand behind it, so nothing is read."""

    parts: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)

    @property
    def provenance(self) -> Provenance:
        """ "local": nothing but the model's name is known."""
        return "local"

    def pinned(self) -> None:
        return None

    def folder(self) -> None:
        return None

    def card(self) -> None:
        return None

    def digest(self) -> str:
        raise ConfigError(f'"{self.path}" is in memory, and a run needs weights that can be had again: name its checkpoint.')

    def source(self) -> dict[str, Any]:
        raise ConfigError(f'"{self.path}" is in memory and lacks a part that is wanted; it has {", ".join(self.parts)}.')

    def identity(self) -> dict[str, Any]:
        """The model's own name: its weights may have been changed since they were read."""
        return {"in_memory": self.path}


def shipped_digests() -> dict[str, str]:
    """Name -> digest of each tiny model that ships with the package."""
    listed = resources.files("conceptseg.lab").joinpath("weights").joinpath(SHIPPED)
    found: dict[str, str] = json.loads(listed.read_text(encoding="utf-8"))
    return found


def _state_of(file: Path) -> tuple[int, ...]:
    state = file.stat()
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


@lru_cache(256)
def _folder_digest(folder: Path, states: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    """Of files by name and content; read again by this process only where one was written since."""
    names = [name for name, _ in states]
    contents = content_digests([Extent(folder / name) for name in names], folder)
    return digest([[name, content] for name, content in zip(names, contents, strict=True)], 16)


def stack_images(
    images: Sequence[Float[np.ndarray, "_ _ 3"]],
    size: tuple[int, int],
    resize: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B 3 h w"]:
    """Stack images of any size, [H W 3] in 0..1 each, at one size. The device also resizes: a host would hold up the model.

    size: (h, w) in pixels. resize: "nearest" takes the pixel at floor(i · H / h), as torch does; "bilinear" and
    "bicubic" are antialiased, and what overshoots is cut back to 0..1. dtype: what they are resized in, float32 or float64.
    """
    resized = []
    for image in images:
        held = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)).to(device, dtype)
        tensor = rearrange(held, "H W c -> 1 c H W")
        if tuple(tensor.shape[-2:]) != size:
            if resize == "nearest":
                tensor = interpolate(tensor, size=size, mode="nearest")
            else:
                tensor = interpolate(tensor, size=size, mode=resize, antialias=True).clamp(0, 1)
        resized.append(tensor[0])
    return torch.stack(resized)


def sample_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable: equal on every machine, unlike hash()."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def sample_noise(shape: Sequence[int], seed: int, keys: Sequence[str], draw: int) -> Float[Tensor, "B *c H W"]:
    """Return standard normal noise [B *shape], float32, that depends on (seed, sample key, draw) and not on batch or rank."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(sample_seed(seed, key, draw))) for key in keys]
    )


def shared_noise(
    shape: Sequence[int], seed: int, draw: int, device: torch.device | str, dtype: torch.dtype
) -> Float[Tensor, "1 ..."]:
    """Return the reference's noise: one for all images, drawn in the model's dtype on its device from seed + draw."""
    generator = torch.Generator(device).manual_seed(seed + draw)
    return torch.randn((1, *shape), generator=generator, device=device, dtype=dtype)


def schedule(steps: int, tokens: int, shifted: bool) -> tuple[float, ...]:
    """Noise levels from 1 to 0 in steps + 1 values; shifted towards noise by the number of image tokens, as Flux-dev does.

    Source: black-forest-labs/flux, src/flux/sampling.py, time_shift and get_lin_function:
    t' = e^mu / (e^mu + 1/t - 1), mu linear through (256, 0.5) and (4096, 1.15).

    >>> [round(t, 6) for t in schedule(4, 4096, shifted=True)]
    [1.0, 0.904531, 0.759511, 0.512844, 0.0]
    """
    levels = torch.linspace(1, 0, steps + 1)
    if shifted:
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        levels = torch.e**mu / (torch.e**mu + (1 / levels - 1))
    return tuple(levels.tolist())
