"""Any table of Hugging Face `datasets` with an image and a mask column: from the Hub at a pinned commit, or a local folder.

Local folders: what `save_to_disk` writes, parquet shards ("val-00000-of-00002.parquet", also in data/), or an imagefolder
whose metadata names the masks. Code that a repository brings along is never run. Images and masks are read upright, as their EXIF
orientation says and as `datasets` shows them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conceptseg.data.digests import Extent, content_digests, kept_digest
from conceptseg.data.images import (
    check_shape,
    checked_encoding,
    one_line,
    orientation_note,
    present_labels,
    read_image,
    read_mask,
)
from conceptseg.data.listed import ListedDataset
from conceptseg.data.mask_values import MaskValues, checked_classes, labels_of, numbered
from conceptseg.data.words import VOC_OFFICIAL, VOC_WORDS
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.reading import path_inside
from conceptseg.types import BACKGROUND, VOID, Sample, checked_word, folded

_LISTS = {"voc": VOC_WORDS, "voc_official": VOC_OFFICIAL}
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(?P<split>.+?)(?:-\d+-of-\d+(?:-[0-9a-f]+)?)?")
_NUMBERED = re.compile(r"-(?P<number>\d+)-of-(?P<total>\d+)(?:-[0-9a-f]+)?$")
_OPENED_WHOLE = (".arrow", ".parquet", ".json", ".jsonl", ".csv")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class HubTable(ListedDataset[int]):
    """Rows of one split as samples.

    `words` is "voc", "voc_official", or a map of mask values to words. `id_column` names the column that keys are made of;
    null takes the column "id" if there is one, and otherwise the row's number. `config` is the table's own subset name.
    `word_column` names a column with one word a row, which the mask values of `foreground` mean; null takes `words`.
    `background` and `void` are mask values: see `MaskValues`.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        revision: str | None = None,
        image_column: str = "image",
        mask_column: str = "mask",
        words: str | Mapping[Any, Any] = "voc",
        mask_encoding: str = "index",
        limit: int | None = None,
        id_column: str | None = None,
        config: str | None = None,
        name: str | None = None,
        word_column: str | None = None,
        foreground: Sequence[int] = (1,),
        background: Sequence[int] = (BACKGROUND,),
        void: Sequence[int] | None = None,
    ) -> None:
        super().__init__(path, limit)
        self.path, self.split, self.revision, self.config = str(path), split, revision, config
        self.image_column, self.mask_column, self.id_column = image_column, mask_column, id_column
        self.words, self.word_column = _checked_words(words), word_column
        self._labels = labels_of(self.words)
        self._numbers: dict[str, int] | None = None
        if word_column is None:
            self._values = MaskValues(self._labels, background, void, "dataset.words")
        else:
            self._values = MaskValues(dict.fromkeys(foreground, 1), background, void, "dataset.foreground")
        self.mask_encoding = checked_encoding(mask_encoding)
        self.local = self.root.exists()
        self.name = name or re.sub(r"[^\w.-]+", "_", self.path.rstrip("/").rpartition("/")[2] if self.local else self.path)
        self._table: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def entries(self) -> Iterator[tuple[str, int]]:
        """(name, row number) of every row."""
        table = self._open()
        column = self.id_column or ("id" if "id" in table.column_names else None)
        if column is None:
            names = [f"{row:06d}" for row in range(len(table))]
        elif column in table.column_names:
            names = [str(value) for value in table.with_format(None)[column]]
        else:
            raise DataError(
                f'{self.source()} has no column "{column}". {did_you_mean(column, table.column_names)}\n'
                "  Change dataset.id_column, or set it to null to number the rows."
            )
        return ((name, row) for row, name in enumerate(names))

    def check_root(self) -> None:
        """A table on the Hub has no folder here."""

    def sample(self, key: str, entry: int) -> Sample:
        row = self._open()[entry]
        where = f"{self.source()}, row {entry}"
        photo, column = self._content(row, self.image_column, key, where), f'{where}, column "{self.image_column}"'
        image = read_image(photo, key, column)
        mask = read_mask(
            self._content(row, self.mask_column, key, where), key, f'{where}, column "{self.mask_column}"', self.mask_encoding
        )
        check_shape(image, mask, key, lambda: orientation_note(photo, key, column, applied=True))
        mask = self._values.labels(mask, key)
        if self.word_column is None:
            by_label = {self._labels[value]: word for value, word in self.words.items()}
            words = {label: by_label[label] for label in present_labels(mask) if label not in (BACKGROUND, VOID)}
            vocabulary = {word: label for label, word in by_label.items()}
        else:
            word = checked_word(row[self.word_column], f'{where}, column "{self.word_column}"', DataError)
            if self._numbers is None:
                self._numbers = numbered(map(str, self._open().with_format(None)[self.word_column]))
            words = {self._numbers[folded(word)]: word}
            mask[mask == 1] = self._numbers[folded(word)]
            vocabulary = dict(self._numbers)
        return Sample(key, image, mask, words, {"row": entry}, vocabulary)

    def files(self, entry: int) -> tuple[Path | Extent, ...]:
        """None of its own: rows are parts of the table's files, and `fingerprint` and `faults` read those."""
        return ()

    def fingerprint(self) -> str:
        """From all keys (whatever the limit), the words, and the contents of all images and masks."""
        table, keys = self._open(), tuple(self.whole())
        digest = hashlib.sha256(repr((self.name, self.split, self.revision, self.mask_encoding, self.words)).encode())
        digest.update(repr(keys).encode())
        if self.word_column is not None:
            digest.update(repr(table.with_format(None)[self.word_column][:]).encode())
        if self._values.identity() != MaskValues(self._labels).identity():
            digest.update(repr(self._values.identity()).encode())
        for column in (self.image_column, self.mask_column):
            digest.update(self._column_digest(table, column).encode())
        return digest.hexdigest()[:16]

    def _column_digest(self, table: Any, column: str) -> str:
        """Of every row's content, in the order of the rows, wherever the table keeps it."""
        owner = Path(self.path).expanduser()
        backing = [Path(file["filename"]) for file in table.cache_files]
        chosen = f"{self.split} {self.config} {column}"
        embedded = kept_digest(chosen, backing, lambda: _embedded_digest(table, column), owner)
        paths = [self._inside(path) for path in _paths(table, column) if path]
        beside = content_digests([Extent(path) for path in paths if path is not None], owner)
        return f"{embedded} {beside}"

    def faults(self, listed: Mapping[str, int]) -> Iterator[tuple[str, Collection[str]]]:
        for column in (self.image_column, self.mask_column):
            lengths, paths = _lengths(self._open(), column), _paths(self._open(), column)
            rows = zip(listed, lengths, paths, strict=False)
            empty = [key for key, length, path in rows if not length and not (path and self._holds(path))]
            if empty:
                yield (
                    f'{self.source()}: column "{column}" is empty or missing for {len(empty)} of {len(listed)} rows (first: '
                    f"{empty[0]}): take the table from its source again, or another dataset.revision.",
                    (),
                )

    def _content(self, row: Mapping[str, Any], column: str, key: str, where: str) -> bytes | Path:
        """The stored bytes of a picture, or the file that the table names. Raises DataError for a file elsewhere."""
        picture = row[column] or {}
        if picture.get("bytes"):
            return bytes(picture["bytes"])
        if picture.get("path"):
            inside = self._inside(picture["path"])
            if inside is None:
                raise DataError(
                    f'{key}: {where}: column "{column}" names the file {picture["path"]}, which is not in {self._roots()[0]}; '
                    "a table reads no files of other folders.\n  Copy the pictures into the folder, or store them in the table "
                    "(`Dataset.save_to_disk` does)."
                )
            return inside
        raise DataError(f'{key}: {where}: column "{column}" is empty.\n  Take the table from its source again.')

    def _holds(self, path: str) -> bool:
        """Whether a file that the table names is there, or is one to be refused by its own message."""
        inside = self._inside(path)
        return inside is None or inside.exists()

    def _inside(self, path: str) -> Path | None:
        """The file that a row names; see `path_inside`."""
        return next(filter(None, (path_inside(root, path) for root in self._roots())), None)

    def _roots(self) -> list[Path]:
        """Folders whose files this table may name: its own, or what `datasets` fetched from the Hub."""
        if self.local:
            folder = Path(self.path).expanduser()
            return [folder if folder.is_dir() else folder.parent]
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        return [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]

    def source(self) -> str:
        return f"table {self.path}" + (f"@{self.revision}" if self.revision else "") + f" [{self.split}]"

    def _open(self) -> Any:
        """The table with both pictures as stored bytes, decoded by nobody else."""
        if self._table is None:
            from datasets import Image

            table = self._load_local(Path(self.path).expanduser()) if self.local else self._load_remote()
            for column, setting in ((self.image_column, "image_column"), (self.mask_column, "mask_column")):
                if column not in table.column_names:
                    raise DataError(
                        f'{self.source()} has no column "{column}". {did_you_mean(column, table.column_names)}\n'
                        f"  Change dataset.{setting}."
                    )
                try:
                    table = table.cast_column(column, Image(decode=False))
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f'{self.source()}: column "{column}" holds {table.features[column]}, no pictures.\n'
                        f"  Change dataset.{setting}."
                    ) from error
            if self.word_column is not None and self.word_column not in table.column_names:
                raise DataError(
                    f'{self.source()} has no column "{self.word_column}". {did_you_mean(self.word_column, table.column_names)}\n'
                    "  Change dataset.word_column."
                )
            self._table = table
        return self._table

    def _load_remote(self) -> Any:
        if not _HUB_NAME.fullmatch(self.path):
            raise DataError(
                f"Reading the table {self.path}: there is no such folder, and it is no name on the Hub (owner/name).\n"
                "  Change dataset.path."
            )
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            got = "none was given" if self.revision is None else f'got "{self.revision}", and a branch or tag may move'
            raise ConfigError(
                f"Reading the table {self.path}: there is no such folder here; from the Hub it needs the commit to read "
                f"({got}).\n  Set dataset.revision to the commit's 7 to 40 hexadecimal digits, or dataset.path to a folder."
            )
        from datasets import load_dataset

        try:
            return load_dataset(self.path, self.config, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"Reading the table {self.path}@{self.revision} from the Hub failed: {one_line(error)[:400]}.\n"
                "  Look at dataset.path, dataset.config, dataset.split, dataset.revision, the network and HF_HUB_OFFLINE."
            ) from error

    def _load_local(self, folder: Path) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk

        _check_regular(folder)
        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = load_from_disk(str(folder))
                if isinstance(saved, DatasetDict):
                    return saved[self._checked_split(list(saved))]
                if saved.split is not None:
                    self._checked_split([str(saved.split)])
                return saved
            if shards := _shards(folder):
                chosen = _whole_set(shards[self._checked_split(list(shards))], self.split, self.path)
                # `datasets` keeps what it has read under paths and modification times; the name adds the contents.
                name = _set_name(content_digests([Extent(path) for path in chosen], folder))
                files = {"chosen": [str(path) for path in chosen]}
                return load_dataset("parquet", name, data_files=files, split="chosen")
            if groups := _image_folders(folder):
                group = groups[self._checked_split(list(groups))]
                metadata = [Extent(group / each) for each in _METADATA]
                listed = sorted(str(path) for path in group.rglob("*"))
                name = _set_name([*content_digests(metadata, folder), *listed])
                pattern = {"chosen": str(group / "**")}
                return load_dataset("imagefolder", name, data_files=pattern, split="chosen", drop_labels=True)
        except DataError:
            raise
        except Exception as error:  # pyarrow, datasets and the disk each have their own family of errors
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # `datasets` wraps what went wrong
            raise DataError(
                f"{self.source()} can't be opened: {type(cause).__name__}: {one_line(cause)[:400]}.\n"
                "  A shard is damaged or absent: copy or download the table again."
            ) from error
        raise DataError(
            f"Reading the table {folder}: it holds no dataset_dict.json or state.json (save_to_disk), no parquet shards, and no "
            "imagefolder with a metadata file.\n  Change dataset.path."
        )

    def _checked_split(self, offered: Sequence[str]) -> str:
        if self.split not in offered:
            raise DataError(
                f'The table {self.path} has no split "{self.split}". {did_you_mean(self.split, offered)}\n  Change dataset.split.'
            )
        return self.split


