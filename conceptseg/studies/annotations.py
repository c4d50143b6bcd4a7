"""Annotation of generated images in COCO's JSON, which labelling tools read and write: proposals out, truth masks in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from conceptseg.data.images import MAX_PIXELS
from conceptseg.errors import DataError
from conceptseg.reading import read_json
from conceptseg.studies.folders import file_of, generations, predict, write_mask


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """COCO's uncompressed run lengths: column by column, background first.

    >>> run_lengths(np.array([[False, True], [False, True]]))
    [2, 2]
    """
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges.tolist(), flat.size]).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def mask_of(segmentation: Any, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """The mask of a COCO segmentation (polygons, or uncompressed run lengths), size as (rows, columns)."""
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if not isinstance(counts, list):
            raise DataError("a COCO segmentation is compressed; export it as polygons or as uncompressed run lengths (a list).")
        if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            raise DataError(f"a COCO segmentation has run lengths of {sum(counts)} pixels, its image {size[0]} x {size[1]}.")
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return flat.reshape(size[1], size[0]).T.copy()
    canvas = Image.new("1", (size[1], size[0]))
    for polygon in segmentation:
        ImageDraw.Draw(canvas).polygon([(x, y) for x, y in zip(polygon[::2], polygon[1::2], strict=True)], fill=1)
    return np.asarray(canvas, dtype=bool)


def export_coco(root: Path, file: Path, threshold: float = 0.4, proposals: bool = True) -> dict[str, Any]:
    """Write images, nouns as categories, and DAAM's masks as proposals to be corrected (none if not `proposals`)."""
    name = f"daam{threshold:g}"
    found = generations(root)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    words = sorted({word for one in found for word in one.maps()})
    numbers = {word: number for number, word in enumerate(words, 1)}
    for number, one in enumerate(found, 1):
        width, height = one.image.size
        images.append(
            {"id": number, "file_name": f"{one.id}/output.png", "width": width, "height": height, "caption": one.prompt}
        )
        if not proposals:
            continue
        predict(one, threshold, name)
        for word, mask in one.predictions(name).items():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [0, 0, 0, 0]
            if rows.size:
                box = [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "category_id": numbers[word], "iscrowd": 0, "bbox": box,
                    "area": int(mask.sum()), "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                }
            )  # fmt: skip
    body = {
        "info": {"description": "generated images with the nouns of their captions; masks are proposals, not truth"},
        "images": images, "annotations": annotations,
        "categories": [{"id": number, "name": word, "supercategory": "noun"} for word, number in numbers.items()],
    }  # fmt: skip
    file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return body


def _by_id(body: Mapping[str, Any], part: str, file: Path) -> dict[Any, Mapping[str, Any]]:
    found: dict[Any, Mapping[str, Any]] = {}
    for one in body[part]:
        if found.setdefault(one["id"], one) is not one:
            raise DataError(f"{file}: the id {one['id']} stands twice among its {part}; every one needs its own.")
    return found


def import_coco(root: Path, file: Path) -> int:
    """Write the masks of a COCO file as <word>.gt.png beside the images it names; several of one noun are joined."""
    try:
        return _import(root, file, read_json(file))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{file} is JSON, but not laid out as COCO's annotations: {type(error).__name__}: {error}.\n"
            "  Export it again in the COCO format, with images, categories and annotations."
        ) from error


def _import(root: Path, file: Path, body: Any) -> int:
    images = _by_id(body, "images", file)
    words = {number: str(one["name"]) for number, one in _by_id(body, "categories", file).items()}
    joined: dict[tuple[Path, str], Bool[np.ndarray, "H W"]] = {}
    for one in body["annotations"]:
        image = images[one["image_id"]]
        folder = (root / image["file_name"]).parent
        if not folder.resolve().is_relative_to(root.resolve()) or not folder.is_dir():
            raise DataError(f'{file}: the image "{image["file_name"]}" is not under {root}.')
        size = image["height"], image["width"]
        if not all(isinstance(side, int) and side > 0 for side in size) or size[0] * size[1] > MAX_PIXELS:
            raise DataError(
                f'{file}: the image "{image["file_name"]}" is {size[0]} x {size[1]}; at most {MAX_PIXELS:,} pixels fit.'
            )
        mask = mask_of(one["segmentation"], size)
        key = folder, words[one["category_id"]]
        joined[key] = joined[key] | mask if key in joined else mask
    for (folder, word), mask in joined.items():
        write_mask(folder / f"{file_of(word)}.gt.png", mask)
    return len(joined)
