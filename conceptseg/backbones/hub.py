"""The hub as its client leaves it: pages, cache and token; causes of what failed; and whether what came is what was promised.

diffusers and transformers wrap the client's errors in their own, whose first line often names another cause: a gated repository
becomes "not a valid model identifier". The client's error is still in the chain, and is what is read here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from conceptseg.backbones.sheet_files import sheet_of

log = logging.getLogger(__name__)

_TRANSPORT = {"TransportError", "ConnectionError", "Timeout", "ConnectTimeout", "ReadTimeout"}
"""Base classes of lost connections: of httpx, httpx2, requests and Python."""
_CUT = "Consistency check failed"
"""How the client begins where a file has another size than the hub says."""
_FILE = re.compile(r"/resolve/[^/]+/([^\s?]+)")


def hub_cause(error: BaseException, path: str, revision: str | None) -> str | None:
    """The cause of a failed read of a hub repository and its remedy, in two lines; None where the hub had no part in it."""
    found = _cause(error, path, revision)
    return None if found is None else found[0]


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a lost connection, a hub out of order, too many requests."""
    found = _cause(error, "", None)
    return found is not None and found[1]


def page_of(path: str) -> str:
    """A repository's page on the hub."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{path}"


def cache_folder() -> Path:
    """Where the hub's client keeps what it downloads."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(path: str) -> Path:
    """Where the cache keeps a repository: its blobs, and for each commit a folder of links to them."""
    return cache_folder() / f"models--{path.replace('/', '--')}"


def size_in_words(download: float | None) -> str:
    """How much is downloaded at most. download: GB."""
    return "a download of unknown size" if download is None else f"up to {download:g} GB"


@lru_cache(256)
def announce_download(path: str, commit: str | None) -> None:
    """Say once a process how much is about to be downloaded of a repository that the cache lacks, as far as its sheet knows."""
    about = (sheet_of(path) or {}).get("hub") or {}
    if not is_offline() and lacking_files(path, commit, about.get("files") or ()):
        size = size_in_words(about.get("download"))
        log.warning("%s is not whole on this machine. Fetching it, %s to %s", path, size, cache_folder())


def lacking_files(path: str, commit: str | None, files: Sequence[str] = (), unread: Sequence[str] = ()) -> list[str]:
    """Which files and folders of a commit the cache lacks; shards that an index names count. Asks nobody.

    files: those that are read; empty for all that is there. unread: beginnings of names of tensors that are not read; a shard of
    those alone is not lacking.
    """
    folder = repository_folder(path) / "snapshots" / (commit or "none")
    if not folder.is_dir():
        return [*files] or [path]
    if not files and not any(folder.rglob("*.safetensors*")):
        return [path]
    lacking = [name for name in files if not _is_there(folder / name)]
    for index in sorted(folder.rglob("*.safetensors.index.json")):
        if files and index.relative_to(folder).parts[0] not in files:
            continue
        needed, _ = shards_of(index, unread)
        lacking += sorted(
            (index.parent / shard).relative_to(folder).as_posix() for shard in needed if not (index.parent / shard).exists()
        )
    return lacking


def _is_there(path: Path) -> bool:
    if not path.is_dir():
        return path.is_file()
    held = [file.name for file in path.iterdir() if file.exists()]
    weighs = "config.json" in held  # a model's folder; tokenizers and schedulers have other configs
    return any(name.endswith((".safetensors", ".safetensors.index.json")) for name in held) if weighs else bool(held)


def shards_of(index: Path, unread: Sequence[str]) -> tuple[set[str], set[str]]:
    """Files that an index names: those with a tensor that is read, and all."""
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {file for name, file in places.items() if not name.startswith(tuple(unread))}, set(places.values())


def drop_damaged(path: str, since: float) -> list[str]:
    """Delete the files of a repository that came with another checksum than the hub stated; their names.

    The client names a blob by the hub's checksum (sha256 of large files, git's sha1 of others), and compares nothing but its
    size. since: seconds since the epoch; only files written from then on are read, by file systems' coarser clocks.
    """
    folder = repository_folder(path)
    damaged = {
        blob for blob in (folder / "blobs").glob("*")
        if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob.name) and blob.stat().st_mtime > since - 2 and not _is_whole(blob)
    }  # fmt: skip
    links = [link for link in (folder / "snapshots").rglob("*") if link.is_symlink() and link.resolve() in damaged]
    for one in (*links, *damaged):
        one.unlink(missing_ok=True)
    return sorted("/".join(link.relative_to(folder).parts[2:]) for link in links)


