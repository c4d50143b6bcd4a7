"""Annotations in COCO's JSON: instances (polygons, run lengths) and panoptic (a PNG of segment numbers an image).

Source: Lin et al., Microsoft COCO, ECCV 2014, arXiv:1405.0312; format: https://cocodataset.org/#format-data. Polygons are drawn
by pycocotools. Pixels of two classes' instances are void, as torchvision's references/segmentation/coco_utils.py makes them; so
are crowds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from conceptseg.data.images import (
    MAX_PIXELS,
    check_shape,
    orientation_note,
    present_labels,
    read_image,
)
from conceptseg.data.listed import ListedDataset
from conceptseg.errors import ConfigError, DataError, did_you_mean
from conceptseg.reading import LARGEST_FILE, path_inside, read_json
from conceptseg.types import BACKGROUND, VOID, Sample, check_distinct, checked_word

_BEYOND = 4
"""How many image sides a polygon's corner may lie outside: pycocotools steps along every edge, however far it leads."""


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image of an annotation file: its id, its file, the PNG of its segments if they are panoptic, and its size as said."""

    id: int
    image: Path
    segments: Path | None
    height: Any
    width: Any


class Coco(ListedDataset[ListedImage]):
    """The images of one annotation file.

    root: the folder that the other paths are taken in. annotations: the JSON file. images: folder of the images. segments: for
    panoptic annotations, the folder of their PNGs. classes: categories to read, as a list of names or a map of names to the
    words to ask for (several categories may share one); null takes all under their names. Others are background.
    """

    def __init__(
        self,
        root: str | Path,
        annotations: str,
        images: str,
        segments: str | None = None,
        classes: Sequence[Any] | Mapping[Any, Any] | None = None,
        limit: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(root, limit)
        self.annotations, self.images, self.segments = annotations, images, segments
        self.classes = _checked_classes(classes)
        self.name = name or Path(annotations).stem
        self._content: _Annotations | None = None

    def entries(self) -> Iterator[tuple[str, ListedImage]]:
        """(file name without its ending, entry) of every image, in the order of their ids."""
        content = self._read_annotations()
        for one in sorted(content.images, key=lambda one: one["id"]):
            name = one["file_name"]
            path = self._file(self.images, name, name)
            segments = None
            if content.panoptic:
                if not content.by_image[one["id"]]:
                    raise DataError(f"{content.where} holds no segments for {name}.\n  Take the file from the source again.")
                segments = self._file(str(self.segments), content.by_image[one["id"]][0].get("file_name"), name)
            yield name.rpartition(".")[0] or name, ListedImage(one["id"], path, segments, one.get("height"), one.get("width"))

    def sample(self, key: str, entry: ListedImage) -> Sample:
        image = read_image(entry.image, key)
        mask = self._instances(key, entry) if entry.segments is None else self._panoptic(key, entry.id, entry.segments)
        check_shape(image, mask, key, lambda: orientation_note(entry.image, key, str(entry.image), applied=True))
        words = self._read_annotations().words
        present = [label for label in present_labels(mask) if label not in (BACKGROUND, VOID)]
        return Sample(key, image, mask, {label: words[label] for label in present}, {"id": entry.id})

    def files(self, entry: ListedImage) -> list[Path]:
        return [entry.image] if entry.segments is None else [entry.image, entry.segments]

    def identity(self, entry: ListedImage) -> Any:
        """The entry's annotations and what their categories mean, but no path."""
        content = self._read_annotations()
        chosen = [annotation.get("category_id") for annotation in content.by_image[entry.id]]
        said = [entry.id, entry.height, entry.width, content.by_image[entry.id], [content.labels.get(c) for c in chosen]]
        return hashlib.sha256(repr([said, content.words]).encode()).hexdigest()

    def source(self) -> str:
        return str(self.root / self.annotations)

    # ------------------------------------------------------------ annotations

    def _read_annotations(self) -> _Annotations:
        if self._content is None:
            path = self.root / self.annotations
            where = f"annotations {path}"
            self._content = _Annotations(read_json(path, where, LARGEST_FILE), where, self.classes)
            if self._content.panoptic and self.segments is None:
                raise ConfigError(
                    f"{where} is panoptic: its masks are PNGs in a folder of their own.\n  Set dataset.segments to that folder, "
                    "such as annotations/panoptic_val2017."
                )
            if not self._content.panoptic and self.segments is not None:
                raise ConfigError(
                    f"dataset.segments is {self.segments}, but {where} holds instances, which need none. Set it to null."
                )
        return self._content

    def _file(self, folder: str, name: Any, key: str) -> Path:
        inside = path_inside(self.root / folder, name) if isinstance(name, str) and name else None
        if inside is None:
            raise DataError(
                f"{key}: the annotations name the file {name!r}, which is not in {self.root / folder}; other folders' files are "
                "not read.\n  Correct the name, or dataset.images."
            )
        return inside

    def _panoptic(self, key: str, image: int, path: Path) -> UInt8[np.ndarray, "H W"]:
        """Numbers are R + 256 G + 256² B; 0 is unlabelled, which is void."""
        content = self._read_annotations()
        coloured = read_image(path, key, f"of segments, {path}", upright=False).astype(np.int64)
        numbers = coloured @ np.array([1, 256, 65536])
        known: dict[int, int] = {0: VOID}
        for segment in _list(content.by_image[image][0], "segments_info", f"{key}: {content.where}"):
            label, number = content.label(segment, key), segment.get("id")
            if type(number) is not int or number in known:
                raise DataError(
                    f"{key}: {content.where} describes the segment {number!r}; distinct whole numbers above 0 were wanted.\n"
                    "  Export the file again."
                )
            known[number] = VOID if _is_crowd(segment, f"{key}: segment {number}") else label
        found, inverse = np.unique(numbers, return_inverse=True)
        if lacking := sorted(set(known) - {0, *map(int, found)}):
            raise DataError(
                f"{key}: {content.where} describes the segment {lacking[0]}, which {path} does not show.\n"
                "  Was the PNG resized, or is it of another file? Look at dataset.segments."
            )
        if strange := [int(n) for n in found if int(n) not in known]:
            raise DataError(
                f"{key}: {path} holds the segment {strange[0]}, which {content.where} does not describe.\n"
                "  Are the PNGs of this annotation file? Look at dataset.segments."
            )
        return np.array([known[int(n)] for n in found], np.uint8)[inverse].reshape(numbers.shape)

    def _instances(self, key: str, entry: ListedImage) -> UInt8[np.ndarray, "H W"]:
        content = self._read_annotations()
        height, width = _size(entry, key)
        mask, crowd = np.zeros((height, width), np.uint8), np.zeros((height, width), bool)
        for annotation in content.by_image[entry.id]:
            label = content.label(annotation, key)
            if label == BACKGROUND:
                continue
            where = f"{key}: annotation {annotation.get('id')}"
            covered = decode(annotation.get("segmentation"), height, width, where)
            if _is_crowd(annotation, where):
                crowd |= covered
            else:
                mask[covered & (mask != BACKGROUND) & (mask != label)] = VOID
                mask[covered & (mask == BACKGROUND)] = label
        mask[crowd & (mask == BACKGROUND)] = VOID
        return mask


