"""Base classes of data sets on disk: a subclass lists its samples, and keys, limit, fingerprint and problems follow from that.

`FilePairs` is for an image file and a mask file per sample. `ListedDataset` is for every other layout.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.digests import Extent, content_digests
from conceptseg.data.images import (
    MaskEncoding,
    check_mask,
    checked_limit,
    one_line,
    orientation_note,
    present_labels,
    read_image,
    read_mask,
    reading_problems,
    unique_keys,
    unknown_key,
)
from conceptseg.errors import ConfigError, DataError
from conceptseg.types import BACKGROUND, VOID, Sample

Entry = TypeVar("Entry")


class ListedDataset(SegmentationDataset, Generic[Entry]):
    """Samples that a list names. A subclass sets `name` and says what is listed, how one is read, and from which files.

    root: the file or folder that holds the data set. limit: the first so many samples; None for all.
    """

    remedy: str = "Set dataset.root to where it lies."
    """Last sentence of messages about files that are absent: where they come from."""

    def __init__(self, root: str | Path, limit: int | None = None) -> None:
        self.root = Path(root).expanduser()
        self.limit = checked_limit(limit)
        self._whole: dict[str, Entry] | None = None
        self._listed: dict[str, Entry] | None = None

    @abstractmethod
    def entries(self) -> Iterable[tuple[str, Entry]]:
        """(name, entry) of every sample, whatever the limit, in an order that is the same on every machine.

        An entry is what `sample` needs to read one. Called once; opens no image. Raises DataError or OSError.
        """

    @abstractmethod
    def sample(self, key: str, entry: Entry) -> Sample:
        """One sample. Raises DataError."""

    @abstractmethod
    def files(self, entry: Entry) -> Iterable[Path | Extent]:
        """The files, or parts of files, that a sample is read from."""

    def identity(self, entry: Entry) -> Any:
        """Plain data of an entry that decide the sample beside its files, such as its words; no absolute path."""
        return entry

    def source(self) -> str:
        """The list of samples, for messages."""
        return str(self.root)

    def whole(self) -> dict[str, Entry]:
        """Key -> entry of every sample, whatever the limit. Raises DataError."""
        if self._whole is None:
            self.check_root()
            try:
                found = list(self.entries())
            except OSError as error:
                where = error.filename or self.root
                raise DataError(f"Reading {self.name}: {where}: {error.strerror or error}.\n  {self.remedy}") from error
            keys = unique_keys([f"{self.name}/{name}" for name, _ in found], self.source())
            self._whole = dict(zip(keys, (entry for _, entry in found), strict=True))
        return self._whole

    def listed(self) -> dict[str, Entry]:
        """Key -> entry of the samples within the limit. Raises DataError."""
        if self._listed is None:
            self._listed = dict(list(self.whole().items())[: self.limit])
        return self._listed

    def check_root(self) -> None:
        """Raises DataError where `root` is absent."""
        if not self.root.exists():
            partial = self.root.with_name(self.root.name + ".partial")
            state = f" (an unfinished download lies beside it: {partial.name})" if partial.exists() else ""
            raise DataError(f"Reading {self.name}: {self.root} does not exist{state}.\n  {self.remedy}")

    def keys(self) -> tuple[str, ...]:
        return tuple(self.listed())

    def read(self, key: str) -> Sample:
        listed = self.listed()
        if key not in listed:
            raise unknown_key(key, listed, self.name)
        return self.sample(key, listed[key])

    def fingerprint(self) -> str:
        """From the whole list (whatever the limit), the contents of its files, and every public attribute but root and limit."""
        whole = self.whole()
        settings = {name: value for name, value in sorted(vars(self).items()) if name[0] != "_" and name not in ("root", "limit")}
        contents = content_digests([_extent(file) for entry in whole.values() for file in self.files(entry)], self.root)
        said = (self.name, settings, [(key, self.identity(entry)) for key, entry in whole.items()], contents)
        return hashlib.sha256(repr(said).encode(errors="surrogateescape")).hexdigest()[:16]

    def problems(self) -> list[str]:
        try:
            faults = list(self.faults(self.listed()))
        except (DataError, ConfigError) as error:
            return [one_line(error)]
        faulty = {key for _, keys in faults for key in keys}
        return [text for text, _ in faults] + reading_problems([key for key in self.listed() if key not in faulty], self.read)

    def faults(self, listed: Mapping[str, Entry]) -> Iterator[tuple[str, Collection[str]]]:
        """(one sentence with the remedy, keys that it is about) for all that is wrong before a picture is decoded."""
        readers: dict[str, list[str]] = {}  # file -> keys of the samples that are read from it
        for key, entry in listed.items():
            for file in self.files(entry):
                readers.setdefault(str(_extent(file).path), []).append(key)
        absent: dict[str, list[str]] = {}  # folder -> absent files
        for path in readers:
            if not os.path.isfile(path):
                absent.setdefault(os.path.dirname(path), []).append(path)
        for folder, paths in absent.items():
            names = [os.path.basename(path) for path in paths]
            named = ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])
            wanted = sum(os.path.dirname(path) == folder for path in readers)
            yield (
                f"{len(paths)} of the {wanted} files that {self.source()} lists are missing in {folder} ({named}): "
                f"{self.remedy[0].lower()}{self.remedy[1:]}",
                [key for path in paths for key in readers[path]],
            )


def _extent(file: Path | Extent) -> Extent:
    return file if isinstance(file, Extent) else Extent(file)


@dataclass(frozen=True, slots=True)
class Pair:
    """An image file and its mask file, as paths below the data set's root."""

    image: str
    mask: str
    words: Mapping[int, str] | None = None
    """Class index -> word to ask for in this image; None for those of the data set's `words` that its mask holds."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Copied to `Sample.about`."""


