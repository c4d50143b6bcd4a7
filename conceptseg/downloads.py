"""Read a file behind an address, whole and within a size limit: https, http, or hf:// for a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from conceptseg.errors import DataError

SECONDS = 30
_WEB = re.compile(r"^https?://", re.IGNORECASE)
_HUB = re.compile(r"^hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)$")
_KINDS = {None: None, "datasets": "dataset", "spaces": "space"}


def is_address(text: str) -> bool:
    """Whether a text is an address that `read_address` takes."""
    return bool(_WEB.match(text)) or text.lower().startswith("hf://")


def read_address(address: str, largest: int) -> bytes:
    """The bytes behind an address, at most `largest` of them.

    address: https://... or http://..., or hf://[datasets/]owner/name[@revision]/path, as huggingface_hub writes it; a revision
    with a slash is written with %2F. Raises DataError for what can't be had and for more bytes than that.
    """
    return _of_the_web(address, largest) if _WEB.match(address) else _of_the_hub(address, largest)


def _of_the_web(address: str, largest: int) -> bytes:
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(address, headers={"User-Agent": "conceptseg"}), timeout=SECONDS) as answer:
            if not _WEB.match(answer.geturl()):
                raise DataError(f"{address} leads to {answer.geturl()}; only http and https are read.")
            content: bytes = answer.read(largest + 1)
    except (URLError, OSError, ValueError) as error:
        raise DataError(f"{address} can't be downloaded: {error}.\n  Download it yourself and give the file.") from error
    if len(content) > largest:
        raise _too_large(address, largest)
    return content


def _of_the_hub(address: str, largest: int) -> bytes:
    from urllib.parse import unquote

    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    found = _HUB.match(address)
    if found is None:
        raise DataError(
            f"{address} is no address of a file on the hub; wanted hf://owner/name/path or "
            f"hf://datasets/owner/name@revision/path."
        )
    kind, repository, revision, path = found.groups()
    kind, commit = _KINDS[kind], unquote(revision) if revision else None
    try:
        size = get_hf_file_metadata(hf_hub_url(repository, path, repo_type=kind, revision=commit), timeout=SECONDS).size
        if size is not None and size > largest:
            raise _too_large(address, largest)
        content = Path(hf_hub_download(repository, path, repo_type=kind, revision=commit)).read_bytes()
    except (OSError, ValueError, HFValidationError) as error:  # the hub's own errors are OSErrors
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"{address} can't be downloaded: {said}\n  Look at the owner, the name, the revision and the path; a private "
            f"repository needs a token (huggingface-cli login)."
        ) from error
    if len(content) > largest:
        raise _too_large(address, largest)
    return content


def _too_large(address: str, largest: int) -> DataError:
    return DataError(f"{address} has more than {largest:,} bytes.\n  Download it yourself, see what it is, and make it smaller.")
