"""A download that goes on where it broke off, and is given its name only once it is whole. Standard library only."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 20
TIMEOUT_S = 60


class FetchError(Exception):
    """Error with its remedy; the scripts print it without a traceback."""


class Interrupted(FetchError):
    """The transfer ended early; what came is kept and another call goes on from there."""


def fetch(url: str, to: Path, tries: int = 5, pause_s: float = 2.0, check: Callable[[Path], None] | None = None) -> Path:
    """Download `url` to `to` by way of `to`.partial; `check` raises FetchError on a wrong file, which is kept as `to`.bad."""
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(to.name + ".partial")
    for attempt in range(1, tries + 1):
        try:
            _continue(url, partial)
            break
        except Interrupted as error:
            if attempt == tries:
                raise
            say(f"{error} Try {attempt + 1} of {tries}.")
            time.sleep(pause_s * attempt)
    if check is not None:
        try:
            check(partial)
        except FetchError as error:
            bad = to.with_name(to.name + ".bad")
            os.replace(partial, bad)
            _tag(partial).unlink(missing_ok=True)
            raise FetchError(f"{error}\n  It is kept as {bad}. Run the script again, or give another --url.") from error
    os.replace(partial, to)
    _tag(partial).unlink(missing_ok=True)
    return to


def digest_of(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tag(partial: Path) -> Path:
    """Beside the partial file: which version of the file on the server it is a part of."""
    return partial.with_name(partial.name + ".etag")


def _continue(url: str, partial: Path) -> None:
    """One request for what is still lacking, appended to `partial`."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "conceptseg-fetch", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if _tag(partial).exists():  # a file that changed on the server comes whole, and is not glued to the old part
            request.add_header("If-Range", _tag(partial).read_text())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            if answer.status == 206:
                spans = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
                if spans is None or int(spans[1]) != have:
                    raise FetchError(
                        f"{url} answered with the wrong part ({answer.headers.get('Content-Range')}, bytes from {have} were "
                        f"asked for).\n  Delete {partial} and run the script again."
                    )
                total: int | None = int(spans[2])
                say(f"Going on at {have:,} of {total:,} bytes: {url}")
            else:
                length = answer.headers.get("Content-Length")
                total = int(length) if length is not None else None
                say(f"{'The server does not continue; starting again' if have else 'Fetching'}: {url} ({total or '?'} bytes)")
                have = 0
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            if tag and not tag.startswith("W/"):
                _tag(partial).write_text(tag)
            else:
                _tag(partial).unlink(missing_ok=True)
            have = _append(answer, partial, have, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range", "") == f"bytes */{have}":
            return  # everything was there already
        if error.code == 416:
            partial.unlink()
            raise Interrupted(f"{url} is shorter than the {have:,} bytes that were there; they are deleted.") from error
        if error.code in (408, 429) or error.code >= 500:
            raise Interrupted(f"{url} answered {error.code} {error.reason}.") from error
        raise FetchError(f"{url} answered {error.code} {error.reason}.\n  Give another address with --url.") from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        have = partial.stat().st_size if partial.exists() else 0
        reason = getattr(error, "reason", None) or error
        raise Interrupted(f"{url} broke off at {have:,} bytes ({reason}). Run the script again to go on.") from error
    if total is not None and have != total:
        raise Interrupted(f"{url} broke off at {have:,} of {total:,} bytes. Run the script again to go on.")


def _append(answer: http.client.HTTPResponse, partial: Path, have: int, total: int | None) -> int:
    """Returns the size reached; reports every 5 %."""
    shown = have
    with partial.open("ab" if have else "wb") as file:
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            if total and have - shown >= total / 20:
                shown = have
                say(f"  {have:,} of {total:,} bytes ({100 * have // total} %)")
    return have