class _Annotations:
    """The parts of an annotation file, checked. Raises DataError for another file, ConfigError for an unknown category."""

    def __init__(self, body: Any, where: str, classes: Mapping[str, str] | None) -> None:
        self.where = where
        if not isinstance(body, Mapping):
            raise DataError(
                f"{where} holds a {type(body).__name__}; COCO's object with images, annotations, categories was wanted."
            )
        self.images = _list(body, "images", where)
        annotations, categories = _list(body, "annotations", where), _list(body, "categories", where)
        ids = [one.get("id") for one in self.images]
        if any(type(i) is not int for i in ids) or len(set(ids)) < len(ids):
            raise DataError(f"{where}: the ids of images are no distinct whole numbers.\n  Export the file again.")
        if nameless := [one["id"] for one in self.images if not isinstance(one.get("file_name"), str)]:
            raise DataError(f"{where}: image {nameless[0]} has no file_name.\n  Export the file again.")
        self.by_image: dict[Any, list[Mapping[str, Any]]] = {one: [] for one in ids}
        for annotation in annotations:
            image = annotation.get("image_id")
            if type(image) is not int or image not in self.by_image:
                raise DataError(f"{where}: an annotation is of image {image!r}, which is not listed.\n  Export the file again.")
            self.by_image[image].append(annotation)
        self.panoptic = bool(annotations) and all("segments_info" in one for one in annotations)
        if self.panoptic and (twice := [image for image, said in self.by_image.items() if len(said) > 1]):
            raise DataError(f"{where}: image {twice[0]} has two lists of segments; one was wanted.\n  Export the file again.")
        numbers = [one.get("id") for one in categories]
        if any(type(n) is not int for n in numbers) or len(set(numbers)) < len(numbers):
            raise DataError(f"{where}: the ids of categories are no distinct whole numbers.\n  Export the file again.")
        names: dict[Any, Any] = {one["id"]: one.get("name") for one in sorted(categories, key=lambda one: int(one["id"]))}
        if nameless := [number for number, name in names.items() if not isinstance(name, str)]:
            raise DataError(f"{where}: category {nameless[0]} has no name.\n  Export the file again.")
        if classes is not None and (unknown := [name for name in classes if name not in names.values()]):
            raise ConfigError(f'dataset.classes names "{unknown[0]}". {did_you_mean(unknown[0], names.values())}')
        asked: dict[Any, str] = {}
        for number, name in names.items():
            if classes is None:
                asked[number] = checked_word(name, f"{where}: category {number}", DataError)
            elif name in classes:
                asked[number] = classes[name]
        words = list(dict.fromkeys(asked.values()))
        check_distinct(words, "dataset.classes" if classes is not None else where)
        if len(words) >= VOID:
            raise ConfigError(
                f"{where} has {len(words)} categories; at most {VOID - 1} are read. Choose some: dataset.classes=[...]."
            )
        self.words = dict(enumerate(words, 1))
        self.labels = {number: words.index(asked[number]) + 1 if number in asked else BACKGROUND for number in names}

    def label(self, annotation: Mapping[str, Any], key: str) -> int:
        category = annotation.get("category_id")
        if type(category) is not int or category not in self.labels:
            raise DataError(f"{key}: {self.where} holds the category {category!r}, which it does not list.")
        return self.labels[category]