class FilePairs(ListedDataset[Pair]):
    """An image file and a mask file per sample. A subclass sets `name` and yields (name, Pair) from `entries`."""

    words: Mapping[int, str] = {}
    """Class index -> word, for pairs that name no words of their own."""
    remap: Mapping[int, int] = {}
    """Stored mask value -> class index, 0 background, 255 void. Empty where masks store class indices; else complete."""
    mask_encoding: MaskEncoding = "stored"
    """As for `read_mask`."""
    upright: bool = True
    """Turn images and masks as their EXIF orientation says."""

    def sample(self, key: str, entry: Pair) -> Sample:
        photo, drawn = self.root / entry.image, self.root / entry.mask
        image = read_image(photo, key, str(photo), self.upright)
        mask = self._remapped(read_mask(drawn, key, str(drawn), self.mask_encoding, self.upright), key, drawn)
        words = self.words if entry.words is None else entry.words
        known = f"{BACKGROUND} (background), {', '.join(map(str, words)) or 'no class'}"
        check_mask(
            image, mask, key, words, known, lambda: orientation_note(photo, key, str(photo), applied=self.upright)
        )  # fmt: skip
        if entry.words is None:
            words = {label: words[label] for label in present_labels(mask) if label not in (BACKGROUND, VOID)}
        vocabulary = {word: label for label, word in self.words.items()}
        return Sample(key, image, mask, dict(words), entry.about, vocabulary)

    def files(self, entry: Pair) -> tuple[Path, Path]:
        return self.root / entry.image, self.root / entry.mask

    def identity(self, entry: Pair) -> Any:
        words = self.words if entry.words is None else entry.words
        return entry.words is None, sorted(words.items()), sorted(self.remap.items()), self.mask_encoding, self.upright

    def _remapped(self, stored: UInt8[np.ndarray, "H W"], key: str, where: Path) -> UInt8[np.ndarray, "H W"]:
        if not self.remap:
            return stored
        if strange := sorted(set(present_labels(stored)) - set(self.remap)):
            wanted = ", ".join(map(str, self.remap))
            raise DataError(
                f"{key}: mask {where} holds the values {', '.join(map(str, strange[:8]))}; {wanted} were wanted.\n"
                f"  Restore the mask from the source, or add the values to `remap` of {type(self).__name__}."
            )
        table = np.zeros(256, np.uint8)
        table[list(self.remap)] = list(self.remap.values())
        return table[stored]
