"""Any table of Hugging Face `datasets` with an image and a mask column: from the Hub at a pinned commit, or a local folder.

Local folders: what `save_to_disk` writes, parquet shards ("val-00000-of-00002.parquet", also in data/), or an imagefolder
whose metadata names the masks. Code that a repository brings along is never run.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.images import (
    check_mask,
    checked_encoding,
    checked_limit,
    one_line,
    present_labels,
    read_image,
    read_mask,
    reading_problems,
    unique_keys,
    unknown_key,
)
from conceptseg.data.words import VOC_OFFICIAL, VOC_WORDS
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.types import BACKGROUND, VOID, Sample, checked_word

_LISTS = {"voc": VOC_WORDS, "voc_official": VOC_OFFICIAL}
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHARD = re.compile(r"(?P<split>.+?)(?:-\d+-of-\d+(?:-[0-9a-f]+)?)?")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class HubTable(SegmentationDataset):
    """Rows of one split as samples.

    `words` is "voc", "voc_official", or a map of mask values to words. `id_column` names the column that keys are made of;
    null takes the column "id" if there is one, and otherwise the row's number. `config` is the table's own subset name.
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
    ) -> None:
        self.path, self.split, self.revision, self.config = str(path), split, revision, config
        self.image_column, self.mask_column, self.id_column = image_column, mask_column, id_column
        self.words = _checked_words(words)
        self.mask_encoding = checked_encoding(mask_encoding)
        self.limit = checked_limit(limit)
        self.local = Path(path).expanduser().exists()
        self.name = name or re.sub(r"[^\w.-]+", "_", self.path.rstrip("/").rpartition("/")[2] if self.local else self.path)
        self._table: Any = None
        self._keys: tuple[str, ...] | None = None
        self._rows: dict[str, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    def keys(self) -> Sequence[str]:
        return tuple(self._listed())

    def read(self, key: str) -> Sample:
        rows = self._listed()
        if key not in rows:
            raise unknown_key(key, rows, self.name)
        row = self._open()[rows[key]]
        where = f"{self._where()}, row {rows[key]}"
        image = read_image(_content(row, self.image_column, key, where), key, f'{where}, column "{self.image_column}"')
        mask = read_mask(
            _content(row, self.mask_column, key, where), key, f'{where}, column "{self.mask_column}"', self.mask_encoding
        )
        check_mask(image, mask, key, tuple(self.words), f"the keys of dataset.words ({_range(tuple(self.words))})")
        words = {label: self.words[label] for label in present_labels(mask) if label not in (BACKGROUND, VOID)}
        return Sample(key, image, mask, words, {"row": rows[key]})

    def fingerprint(self) -> str:
        """From all keys (whatever the limit), the words, the sizes of all pictures, and the first and the last mask."""
        table, keys = self._open(), self._all()
        digest = hashlib.sha256(repr((self.name, self.split, self.revision, self.mask_encoding, self.words)).encode())
        digest.update(repr(keys).encode())
        for column in (self.image_column, self.mask_column):
            digest.update(repr(_sizes(table, column)).encode())
        for row in (0, len(keys) - 1):
            content = _content(table[row], self.mask_column, keys[row], self._where())
            digest.update(content if isinstance(content, bytes) else content.read_bytes())
        return digest.hexdigest()[:16]

    def problems(self) -> list[str]:
        try:
            keys = self.keys()
        except (DataError, ConfigError) as error:
            return [one_line(error)]
        found = []
        for column in (self.image_column, self.mask_column):
            empty = [key for key, size in zip(keys, _sizes(self._open(), column), strict=False) if not size]
            if empty:
                found.append(
                    f'{self._where()}: column "{column}" is empty or missing for {len(empty)} of {len(keys)} rows (first: '
                    f"{empty[0]}): take the table from its source again, or another dataset.revision."
                )
        return found + reading_problems(keys, self.read)

    def _where(self) -> str:
        return f"table {self.path}" + (f"@{self.revision}" if self.revision else "") + f" [{self.split}]"

    def _listed(self) -> dict[str, int]:
        """Key -> row."""
        if self._rows is None:
            self._rows = {key: row for row, key in enumerate(self._all()[: self.limit])}
        return self._rows

    def _all(self) -> tuple[str, ...]:
        if self._keys is None:
            table = self._open()
            column = self.id_column or ("id" if "id" in table.column_names else None)
            if column is None:
                names = [f"{row:06d}" for row in range(len(table))]
            elif column in table.column_names:
                names = [str(value) for value in table.with_format(None)[column]]
            else:
                raise DataError(
                    f'{self._where()} has no column "{column}". {did_you_mean(column, table.column_names)}\n'
                    "  Change dataset.id_column, or set it to null to number the rows."
                )
            self._keys = unique_keys([f"{self.name}/{name}" for name in names], self._where())
        return self._keys

    def _open(self) -> Any:
        """The table with both pictures as stored bytes, decoded by nobody else."""
        if self._table is None:
            from datasets import Image

            table = self._load_local(Path(self.path).expanduser()) if self.local else self._load_remote()
            for column, setting in ((self.image_column, "image_column"), (self.mask_column, "mask_column")):
                if column not in table.column_names:
                    raise DataError(
                        f'{self._where()} has no column "{column}". {did_you_mean(column, table.column_names)}\n'
                        f"  Change dataset.{setting}."
                    )
                try:
                    table = table.cast_column(column, Image(decode=False))
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f'{self._where()}: column "{column}" holds {table.features[column]}, no pictures.\n'
                        f"  Change dataset.{setting}."
                    ) from error
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

        try:
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                saved = load_from_disk(str(folder))
                if isinstance(saved, DatasetDict):
                    return saved[self._checked_split(list(saved))]
                if saved.split is not None:
                    self._checked_split([str(saved.split)])
                return saved
            if shards := _shards(folder):
                chosen = [str(path) for path in shards[self._checked_split(list(shards))]]
                return load_dataset("parquet", data_files={"chosen": chosen}, split="chosen")
            if groups := _image_folders(folder):
                pattern = str(groups[self._checked_split(list(groups))] / "**")
                return load_dataset("imagefolder", data_files={"chosen": pattern}, split="chosen", drop_labels=True)
        except DataError:
            raise
        except Exception as error:  # pyarrow, datasets and the disk each have their own family of errors
            raise DataError(
                f"{self._where()} can't be opened: {type(error).__name__}: {one_line(error)[:400]}.\n"
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
    named: dict[int, str] = {}
    for label, word in words.items():
        digits = str(label).strip()
        if isinstance(label, bool) or not digits.isdecimal():
            raise ConfigError(f"dataset.words names the class {label!r}: whole numbers were wanted as keys, such as {{1: cat}}.")
        if int(digits) in named:
            raise ConfigError(f"dataset.words names the class {digits} twice. Remove one of the two.")
        named[int(digits)] = checked_word(word, f"dataset.words.{digits}")
    if not named or not all(BACKGROUND < label < VOID for label in named):
        raise ConfigError(f"dataset.words names the classes {_range(tuple(named))}; 1 to 254 were wanted.")
    return named


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


def _content(row: Mapping[str, Any], column: str, key: str, where: str) -> bytes | Path:
    picture = row[column] or {}
    if picture.get("bytes"):
        return bytes(picture["bytes"])
    if picture.get("path"):
        return Path(picture["path"])
    raise DataError(f'{key}: {where}: column "{column}" is empty.\n  Take the table from its source again.')


def _sizes(table: Any, column: str) -> list[int]:
    """Stored bytes of each picture, 0 where there is none; reads lengths, not contents."""
    import pyarrow.compute as pc

    sizes: list[int] = []
    for chunk in table.data.column(column).chunks:
        inside = pc.fill_null(pc.binary_length(chunk.field("bytes")), 0).to_pylist()
        paths = chunk.field("path").to_pylist()
        for size, path in zip(inside, paths, strict=True):
            file = Path(path) if path and not size else None
            sizes.append(file.stat().st_size if file is not None and file.is_file() else size)
    rows = np.arange(len(sizes)) if table._indices is None else np.asarray(table._indices.column(0))
    return [sizes[row] for row in rows]


def _range(labels: Sequence[int]) -> str:
    """For a message: 1..20 where there is no gap, else 1, 3."""
    if len(labels) > 2 and list(labels) == list(range(labels[0], labels[-1] + 1)):
        return f"{labels[0]}..{labels[-1]}"
    return ", ".join(map(str, labels)) or "none"