def _is_whole(blob: Path) -> bool:
    with blob.open("rb") as file:
        if len(blob.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name


def damage(names: Sequence[str], path: str) -> str:
    """The message about files that `drop_damaged` deleted."""
    return (
        f"{', '.join(names)} came with another checksum than {page_of(path)} states, and was deleted.\n  Run the same command "
        f"again; if that changes nothing, the proxy or mirror (HF_ENDPOINT) gives other files."
    )


def has_token() -> bool:
    """Whether the hub's client finds a token. It is never shown."""
    from huggingface_hub import get_token

    return bool(get_token())


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the hub's client every request."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and all that were being handled when it was raised, the latest first."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and one not in found:
            found.append(one)
            waiting += [one.__cause__, one.__context__]
    return found


def _cause(error: BaseException, path: str, revision: str | None) -> tuple[str, bool] | None:
    """(cause with remedy, whether it may pass). Of several errors in the chain the most telling decides, not the latest."""
    from huggingface_hub import errors

    chain, page = chain_of(error), page_of(path)

    def first(matches: Callable[[BaseException], bool]) -> Any:
        return next((one for one in chain if matches(one)), None)

    def of(name: str) -> Any:
        kind = getattr(errors, name, None)  # older clients lack some
        return None if kind is None else first(lambda one: isinstance(one, kind))

    if of("GatedRepoError") is not None:
        if has_token():
            return (
                f"it is gated, and the account of the token that was shown has no access to it.\n  Accept its licence on {page} "
                f"with that account (hf auth whoami names it), or log in with another: hf auth login"
            ), False
        return f"it is gated, and no token was shown.\n  Accept its licence on {page}, then: hf auth login", False
    if of("DisabledRepoError") is not None:
        return f"the hub has disabled it.\n  See {page}, and name another repository or a folder as path.", False
    if of("RevisionNotFoundError") is not None:
        return (
            f"it has no commit {revision}.\n  Its commits are listed on {page}/commits/main: set extractor.backbone.revision to "
            f"one of them."
        ), False
    if of("RepositoryNotFoundError") is not None:
        if has_token():
            return (
                f"no such repository, or a private one that the token that was shown may not read.\n  Look at {page}; log in "
                f"with an account that may read it: hf auth login"
            ), False
        return f"no such repository, or a private one.\n  Look at {page}; for a private one: hf auth login", False
    status = first(lambda one: _status(one) is not None and _status(one) not in (404, 416))
    if status is not None:
        return _by_status(_status(status) or 0, page)
    full = first(lambda one: isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT))
    if full is not None:
        return (
            f"no space is left for it in {cache_folder()}.\n  Free some, or name a folder on another disk by HF_HOME, and run "
            f"the same command again: files that came whole are kept."
        ), False
    denied = first(lambda one: isinstance(one, PermissionError) or (isinstance(one, OSError) and one.errno == errno.EROFS))
    if denied is not None and str(denied.filename or "").startswith(str(cache_folder())):
        return f"{denied.filename} can't be written.\n  Name a folder that can be by HF_HOME.", False
    if of("OfflineModeIsEnabled") is not None or (is_offline() and of("LocalEntryNotFoundError") is not None):
        return (
            f"HF_HUB_OFFLINE is set, and not every file that is read is in {cache_folder()}.\n  Unset it to download {page}; "
            f"HF_HOME names another cache, and path= a folder with the files."
        ), False
    cut = first(lambda one: isinstance(one, OSError) and str(one).startswith(_CUT))
    lost = first(lambda one: any(kind.__name__ in _TRANSPORT for kind in type(one).__mro__))
    if cut is not None or lost is not None:
        said = _first_line(cut if lost is None else lost)
        reached = not any(kind.__name__ == "ConnectError" for one in chain for kind in type(one).__mro__)
        return (
            f"the connection to {page} can't be made, or was lost ({said}).\n  Look at the network and the proxy (HTTPS_PROXY), "
            f"or name a mirror by HF_ENDPOINT, and run the same command again: files that came whole are kept."
        ), reached  # the client has tried often enough to connect
    metadata = of("FileMetadataError")
    if metadata is not None:
        return (
            f"{page} does not answer as a hub does ({_first_line(metadata)}).\n  Look at HF_ENDPOINT, the proxy and the firewall."
        ), False
    absent = of("RemoteEntryNotFoundError") or first(lambda one: _status(one) == 404)
    if absent is not None:
        named = _FILE.search(str(absent))
        file = named.group(1).rstrip(".") if named else "such file"
        return (
            f"there is no {file} at {revision}.\n  See {page}/tree/{revision or 'main'}, and compare the sheet with the hub: "
            f"scripts/check_sheets.py."
        ), False
    if of("LocalEntryNotFoundError") is not None or of("RevisionResolutionError") is not None:
        return (
            f"it is not in {cache_folder()}, and {page} could not be asked.\n  Look at the network and the proxy (HTTPS_PROXY), "
            f"or name a mirror by HF_ENDPOINT."
        ), True
    return None


def _by_status(status: int, page: str) -> tuple[str, bool]:
    if status == 429:
        return (
            f"the hub was asked too often (429) for {page}.\n  Wait some minutes and run the same command again; with a token "
            f"more is allowed: hf auth login"
        ), True
    if status >= 500:
        return f"the hub is out of order ({status} for {page}).\n  Run the same command again later.", True
    if status == 401:
        return f"the hub refuses the token that was shown for {page} (401).\n  Log in anew: hf auth login", False
    return f"the hub refuses {page} ({status}).\n  Look at that page, at HF_ENDPOINT and at the token: hf auth whoami", False


def _status(error: BaseException) -> int | None:
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
