"""ImageNet-Segmentation: 4,276 images with one foreground mask each, in one MATLAB 7.3 (HDF5) file.

Source: Guillaumin, Küttel and Ferrari, ImageNet Auto-Annotation with Segmentation Propagation, IJCV 2014;
http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from conceptseg.data.digests import Extent, content_digests
from conceptseg.data.images import MAX_PIXELS, check_mask, one_line
from conceptseg.data.listed import ListedDataset
from conceptseg.data.words import imagenet_nouns
from conceptseg.errors import DataError
from conceptseg.reading import open_regular, read_rows
from conceptseg.types import Sample

FILE = "gtsegs_ijcv.mat"
REMEDY = "Fetch it with scripts/fetch_imagenet_segmentation.py, or set dataset.root to where it lies."
_COLUMNS = ("wnid", "lemma", "noun")
_PARTS = ("img", "gt", "id")
_MOST_ROWS = 10_000_000
_LONGEST_ID = 1_000


class ImageNetSegmentation(ListedDataset[int]):
    """One noun an image; mask 0 or 1, no void, the first annotation where there are several.

    `root` is the .mat file or the folder that holds it. `words` is a CSV with the columns wnid, lemma, noun that replaces the
    shipped table. The file is opened at the first read of each process and thread, so the object can be sent to workers.
    """

    name = "imagenet_segmentation"
    remedy = REMEDY

    def __init__(self, root: str | Path, limit: int | None = None, words: str | Path | None = None) -> None:
        super().__init__(root, limit)
        self.words_path = Path(words).expanduser() if words is not None else None
        self._nouns: Mapping[str, tuple[str, str]] | None = None
        self._handles = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handles = threading.local()

    def entries(self) -> Iterator[tuple[str, int]]:
        """(id, row of the file) in the order of the file. Reads the ids, and no image."""
        path = self._file()
        with _layout(path, "listing the ids"), _open(path) as file:
            _check_inside(file)
            for part in _PARTS:
                if len(file[f"value/{part}"]) != len(file["value/id"]):
                    raise ValueError(f"value/{part} has {len(file[f'value/{part}'])} rows, value/id {len(file['value/id'])}")
            ids = [_text(file, file["value/id"][row, 0]) for row in range(len(file["value/id"]))]
        # An id that comes again is told apart by its row, so that every key stays what it is under any limit.
        seen: set[str] = set()
        for row, name in enumerate(ids):
            yield f"{name}@{row}" if name in seen else name, row
            seen.add(name)

    def sample(self, key: str, entry: int) -> Sample:
        wnid = _wnid(key)
        nouns = self._words()
        if wnid not in nouns:
            raise DataError(
                f'{key}: unknown word: WordNet id "{wnid}" is not in {self._words_name()}, which names {len(nouns)} ids.\n'
                f"  Add a row for it to a CSV with the columns {', '.join(_COLUMNS)} and set dataset.words to that file."
            )
        lemma, noun = nouns[wnid]
        image, mask = self._pixels(key, entry)
        vocabulary = dict.fromkeys(sorted({other for _, other in nouns.values()}), 0)
        return Sample(key, image, mask, {1: noun}, {"wnid": wnid, "lemma": lemma}, vocabulary)

    def files(self, entry: int) -> tuple[Path]:
        return (self._file(),)

    def source(self) -> str:
        return str(self._file())

    def fingerprint(self) -> str:
        """From all ids (whatever the limit), their words, and the whole content of the file."""
        nouns = self._words()
        named = [(key, nouns.get(_wnid(key))) for key in self.whole()]
        (content,) = content_digests([Extent(self._file())], self.root)
        return hashlib.sha256(repr((self.name, content, named)).encode()).hexdigest()[:16]

    def faults(self, listed: Mapping[str, int]) -> Iterator[tuple[str, Collection[str]]]:
        nouns = self._words()
        keys = [key for key in listed if _wnid(key) not in nouns]
        unknown = sorted(set(map(_wnid, keys)))
        named = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        if unknown:
            yield (
                f"Unknown words: {len(unknown)} WordNet ids of {self._file()} are not in {self._words_name()} ({named}): "
                "set dataset.words to a CSV that names them.",
                keys,
            )

    def _pixels(self, key: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._file()
        with _layout(path, f"{key}: reading row {row}"):
            file = self._handle(path)
            photo = file[file["value/img"][row, 0]]
            cell = _small(file[file["value/gt"][row, 0]])
            drawn = file[cell[0, 0]]
            if (photo.ndim != 2 and (photo.ndim != 3 or photo.shape[0] != 3)) or photo.dtype != np.uint8:
                raise ValueError(f"the image is {photo.dtype} {photo.shape}, uint8 (3, width, height) was wanted")
            if drawn.ndim != 2 or drawn.dtype not in (np.uint8, np.bool_):
                raise ValueError(f"the mask is {drawn.dtype} {drawn.shape}, uint8 (width, height) was wanted")
            stored, annotation = _values(photo, 3 * MAX_PIXELS), _values(drawn, MAX_PIXELS)
            if stored.ndim == 2:  # a grey image; MATLAB drops the third axis
                stored = np.stack([stored] * 3)
        # MATLAB stores columns first: [3 W H] is the image, [W H] its mask.
        image = np.ascontiguousarray(stored.transpose(2, 1, 0))
        mask = np.ascontiguousarray(annotation.T.astype(np.uint8))
        check_mask(image, mask, key, (1,), "0, 1")
        return image, mask

    def _handle(self, path: Path) -> Any:
        """This thread's open file; a forked child opens its own."""
        held = getattr(self._handles, "held", None)
        if held is None or held[0] != os.getpid():
            held = self._handles.held = (os.getpid(), _open(path))
        return held[1]

    def _words(self) -> Mapping[str, tuple[str, str]]:
        if self._nouns is None:
            self._nouns = imagenet_nouns() if self.words_path is None else _read_words(self.words_path)
        return self._nouns

    def _words_name(self) -> str:
        return "the shipped table of nouns" if self.words_path is None else str(self.words_path)

    def _file(self) -> Path:
        self.check_root()
        root = self.root
        if root.is_file():
            return root
        if not root.is_dir():
            raise DataError(f"Reading {self.name}: {root} is neither a folder nor a regular file.\n  {REMEDY}")
        if (root / FILE).is_file():
            return root / FILE
        found = sorted(root.glob("*.mat"))
        if len(found) == 1:
            return found[0]
        names = f"{len(found)} .mat files ({', '.join(p.name for p in found[:5])})" if found else "no .mat file"
        raise DataError(f"Reading {self.name}: {root} holds {names}; {FILE} was wanted.\n  {REMEDY}")


