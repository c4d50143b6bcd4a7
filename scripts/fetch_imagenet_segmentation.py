"""Fetches gtsegs_ijcv.mat (ImageNet-Segmentation) and checks that it is a whole HDF5 file.

    python scripts/fetch_imagenet_segmentation.py --to data   # -> data/gtsegs_ijcv.mat, for dataset.root=data/gtsegs_ijcv.mat

No checksum is published for this file. The first fetch writes its SHA-256 beside it; every later call holds the file
against that, and --sha256 holds it against one that you know. No licence was found with the file: do not pass it on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fetch_resumable import FetchError, digest_of, fetch, say

URL = "http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat"
NAME = "gtsegs_ijcv.mat"
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def fetch_imagenet_segmentation(
    to: Path, url: str = URL, sha256: str | None = None, tries: int = 5, pause_s: float = 2.0
) -> Path:
    """Returns what to set dataset.root to."""
    path = to / NAME
    record = path.with_name(path.name + ".sha256")
    wanted = sha256 or (record.read_text().split()[0] if record.exists() and record.read_text().strip() else None)

    def check(came: Path) -> None:
        check_hdf5(came)
        if wanted is not None and (got := digest_of(came, "sha256")) != wanted:
            source = "--sha256" if sha256 else str(record)
            raise FetchError(f"{came} has the SHA-256 {got}; {wanted} was wanted ({source}).")

    if path.exists():
        say(f"{path} is there already; checking it ...")
        try:
            check(path)
        except FetchError as error:
            raise FetchError(f"{error}\n  Delete it and run the script again.") from error
    else:
        fetch(url, path, tries, pause_s, check)
    if not record.exists():
        record.write_text(f"{digest_of(path, 'sha256')}  {path.name}\n")  # as sha256sum writes and reads it
        say(f"Recorded in {record}: {record.read_text().split()[0]}")
    return path


def check_hdf5(path: Path) -> None:
    """The signature (at 0, 512, 1024, ...; MATLAB puts it at 512), and the end of file that the superblock states."""
    size = path.stat().st_size
    with path.open("rb") as file:
        place = 0
        while place + 96 <= size:
            file.seek(place)
            block = file.read(96)
            if block.startswith(SIGNATURE):
                end = _stated_end(block)
                if end is not None and end > size:
                    raise FetchError(f"{path} is cut short: {size:,} of {end:,} bytes.")
                return
            place = place * 2 or 512
        file.seek(0)
        head = file.read(60)
    raise FetchError(f"{path} ({size:,} bytes) is not an HDF5 file; it begins with {head!r}.")


def _stated_end(block: bytes) -> int | None:
    """End-of-file address of a superblock with 8-byte addresses; None for another kind."""
    version = block[8]
    if version in (0, 1) and block[13] == 8:
        start = 40 if version == 0 else 44
    elif version in (2, 3) and block[9] == 8:
        start = 28
    else:
        return None
    return int.from_bytes(block[start : start + 8], "little")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to write to (default: data)")
    parser.add_argument("--url", default=URL, help="another copy of the same file")
    parser.add_argument("--sha256", help="the checksum that the file must have")
    parser.add_argument("--tries", type=int, default=5, help="requests before giving up (default: 5)")
    chosen = parser.parse_args(arguments)
    try:
        root = fetch_imagenet_segmentation(chosen.to, chosen.url, chosen.sha256, chosen.tries)
    except FetchError as error:
        say(f"fetch_imagenet_segmentation: {error}")
        return 1
    print(f"dataset=imagenet_segmentation dataset.root={root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
