"""A folder of photos and a folder of masks: files of one name belong together, images/cat.jpg and masks/cat.png.

Words come from a list of classes, from a table with one word an image, from the folder that an image lies in, or from its name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from conceptseg.data.images import (
    check_shape,
    checked_encoding,
    orientation_note,
    present_labels,
    read_image,
    read_mask,
)
from conceptseg.data.listed import ListedDataset
from conceptseg.data.mask_values import MaskValues, checked_classes, labels_of, names_no_class, numbered
from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of
from conceptseg.reading import read_lines, read_rows
from conceptseg.types import BACKGROUND, VOID, Sample, checked_word, folded

WORD_SOURCES = ("classes", "metadata", "folder", "file_name")
CLASSES, METADATA = "classes.txt", "metadata.csv"
PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif")
BESIDE = (".txt", ".csv", ".json", ".jsonl", ".xml", ".md", ".ini", ".db", ".yaml", ".yml")
"""Files that may lie among pictures and are not read."""
_NUMBERED = re.compile(r"(?P<value>\d+)\s*[:=\t]\s*(?P<word>.+)")
_NO_WORD = re.compile(r"""["'\[{].*|-\s.*|.*\t.*|\d+\s*[,;|].*|.*[:=,;|]\s*\d[\d\s,:;]*|[\W\d_]*""")
"""Lines of CSV, JSON, YAML or of a colour map, and those without a letter."""
_COUNTED = re.compile(r"\W*\d+\W*\s\D+|\D+\s\W*\d+\W*")
_COUNTER = re.compile(r"[\s_.()-]*\d+[\s_.()-]*$")


@dataclass(frozen=True, slots=True)
class Photo:
    """An image file, its mask file, and the word to ask for in it."""

    image: Path
    mask: Path | None
    """None where there is none of the image's name."""
    word: str | None
    """None where values of the mask name classes."""


