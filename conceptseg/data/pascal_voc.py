"""PascalVOC segmentation, in the layout of the development kit: a folder, or the published tar as it came.

Photos of a kit are read as stored: VOC's masks are drawn on the stored pixels, and its own reader (MATLAB's imread) knows no EXIF
orientation. A table of `datasets` is read upright, as `datasets` shows it.

Source: Everingham et al., The PASCAL Visual Object Classes Challenge 2012, http://host.robots.ox.ac.uk/pascal/VOC/voc2012/.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from conceptseg.data.digests import Extent, content_digests
from conceptseg.data.hub import HubTable, is_table_folder
from conceptseg.data.images import (
    VOC_LABELS,
    check_mask,
    checked_encoding,
    orientation_note,
    present_labels,
    read_image,
    read_mask,
)
from conceptseg.data.listed import ListedDataset
from conceptseg.data.words import VOC_OFFICIAL, VOC_WORDS
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.reading import LARGEST_FILE, decode_text, read_regular
from conceptseg.types import BACKGROUND, VOID, Sample

YEARS: tuple[str, ...] = ("2007", "2008", "2009", "2010", "2011", "2012")
ARCHIVE = "VOCtrainval_11-May-2012.tar"
REMEDY = "Fetch it with scripts/fetch_voc.py, or set dataset.root to where it lies."
_IMAGES, _MASKS, _LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
_PARTS = (_IMAGES, _MASKS, _LISTS)


class PascalVOC(ListedDataset[str]):
    """The images of one list with their class masks; classes 1..20, 0 background, 255 void.

    `root` is VOCdevkit, its parent, VOC2012 itself, the published .tar, or a local table of `datasets`.
    `words` are those of the released ConceptAttention scripts, for the classes that are in the mask.
    """

    remedy = REMEDY

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        year: str | int = "2012",
        mask_encoding: str = "index",
        limit: int | None = None,
    ) -> None:
        super().__init__(root, limit)
        if str(year) not in YEARS:
            raise ConfigError(f'dataset.year is "{year}". {did_you_mean(str(year), YEARS)}')
        self.split, self.year = split, str(year)
        if not _is_file_name(split):
            raise ConfigError(f'dataset.split is "{split}"; the name of a list was wanted, such as val.')
        self.mask_encoding = checked_encoding(mask_encoding)
        self.name = f"voc{self.year}"
        self._opened: _Kit | HubTable | None = None

    def entries(self) -> Iterator[tuple[str, str]]:
        """(stem, stem) of every file of the list; of a table, the rows' names."""
        source = self._open()
        if isinstance(source, HubTable):
            names = [key.removeprefix(f"{self.name}/") for key in source.whole()]
        else:
            names = self._stems(source)
        return ((name, name) for name in names)

    def sample(self, key: str, entry: str) -> Sample:
        source = self._open()
        if isinstance(source, HubTable):
            return source.read(key)
        image_member, mask_member = _members(entry)
        photo, where = source.data(image_member, key), source.where(image_member)
        image = read_image(photo, key, where, upright=False)
        mask = read_mask(source.data(mask_member, key), key, source.where(mask_member), self.mask_encoding, upright=False)
        check_mask(image, mask, key, VOC_LABELS, "0..20", lambda: orientation_note(photo, key, where, applied=False))
        present = [label for label in present_labels(mask) if label not in (BACKGROUND, VOID)]
        return Sample(
            key, image, mask, {label: VOC_WORDS[label] for label in present},
            {"official": {label: VOC_OFFICIAL[label] for label in present}},
            {VOC_WORDS[label]: label for label in VOC_LABELS if label not in (BACKGROUND, VOID)},
        )  # fmt: skip

    def files(self, entry: str) -> list[Extent]:
        source = self._open()
        return [] if isinstance(source, HubTable) else [source.extent(member) for member in _members(entry)]

    def source(self) -> str:
        source = self._open()
        return str(self.root) if isinstance(source, HubTable) else source.where(f"{_LISTS}/{self.split}.txt")

    def fingerprint(self) -> str:
        """From the whole list (whatever the limit) and the contents of its files: the same for the tar and its folder."""
        stems = tuple(self.whole().values())
        source = self._open()
        if isinstance(source, HubTable):
            return source.fingerprint()
        digest = hashlib.sha256(repr((self.name, self.split, self.mask_encoding)).encode())
        contents = content_digests([extent for stem in stems for extent in self.files(stem)], self.root)
        digest.update(repr([stems, contents]).encode())
        return digest.hexdigest()[:16]

    def faults(self, listed: Mapping[str, str]) -> Iterator[tuple[str, Collection[str]]]:
        source = self._open()
        return source.faults(source.listed()) if isinstance(source, HubTable) else super().faults(listed)

    def _stems(self, source: _Kit) -> list[str]:
        member = f"{_LISTS}/{self.split}.txt"
        if source.size(member) is None:
            offered = source.lists()
            choices = f"{did_you_mean(self.split, offered)}" if offered else "That folder holds no list at all."
            raise DataError(
                f"Reading {self.name}: the image list {source.where(member)} is absent. {choices}\n"
                f"  Change dataset.split (now {self.split}). {REMEDY}"
            )
        text = decode_text(source.data(member, self.name), source.where(member))
        stems = [line.split()[0] for line in text.split("\n") if line.strip()]
        if strange := [stem for stem in stems if not _is_file_name(stem)]:
            raise DataError(
                f'Reading {self.name}: the image list {source.where(member)} names "{strange[0]}"; a file name in {_IMAGES} '
                "without its ending was wanted, and no path.\n  Mend the list, or take it from the source again."
            )
        return stems

    def _open(self) -> _Kit | HubTable:
        if self._opened is None:
            self._opened = self._find()
        return self._opened

    def _find(self) -> _Kit | HubTable:
        root, kit = self.root, f"VOC{self.year}"
        if root.is_file() and root.suffix != ".parquet":
            return _Tar(root, kit)
        self.check_root()
        if root.is_dir():
            for base in (root, root / kit, root / "VOCdevkit" / kit):
                if any((base / part).is_dir() for part in _PARTS):
                    return _Folder(base)
        if is_table_folder(root):
            return HubTable(
                str(root), self.split, words="voc", mask_encoding=self.mask_encoding, limit=self.limit, name=self.name
            )
        if not root.is_dir():
            raise DataError(f"Reading {self.name}: {root} is neither a folder nor a regular file.\n  {REMEDY}")
        inside = sorted(path.name for path in root.iterdir())
        years = sorted({path.name for folder in (root, root / "VOCdevkit") for path in folder.glob("VOC2???")})
        hint = f"It holds {', '.join(inside[:8]) or 'nothing'}{', ...' if len(inside) > 8 else ''}."
        if years:
            hint += f" Set dataset.year for {', '.join(years)}."
        elif ARCHIVE in inside:
            hint += f" Set dataset.root={root / ARCHIVE} to read the archive as it is."
        raise DataError(
            f"Reading {self.name}: {root} has no {kit} with {', '.join(_PARTS)}, and no table of `datasets`. {hint}\n  {REMEDY}"
        )


