"""Fetches PascalVOC 2012 (2 GB), checks it against its published MD5 and unpacks it.

    python scripts/fetch_voc.py --to data              # -> data/VOCdevkit, for dataset.root=data/VOCdevkit
    python scripts/fetch_voc.py --to data --keep-tar   # -> data/VOCtrainval_11-May-2012.tar, which is read as it is

Run it again after an interruption: it goes on where it broke off.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from fetch_resumable import FetchError, digest_of, fetch, say

URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
NAME = "VOCtrainval_11-May-2012.tar"
MD5 = "6cd6e144f989b92b3379bac3b3de84fd"


def fetch_voc(to: Path, url: str = URL, md5: str = MD5, keep_tar: bool = False, tries: int = 5, pause_s: float = 2.0) -> Path:
    """Returns what to set dataset.root to."""
    archive, kit = to / NAME, to / "VOCdevkit"
    if (kit / "VOC2012").is_dir() and not keep_tar:
        say(f"{kit} is there already.")
        return kit

    def check(path: Path) -> None:
        say("Checking the MD5 ...")
        if (got := digest_of(path, "md5")) != md5:
            raise FetchError(f"The archive has the MD5 {got}; {md5} was wanted ({path.stat().st_size:,} bytes came).")

    if archive.exists():
        try:
            check(archive)
        except FetchError as error:
            raise FetchError(f"{archive}: {error}\n  Delete it and run the script again.") from error
    else:
        fetch(url, archive, tries, pause_s, check)
    if keep_tar:
        return archive
    unpack(archive, kit)
    archive.unlink()
    return kit


def unpack(archive: Path, kit: Path) -> None:
    """Into a folder of another name first, so that a half-unpacked VOC2012 can't be taken for a whole one."""
    half = kit.with_name(kit.name + ".partial")
    shutil.rmtree(half, ignore_errors=True)
    say(f"Unpacking {archive} ...")
    try:
        with tarfile.open(archive, "r:") as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", None)  # 3.11.0 to 3.11.3 have none
            packed.extractall(half)
    except (tarfile.TarError, OSError) as error:
        raise FetchError(f"{archive} can't be unpacked: {error}.\n  Is the disk full? --keep-tar needs no unpacking.") from error
    kit.mkdir(exist_ok=True)  # it may hold another year
    (half / "VOCdevkit" / "VOC2012").rename(kit / "VOC2012")
    shutil.rmtree(half)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("data"), help="folder to write to (default: data)")
    parser.add_argument("--url", default=URL, help="another copy of the same archive; the MD5 must still fit")
    parser.add_argument("--keep-tar", action="store_true", help="keep the archive and do not unpack it")
    parser.add_argument("--tries", type=int, default=5, help="requests before giving up (default: 5)")
    chosen = parser.parse_args(arguments)
    try:
        root = fetch_voc(chosen.to, chosen.url, keep_tar=chosen.keep_tar, tries=chosen.tries)
    except FetchError as error:
        say(f"fetch_voc: {error}")
        return 1
    print(f"dataset=pascal_voc dataset.root={root}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