def is_table_folder(path: Path) -> bool:
    """Whether this is a folder (or one parquet file) that `HubTable` reads."""
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or bool(_shards(path)) or bool(_image_folders(path))


def _checked_words(words: str | Mapping[Any, Any]) -> dict[int, str]:
    if isinstance(words, str):
        if words not in _LISTS:
            raise ConfigError(
                f'dataset.words is "{words}". {did_you_mean(words, _LISTS)}\n'
                "  For other classes give a map of mask values to words, such as {1: cat, 2: dog}."
            )
        return dict(enumerate(_LISTS[words][1:], 1))
    if not isinstance(words, Mapping):
        raise ConfigError(f"dataset.words is {words!r}: wanted a map of mask values to words, such as {{1: cat, 2: dog}}.")
    return checked_classes(words, "dataset.words")


def _shards(folder: Path) -> dict[str, list[Path]]:
    """Split -> its parquet shards in order."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    groups: dict[str, list[Path]] = {}
    for path in files:
        match = _SHARD.fullmatch(path.stem)
        if path.suffix == ".parquet" and match and path.name not in _METADATA:
            groups.setdefault(match["split"], []).append(path)
    return groups


def _image_folders(folder: Path) -> dict[str, Path]:
    """Split -> the folder with its metadata file; a folder without splits is the split "all"."""
    if any((folder / name).is_file() for name in _METADATA):
        return {"all": folder}
    if not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if any((path / name).is_file() for name in _METADATA)}


def _check_regular(folder: Path) -> None:
    """Check that `datasets` opens only regular files: opening a named pipe waits for ever. Raises DataError."""
    for place, _, names in os.walk(folder):
        for entry in (Path(place) / name for name in names if name.endswith(_OPENED_WHOLE)):
            if not entry.is_file():
                kind = "a broken link or a loop of links" if entry.is_symlink() else "no regular file"
                raise DataError(f"Reading the table {folder}: {entry} is {kind}.\n  Take it away, or restore what it stands for.")


def _whole_set(shards: Sequence[Path], split: str, table: str) -> list[Path]:
    """The shards of a split, after a check that none of those that their names count is absent. Raises DataError."""
    numbers = {path: match for path in shards if (match := _NUMBERED.search(path.stem))}
    if not numbers:
        return list(shards)
    totals = {int(match["total"]) for match in numbers.values()}
    there = sorted(int(match["number"]) for match in numbers.values())
    if len(numbers) < len(shards) or len(totals) > 1 or len(set(there)) < len(there):
        names = ", ".join(path.name for path in shards[:6]) + (", ..." if len(shards) > 6 else "")
        raise DataError(
            f'The table {table} holds several sets of shards for the split "{split}" ({names}); one was wanted.\n'
            "  Take away the set that is not meant."
        )
    (total,) = totals
    if absent := sorted(set(range(total)) - set(there)):
        first = re.sub(r"-\d+-of-", f"-{absent[0]:05d}-of-", next(iter(numbers)).name)
        raise DataError(
            f'The table {table} is incomplete: {len(absent)} of the {total} shards of the split "{split}" are missing (first: '
            f"number {absent[0]}, such as {first}).\n  Copy or download the table again."
        )
    return list(shards)


def _set_name(parts: Sequence[str]) -> str:
    return "content-" + hashlib.sha256(repr(list(parts)).encode(errors="surrogateescape")).hexdigest()[:16]


def _rows(table: Any) -> Sequence[int]:
    """Row of the stored table by row of the table as it is shown."""
    stored: Sequence[int] = range(len(table.data)) if table._indices is None else table._indices.column(0).to_pylist()
    return stored


def _lengths(table: Any, column: str) -> list[int]:
    """Bytes of each picture that the table stores, 0 where it stores none; reads lengths, not contents."""
    import pyarrow.compute as pc

    chunks = table.data.column(column).chunks
    stored = [size for chunk in chunks for size in pc.fill_null(pc.binary_length(chunk.field("bytes")), 0).to_pylist()]
    return [stored[row] for row in _rows(table)]


def _paths(table: Any, column: str) -> list[str]:
    """The file that each row names instead of storing a picture; empty where it stores one, or nothing."""
    stored: list[str] = []
    for chunk in table.data.column(column).chunks:
        held = chunk.field("bytes")
        for row, path in enumerate(chunk.field("path").to_pylist()):
            stored.append("" if not path or (held[row].is_valid and held[row].as_buffer().size) else path)
    return [stored[row] for row in _rows(table)]


def _embedded_digest(table: Any, column: str) -> str:
    """SHA-256 over that of each row's stored picture."""
    stored: list[bytes] = []
    for chunk in table.data.column(column).chunks:
        held = chunk.field("bytes")
        for row in range(len(held)):
            content = held[row].as_buffer() if held[row].is_valid else b""
            stored.append(hashlib.sha256(content).digest())
    whole = hashlib.sha256()
    for row in _rows(table):
        whole.update(stored[row])
    return whole.hexdigest()