def _wnid(key: str) -> str:
    return key.rpartition("/")[2].partition("_")[0]


def _open(path: Path) -> Any:
    import h5py

    # Read-only network disks refuse HDF5's file lock; nobody writes here.
    return h5py.File(path, "r", locking="best-effort")


def _check_inside(file: Any) -> None:
    """HDF5 may hold links to other files; `value` and its parts have to be in this one. Raises ValueError."""
    import h5py

    for name in ("value", *(f"value/{part}" for part in _PARTS)):
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{name} is a link ({type(link).__name__}); contents of this file were wanted")
    for part in _PARTS:
        rows = file[f"value/{part}"]
        if rows.ndim != 2 or rows.shape[1] != 1 or rows.dtype != h5py.ref_dtype or len(rows) > _MOST_ROWS:
            raise ValueError(f"value/{part} is {rows.dtype} {rows.shape}, references (rows, 1) were wanted")
        _check_stored(rows, _MOST_ROWS)


def _check_stored(stored: Any, most: int) -> None:
    """Check an HDF5 data set before reading it: its values lie in this file and are few enough. Raises ValueError."""
    if stored.external or stored.is_virtual:
        raise ValueError(f"{stored.name} keeps its values in other files; contents of this file were wanted")
    claimed = max(stored.size, math.prod(stored.chunks or (0,)))
    if claimed > most:
        raise ValueError(f"{stored.name} claims {claimed:,} values {stored.shape}; at most {most:,} are read")


def _values(stored: Any, most: int) -> np.ndarray:
    _check_stored(stored, most)
    found: np.ndarray = stored[()]
    return found


def _small(cell: Any) -> np.ndarray:
    return _values(cell, _LONGEST_ID)


def _text(file: Any, reference: Any) -> str:
    """MATLAB text: one UTF-16 code unit a number."""
    return np.asarray(_small(file[reference]), "<u2").tobytes().decode("utf-16-le")


@contextmanager
def _layout(path: Path, attempt: str) -> Iterator[None]:
    """Turns what h5py says about a damaged or foreign file into a DataError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        with open_regular(path) as file:
            old_matlab = file.read(14).startswith((b"MATLAB 5.0", b"MATLAB 6"))
        if old_matlab:
            state = "is a MATLAB 5 file; MATLAB 7.3 (HDF5) was wanted"
        elif "signature not found" in str(error):
            state = "is not an HDF5 file, or lost its beginning"
        else:
            state = f"is damaged or cut short at {path.stat().st_size} bytes ({one_line(error)})"
        raise DataError(f"{path}, {attempt}: the file {state}.\n  {REMEDY}") from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise DataError(
            f"{path}, {attempt}: the file is HDF5, but not laid out as {FILE} (value/img, value/gt, value/id): "
            f"{one_line(error)}.\n  {REMEDY}"
        ) from error


def _read_words(path: Path) -> Mapping[str, tuple[str, str]]:
    nouns: dict[str, tuple[str, str]] = {}
    where = f"dataset.words={path}"
    for line, row in read_rows(path, _COLUMNS, where):
        wnid, lemma, noun = (row[column].strip() for column in _COLUMNS)
        if not noun:
            raise DataError(f"{where}, line {line}, gives no noun for {wnid}.\n  Fill the column noun.")
        if nouns.setdefault(wnid, (lemma, noun)) != (lemma, noun):
            raise DataError(
                f'{where}, line {line}: {wnid} is "{nouns[wnid][1]}" above and "{noun}" here.\n  Keep one of the lines.'
            )
    return nouns