class ImageFolder(ListedDataset[Photo]):
    """Pairs of an image and a mask, in the order of their names; folders in folders are read too.

    root: the folder that holds `images` and `masks`. mask_suffix: what a mask's name has beyond its image's ("_mask").
    words: where words come from; null takes dataset.classes or classes.txt, else metadata.csv.
        "classes": mask values stand for classes, named by `classes` or by classes.txt, a word a line: the first is 1, or 0 where
        it is "background"; lines such as "7: cat" give the value. "metadata": metadata.csv gives each file_name (in `images`) a
        word in `word_column`. "folder": the folder in `images`. "file_name": the name without the number at its end.
    foreground: mask values that mean the image's own word. background, void: mask values that mean these; see `MaskValues`.
    """

    def __init__(
        self,
        root: str | Path,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        words: str | None = None,
        classes: Mapping[Any, Any] | None = None,
        word_column: str = "word",
        foreground: Sequence[int] = (1,),
        background: Sequence[int] = (BACKGROUND,),
        void: Sequence[int] | None = None,
        mask_encoding: str = "index",
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        if words is not None:
            one_of("dataset.words", words, WORD_SOURCES)
        if classes is not None and words not in (None, "classes"):
            raise ConfigError(f"dataset.classes is given, and dataset.words={words} would not read it. Set one of them to null.")
        if images == masks and not mask_suffix:
            raise ConfigError(f"dataset.images and dataset.masks are both {images}: set dataset.mask_suffix, such as _mask.")
        super().__init__(root, limit)
        self.images, self.masks, self.mask_suffix = images, masks, mask_suffix
        self.words, self.word_column = words, word_column
        self.classes = checked_classes(classes) if classes is not None else None
        self.foreground, self.background, self.void = tuple(foreground), tuple(background), void
        if self.classes is None:
            self._values = MaskValues(dict.fromkeys(self.foreground, 1), self.background, void, "dataset.foreground")
        else:
            self._values = MaskValues(labels_of(self.classes), self.background, void)
        self.mask_encoding = checked_encoding(mask_encoding)
        self.name = name or re.sub(r"[^\w.-]+", "_", self.root.resolve().name) or "folder"
        self._by_label = _by_label(self.classes or {})
        self._numbers: dict[str, int] = {}

    def entries(self) -> Iterator[tuple[str, Photo]]:
        """(path in `images` without the ending, files and word) of every image, sorted."""
        if not self.root.is_dir():
            raise DataError(f"Reading {self.name}: {self.root} is no folder.\n  Set dataset.root to that of {self.images}/.")
        images, masks = self._pictures(self.images), self._pictures(self.masks)
        if self.images == self.masks:
            # An image may have the suffix in its name: gas_mask.png, whose mask is gas_mask_mask.png.
            images = {
                stem: path
                for stem, path in images.items()
                if not (stem.endswith(self.mask_suffix) and stem.removesuffix(self.mask_suffix) in images)
            }
        words = self._words(images)
        self._numbers = numbered(words.values())
        return (
            (stem, Photo(path, masks.get(stem + self.mask_suffix), words.get(stem)))
            for stem, path in images.items()
        )  # fmt: skip

    def sample(self, key: str, entry: Photo) -> Sample:
        if entry.mask is None:
            raise DataError(
                f"{key}: {entry.image} has no mask: {self.root / self.masks} holds no picture of the name "
                f"{PurePosixPath(key).name}{self.mask_suffix}.\n  Add it, take the image away, or set dataset.mask_suffix."
            )
        image = read_image(entry.image, key)
        mask = read_mask(entry.mask, key, "", self.mask_encoding)
        check_shape(image, mask, key, lambda: orientation_note(entry.image, key, str(entry.image), applied=True))
        labels = self._values.labels(mask, key)
        if entry.word is None:
            words = {label: self._by_label[label] for label in present_labels(labels) if label not in (BACKGROUND, VOID)}
        else:
            number = self._numbers[folded(entry.word)]
            labels[labels == 1] = number
            words = {number: entry.word}
        return Sample(key, image, labels, words, {"file": entry.image.name})

    def files(self, entry: Photo) -> list[Path]:
        return [entry.image] if entry.mask is None else [entry.image, entry.mask]

    def identity(self, entry: Photo) -> Any:
        """The image's own word, or the words of all classes."""
        return entry.word or sorted(self._by_label.items())

    def faults(self, listed: Mapping[str, Photo]) -> Iterator[tuple[str, Collection[str]]]:
        if alone := [key for key, entry in listed.items() if entry.mask is None]:
            yield (
                f"{len(alone)} of {len(listed)} images lack a mask of their name in {self.root / self.masks} ({alone[0]}): "
                "add the masks, take the images away, or set dataset.mask_suffix.",
                alone,
            )
        used, masks = {entry.mask for entry in self.whole().values()}, self._pictures(self.masks)
        if self.images != self.masks and (lone := [stem for stem, path in masks.items() if path not in used]):
            yield (
                f"{len(lone)} of {len(masks)} masks lack an image of their name in {self.root / self.images} ({lone[0]}): "
                "add the images, or take the masks away.",
                (),
            )
        yield from super().faults(listed)

    # ------------------------------------------------------------ listing

    def _pictures(self, part: str) -> dict[str, Path]:
        """Path in the folder without the ending -> the picture, sorted. Raises DataError for two of one name, and for others."""
        folder = self.root / part
        if not folder.is_dir():
            inside = sorted(path.name for path in self.root.iterdir() if path.is_dir())
            setting = "images" if part == self.images else "masks"
            raise DataError(
                f"Reading {self.name}: {self.root} has no folder {part}. {did_you_mean(part, inside)}\n  Set dataset.{setting}."
            )
        found: dict[str, Path] = {}
        for path in _files(folder):
            if path.suffix.lower() in BESIDE:
                continue
            if path.suffix.lower() not in PICTURES:
                raise DataError(
                    f"Reading {self.name}: {path} is no picture that is read here ({', '.join(PICTURES)}).\n"
                    "  Save it as PNG, or take it away: a file that is left out without a word would change the number."
                )
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem in found:
                raise DataError(f"Reading {self.name}: {found[stem]} and {path} have one name.\n  Take one of them away.")
            found[stem] = path
        return dict(sorted(found.items()))

    def _words(self, images: Mapping[str, Path]) -> dict[str, str]:
        """Stem -> the image's own word; empty where values of masks name classes, which are then set."""
        source = self.words or self._source(images)
        if source == "classes":
            if self.classes is None:
                classes = _read_classes(self.root / CLASSES)
                self._values = MaskValues(labels_of(classes), self.background, self.void)
                self._by_label = _by_label(classes)
            return {}
        if source == "metadata":
            return self._metadata(images)
        words = {stem: _folder_of(stem) if source == "folder" else _named_by(stem) for stem in images}
        for stem, word in words.items():
            if not word:
                where = "lies in no folder of its own" if source == "folder" else "has no word before its number"
                raise DataError(
                    f"Reading {self.name}: {images[stem]} {where}, and dataset.words={source} wants its word there.\n"
                    f"  Move or rename it, or set dataset.words to one of {', '.join(WORD_SOURCES)}."
                )
        return words

    def _source(self, images: Mapping[str, Path]) -> str:
        """Where words are, if it is not said. Folders and names are never guessed: "IMG" would be a word."""
        there = [name for name, file in (("classes", CLASSES), ("metadata", METADATA)) if (self.root / file).exists()]
        if self.classes is not None:
            return "classes"
        if len(there) == 1:
            return there[0]
        if there:
            raise DataError(
                f"Reading {self.name}: {self.root} holds {CLASSES} and {METADATA}.\n  Set dataset.words=classes or =metadata."
            )
        first = next(iter(images), "")
        offers = [
            f'dataset.words={source} ({first} would be asked for "{word}")'
            for source, word in (("folder", _folder_of(first)), ("file_name", _named_by(first)))
            if word
        ]
        raise DataError(
            f"Reading {self.name}: nothing says which words to ask for: {self.root} holds no {CLASSES} and no {METADATA}.\n"
            f"  Set {' or '.join([*offers, chr(39) + 'dataset.classes={1: cat}' + chr(39)])}, or write one of the two files."
        )

    def _metadata(self, images: Mapping[str, Path]) -> dict[str, str]:
        path, folder = self.root / METADATA, self.root / self.images
        by_name = {image.relative_to(folder).as_posix(): stem for stem, image in images.items()}
        words: dict[str, str] = {}
        for line, row in read_rows(path, ("file_name", self.word_column)):
            given = row["file_name"].strip()
            named = PurePosixPath(os.path.normpath(given)).as_posix()
            stem = by_name.get(named) or by_name.get(named.removeprefix(f"{self.images}/"))
            if stem is None:
                raise DataError(
                    f'{path}, line {line}: there is no image "{given}" in {folder}. {did_you_mean(named, by_name)}\n'
                    "  Correct the name; it is taken inside that folder, and never outside."
                )
            if stem in words:
                raise DataError(f"{path}, line {line}: {given} is named a second time.\n  Leave one of the lines out.")
            words[stem] = checked_word(row[self.word_column], f"{path}, line {line}, column {self.word_column}", DataError)
        if lacking := [image for stem, image in images.items() if stem not in words]:
            raise DataError(
                f"{path} names no word for {len(lacking)} of {len(images)} images (first: {lacking[0]}).\n  Add a line for each."
            )
        return words


def _by_label(classes: Mapping[int, str]) -> dict[int, str]:
    labels = labels_of(classes)
    return {labels[value]: word for value, word in classes.items()}


def _files(folder: Path) -> list[Path]:
    """Every file below, hidden ones left out. Links are followed. Raises DataError for a folder that is reached twice."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"Listing {folder}: {place} is reached twice, through a link.\n  Take the link away.")
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".") and name != "Thumbs.db"]
    return found


def _folder_of(stem: str) -> str:
    return " ".join(PurePosixPath(stem).parent.as_posix().lstrip(".").rpartition("/")[2].replace("_", " ").split())


def _named_by(stem: str) -> str:
    """The word in a file's name.

    >>> _named_by("traffic_light_012"), _named_by("cat (3)"), _named_by("0001")
    ('traffic light', 'cat', '')
    """
    return " ".join(_COUNTER.sub("", PurePosixPath(stem).name).replace("_", " ").split())


def _read_classes(path: Path) -> dict[int, str]:
    """Mask value -> word. Raises DataError for lines of both kinds, for a value that makes no class, and for lines of other
    formats, whose marks and numbers would be taken for parts of words.
    """
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line and not line.startswith("#")]
    numbered = [_NUMBERED.fullmatch(line) for _, line in lines]
    if any(numbered) and not all(numbered):
        number, line = next(one for one, match in zip(lines, numbered, strict=True) if match is None)
        raise DataError(f'{path}, line {number}: "{line}" has no value, and other lines have: wanted such as "7: cat".')
    words = [match["word"] if match else line for (_, line), match in zip(lines, numbered, strict=True)]
    counted = not any(numbered) and all(_COUNTED.fullmatch(word) for word in words)
    for (number, line), word in zip(lines, words, strict=True):
        if _NO_WORD.fullmatch(word) or counted:
            raise DataError(
                f'{path}, line {number}: "{line}" is no word alone. A line is a word, such as "cat", or a mask value and a word, '
                'such as "7: cat".\n  Write it so, or give other words by dataset.classes.'
            )
    first = 0 if lines and folded(lines[0][1]).strip("_") == "background" else 1
    pairs = [
        (int(match["value"]) if match else place, word)
        for place, (word, match) in enumerate(zip(words, numbered, strict=True), first)
    ]
    values = [value for value, _ in pairs]
    if len(set(values)) < len(values):
        raise DataError(f"{path} names the value {next(v for v in values if values.count(v) > 1)} twice.\n  Leave one line out.")
    if strange := [word for value, word in pairs if value == BACKGROUND and not names_no_class(word)]:
        raise DataError(
            f'{path} names the value 0 "{strange[0]}", but 0 is background here.\n'
            "  If it is a class in the masks, give it another value there."
        )
    kept = {value: word for value, word in pairs if value not in (BACKGROUND, VOID) or not names_no_class(word)}
    try:
        return checked_classes(kept, str(path))
    except ConfigError as error:
        raise DataError(str(error)) from error