def _members(stem: str) -> tuple[str, str]:
    return f"{_IMAGES}/{stem}.jpg", f"{_MASKS}/{stem}.png"


def _is_file_name(stem: str) -> bool:
    """Whether a list may name this: nothing that leads out of the kit's folders."""
    return stem not in ("", ".", "..") and not set(stem) & {"/", "\\", ":", "\0"}


class _Kit(Protocol):
    """The files of one VOC year, by their path inside its folder."""

    def where(self, member: str) -> str: ...
    def size(self, member: str) -> int | None: ...
    def extent(self, member: str) -> Extent: ...
    def data(self, member: str, key: str) -> bytes: ...
    def lists(self) -> list[str]: ...


class _Folder:
    def __init__(self, base: Path) -> None:
        self.base = base

    def where(self, member: str) -> str:
        return str(self.base / member)

    def size(self, member: str) -> int | None:
        path = self.base / member
        return path.stat().st_size if path.is_file() else None

    def extent(self, member: str) -> Extent:
        return Extent(f"{self.base}/{member}")

    def data(self, member: str, key: str) -> bytes:
        return read_regular(self.base / member, f"{key}: {self.where(member)}")

    def lists(self) -> list[str]:
        return sorted(path.stem for path in (self.base / _LISTS).glob("*.txt"))


class _Tar:
    """Members are indexed once; every read opens the file anew, so threads and processes share no position."""

    def __init__(self, path: Path, kit: str) -> None:
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}  # member -> (offset, bytes)
        wanted = re.compile(rf"(?:^|/){kit}/((?:{'|'.join(_PARTS)})/[^/]+)$")
        end = 0
        try:
            with tarfile.open(path, "r:") as archive:  # "r:" refuses compression, which has no random access
                for member in archive:
                    end = member.offset_data + (-(-member.size // 512) * 512 if member.isreg() else 0)
                    if member.isreg() and not member.issparse() and (match := wanted.search(member.name)):
                        self.places[match[1]] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise self._broken(kit, str(error)) from error
        # tarfile takes a cut between two members for the end; a finished archive closes with zeroed blocks.
        with path.open("rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):
                raise self._broken(kit, f"no end of archive after byte {end} of {path.stat().st_size}")
        if not self.places:
            raise DataError(f"Reading {kit}: the archive {path} has no {kit} with {', '.join(_PARTS)}.\n  {REMEDY}")

    def _broken(self, kit: str, reason: str) -> DataError:
        with self.path.open("rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        state = "is compressed, and can't be read in place" if packed else f"is not a tar, or is cut short ({reason})"
        remedy = "Unpack it and set dataset.root to the folder." if packed else REMEDY
        return DataError(f"Reading {kit}: the archive {self.path} {state}.\n  {remedy}")

    def where(self, member: str) -> str:
        return f"{self.path}:{member}"

    def size(self, member: str) -> int | None:
        return self.places[member][1] if member in self.places else None

    def extent(self, member: str) -> Extent:
        if member not in self.places:
            return Extent(self.path / member)  # below a file: absent
        return Extent(self.path, *self.places[member])

    def data(self, member: str, key: str) -> bytes:
        if member not in self.places:
            raise DataError(f"{key}: {member} is missing in the archive {self.path}.\n  {REMEDY}")
        offset, size = self.places[member]
        if size > LARGEST_FILE:
            raise DataError(f"{key}: {self.where(member)} has {size:,} bytes; at most {LARGEST_FILE:,} are read.\n  {REMEDY}")
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise DataError(f"{key}: the archive {self.path} can't be read: {error}.\n  {REMEDY}") from error
        if len(content) != size:
            raise DataError(f"{key}: the archive {self.path} ends inside {member}; it changed while in use.\n  {REMEDY}")
        return content

    def lists(self) -> list[str]:
        return sorted(name.rpartition("/")[2][:-4] for name in self.places if name.startswith(_LISTS) and name.endswith(".txt"))
