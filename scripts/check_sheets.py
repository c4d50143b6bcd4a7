"""Ask a hub for the repository, commit and files of every sheet of conf/backbone, and print what is no longer as a sheet says.

    python scripts/check_sheets.py                              every sheet
    python scripts/check_sheets.py sd2 flux_schnell             some of them
    python scripts/check_sheets.py sd2 --against FOLDER         and whether FOLDER holds the same files, by sha256

HF_ENDPOINT names another hub or mirror. Exits with 1 if a sheet is wrong or a repository can't be asked. Downloads nothing.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from conceptseg.backbones.repositories import NOT_READ, READ, repository_of
from conceptseg.errors import ConceptSegError, did_you_mean, guarded

SHEETS = Path(__file__).resolve().parent.parent / "conf" / "backbone"
TOLERANCE = 0.05
"""Share by which a size may differ from the sheet's."""


def sheets(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> settings of the sheets that name a hub repository."""
    found = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}
    return {n: s for n, s in found.items() if "hub" in s}


def is_read(name: str, wanted: tuple[str, ...]) -> bool:
    """Whether a file of a repository is one of those that are read."""
    if name in wanted:
        return True
    return (
        name.partition("/")[0] in wanted
        and any(fnmatch(name, pattern) for pattern in READ)
        and not any(fnmatch(name, pattern) for pattern in NOT_READ)
    )


def bare(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def changes(settings: Mapping[str, Any], api: Any) -> Iterator[str]:
    """Yield the differences between a hub and a sheet, one line each."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    path, revision, known = settings["path"], settings["revision"], repository_of(settings)
    try:
        info = api.model_info(path, revision=revision, files_metadata=True, timeout=30)
    except RevisionNotFoundError:
        yield f"commit: {path} has no {revision}"
        return
    except RepositoryNotFoundError:
        yield f"repository: {path} is not there, or private"
        return
    if info.id != path:
        yield f"repository: {path} is now {info.id}"
    if revision == "main":
        yield f"commit: main is {info.sha}; the sheet can be pinned to it"
    if bool(info.gated) != known.gated:
        yield f"gated: {info.gated}; the sheet says {known.gated}"
    card = info.card_data.to_dict() if info.card_data else {}
    licence = str(card.get("license_name") or card.get("license") or "")
    mine = bare(str(settings.get("licence") or ""))
    if licence and licence != "other" and not (mine and (bare(licence) in mine or mine in bare(licence))):
        yield f"licence: {licence}; the sheet says {settings.get('licence')}"
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
    for name in known.files:
        if name not in sizes and not any(file.startswith(f"{name}/") for file in sizes):
            yield f"files: no {name} at {revision}"
    total = sum(size for file, size in sizes.items() if is_read(file, tuple(known.files))) / 1e9
    if known.download is None or abs(total - known.download) > TOLERANCE * max(total, known.download):
        yield f"download: {total:.4g} GB; the sheet says {known.download}"
    for name, digest in (known.digests or {}).items():
        theirs = digests_of(info).get(name)
        if theirs != digest:
            yield f"digest: {name} is {theirs or 'not there'}; in {known.mirror_of} it was {digest}"


def digests_of(info: Any) -> dict[str, str]:
    """File -> sha256, of the large files of a repository, which a hub knows by it."""
    return {one.rfilename: one.lfs.sha256 for one in info.siblings or () if one.lfs}


def compared(settings: Mapping[str, Any], api: Any, folder: Path) -> Iterator[tuple[bool, str]]:
    """(whether they differ, line) of each large file of a repository that is read, against the file of that name in a folder."""
    info = api.model_info(settings["path"], revision=settings["revision"], files_metadata=True, timeout=30)
    wanted = tuple(repository_of(settings).files)
    for name, theirs in digests_of(info).items():
        if not is_read(name, wanted):
            continue
        if not (folder / name).is_file():
            yield True, f"{name}: not in {folder}"
            continue
        with (folder / name).open("rb") as file:
            mine = hashlib.file_digest(file, "sha256").hexdigest()
        yield mine != theirs, f"{name}: {'equal' if mine == theirs else f'different, {mine} against {theirs}'}"


@guarded
def main() -> int:
    """Check the sheets that are named, or all of them."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import ENDPOINT

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SHEET")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="files to compare one sheet's repository with")
    parser.add_argument("--sheets", type=Path, default=SHEETS, metavar="FOLDER", help="where the sheets lie")
    parser.add_argument("--endpoint", default=ENDPOINT, help="the hub; HF_ENDPOINT sets it as well")
    asked = parser.parse_args()
    offered, api, wrong = sheets(asked.sheets), HfApi(endpoint=asked.endpoint), 0
    for name in asked.names or offered:
        if name not in offered:
            raise ConceptSegError(f'no sheet "{name}" of a hub repository. {did_you_mean(name, offered)}')
        try:
            said = list(changes(offered[name], api))
            same = list(compared(offered[name], api, asked.against)) if asked.against else []
        except Exception as error:  # the hub's client's and its HTTP client's
            said, same = [f"could not be asked: {(str(error).strip() or type(error).__name__).splitlines()[0]}"], []
        wrong += bool(said) or any(differs for differs, _ in same)
        for line in said or ["as the sheet says"]:
            print(f"{name}: {line}")
        for _, line in same:
            print(f"{name}: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    main()