def decode(segmentation: Any, height: int, width: int, where: str) -> Bool[np.ndarray, "H W"]:
    """The pixels of polygons [[x, y, x, y, ...], ...], or of run lengths {"size", "counts"}, which go down the columns.

    Counts are a list, or text in pycocotools' packing. `where` names the annotation in messages. Raises DataError for run lengths
    that do not add up to the image, and for polygons with fewer than three corners, corners that are no finite numbers or far
    outside, or no part in the image.
    """
    if isinstance(segmentation, Mapping):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise DataError(f"{where}: its run lengths are of an image of size {size}; [{height}, {width}] was wanted.")
        runs = unpacked(counts, where) if isinstance(counts, str | bytes) else counts
        if not isinstance(runs, list) or any(type(n) is not int or n < 0 for n in runs) or sum(runs) != height * width:
            raise DataError(
                f"{where}: its run lengths are no whole numbers that add up to {height} x {width}.\n  Export the file again."
            )
        filled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.ascontiguousarray(filled.reshape(width, height).T)
    if not isinstance(segmentation, list) or not segmentation:
        raise DataError(
            f"{where}: it has no segmentation; polygons or run lengths were wanted.\n  Export masks, not boxes alone."
        )
    far = _BEYOND * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise DataError(f"{where}: a polygon is no list of three or more corners x, y.\n  Export the file again.")
        if any(type(v) not in (int, float) or abs(v) > far or not math.isfinite(v) for v in polygon):
            raise DataError(f"{where}: a polygon has a corner that is no number, or far outside the image.\n  Export it again.")
    if not any(_reaches(polygon, height, width) for polygon in segmentation):
        raise DataError(
            f"{where}: its polygons lie outside the image of {height} x {width} (height x width).\n"
            "  Are the annotations those of this image, at this size?"
        )
    try:
        from pycocotools import mask as drawing
    except ImportError as error:
        raise ConfigError(
            f"{where}: polygons are drawn by pycocotools, which is not installed: pip install 'conceptseg[coco]'."
        ) from error
    covered = np.zeros((height, width), bool)
    for packed in drawing.frPyObjects(segmentation, height, width):
        covered |= drawing.decode(packed).astype(bool)
    return covered


def unpacked(counts: str | bytes, where: str) -> list[int]:
    """Run lengths from pycocotools' text: five bits a character, the sixth says that more follow; each from the fourth on is a
    difference to the one before last (common/maskApi.c, rleFrString). pycocotools itself reads counts that fall short of the
    image as whatever lies in memory, so they are unpacked and checked here. Raises DataError.

    >>> unpacked("52203", "a")
    [5, 2, 2, 2, 5]
    """
    codes = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for code in codes:
        part = code - 48
        if not 0 <= part < 64 or shift > 60:
            raise DataError(f"{where}: its packed run lengths hold the byte {code}, which is none of theirs.\n  Export it again.")
        value |= (part & 0x1F) << shift
        shift += 5
        if part & 0x20:
            continue
        if part & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise DataError(f"{where}: its packed run lengths end within a number.\n  Export it again.")
    return runs


def _reaches(polygon: Sequence[float], height: int, width: int) -> bool:
    """Whether the box around a polygon has a part in the image."""
    columns, rows = polygon[::2], polygon[1::2]
    return max(columns) >= 0 and min(columns) <= width and max(rows) >= 0 and min(rows) <= height


def _is_crowd(annotation: Mapping[str, Any], where: str) -> bool:
    crowd = annotation.get("iscrowd")
    if crowd not in (None, 0, 1) or isinstance(crowd, float):
        raise DataError(f"{where}: iscrowd is {crowd!r}; 0 or 1 was wanted.\n  Export the file again.")
    return bool(crowd)


def _size(entry: ListedImage, key: str) -> tuple[int, int]:
    height, width = entry.height, entry.width
    if type(height) is not int or type(width) is not int or height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"{key}: the annotations give its image the size {height!r} x {width!r} (height x width), which can't be."
        )
    return height, width


def _list(body: Mapping[str, Any], name: str, where: str) -> list[Mapping[str, Any]]:
    found = body.get(name)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise DataError(f'{where} has no list "{name}" of objects, as COCO\'s annotations have.\n  Is it the right file?')
    return found


def _checked_classes(classes: Sequence[Any] | Mapping[Any, Any] | None) -> dict[str, str] | None:
    """Category -> word. Raises ConfigError."""
    if classes is None:
        return None
    if isinstance(classes, str):
        raise ConfigError(f'dataset.classes is the text "{classes}"; wanted a list of categories, such as [cat,dog].')
    pairs = classes.items() if isinstance(classes, Mapping) else [(name, name) for name in classes]
    found = {checked_word(name, "dataset.classes"): checked_word(word, f"dataset.classes.{name}") for name, word in pairs}
    if not found:
        raise ConfigError("dataset.classes is empty: name at least one category, or set it to null for all.")
    return found
