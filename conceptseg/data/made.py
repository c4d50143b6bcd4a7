"""Writes drawn scenes in the layouts of the real data sets, for tests and demonstrations without a download.

The classes are filler: a drawn object takes a fixed PascalVOC class or WordNet id that exists, whatever it shows.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptseg.data.drawings import OBJECTS
from conceptseg.data.images import MaskEncoding, voc_colour
from conceptseg.data.scenes import VOID, Scene, draw_scene

# Only the boat is what its class says.
VOC_CLASS: dict[str, int] = {
    "apple": 5, "tree": 16, "house": 6, "fish": 12, "boat": 4, "sun": 20, "flower": 9, "kite": 1, "clock": 11,
    "mushroom": 18, "cloud": 17, "ball": 2,
}  # fmt: skip
WNID: dict[str, str] = {
    "apple": "n02474777", "tree": "n04335886", "house": "n03796401", "fish": "n02064000", "boat": "n02981792",
    "sun": "n02782329", "flower": "n04292572", "kite": "n02782093", "clock": "n03721384", "mushroom": "n02454379",
    "cloud": "n02412210", "ball": "n00471613",
}  # fmt: skip
MAT_HEADER = b"MATLAB 7.3 MAT-file, made from drawn scenes in the layout of gtsegs_ijcv.mat"


def made_scenes(count: int, seed: int = 0, height: int = 48, width: int = 64) -> list[Scene]:
    """Scenes that are wider than high, so that a transposed reading can't pass unnoticed; each shows an object."""
    scenes: list[Scene] = []
    index = 0
    while len(scenes) < count:
        scene = draw_scene("val", seed, index, size=max(height, width))
        scene = replace(scene, image=scene.image[:height, :width].copy(), mask=scene.mask[:height, :width].copy())
        if ((scene.mask > 0) & (scene.mask != VOID)).any():
            scenes.append(scene)
        index += 1
    return scenes


def voc_mask(scene: Scene) -> np.ndarray:
    """The scene's mask in PascalVOC classes; the rim stays void."""
    table = np.arange(256, dtype=np.uint8)
    for label, word in enumerate(OBJECTS, 1):
        table[label] = VOC_CLASS[word]
    return table[scene.mask]


def main_word(scene: Scene) -> str:
    """The object that covers most pixels."""
    return OBJECTS[int(np.bincount(scene.mask.ravel(), minlength=256)[1:VOID].argmax())]


def write_voc(
    folder: Path, scenes: Sequence[Scene], split: str = "val", year: str = "2012", encoding: MaskEncoding = "index"
) -> Path:
    """The development kit's folders below `folder`; returns VOCdevkit. Masks are palette PNG, or RGB where asked for."""
    for member, content in _voc_files(scenes, split, year, encoding):
        path = folder / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / "VOCdevkit"


def write_voc_tar(
    path: Path, scenes: Sequence[Scene], split: str = "val", year: str = "2012", encoding: MaskEncoding = "index"
) -> Path:
    """The same files in a tar laid out like VOCtrainval_11-May-2012.tar; the same scenes give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for member, content in _voc_files(scenes, split, year, encoding):
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_mat(path: Path, scenes: Sequence[Scene], ids: Sequence[str] | None = None) -> Path:
    """A file like gtsegs_ijcv.mat: object references, columns first, UTF-16 ids. Mask 1 is the main object without its rim."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{WNID[main_word(scene)]}_{row}" for row, scene in enumerate(scenes)] if ids is None else list(ids)
    with h5py.File(path, "w", userblock_size=512) as file:
        parts: dict[str, list[Any]] = {"gt": [], "id": [], "img": [], "target": []}
        for row, (scene, name) in enumerate(zip(scenes, names, strict=True)):
            mask = (scene.mask == OBJECTS.index(main_word(scene)) + 1).astype(np.uint8)
            annotation = _matlab(file, f"gt{row}", mask.T, "uint8")
            cell = file.create_dataset(f"#refs#/gtcell{row}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = annotation.ref
            cell.attrs["MATLAB_class"] = np.bytes_("cell")
            parts["gt"].append(cell.ref)
            parts["id"].append(_matlab(file, f"id{row}", _utf16(name), "char").ref)
            parts["img"].append(_matlab(file, f"img{row}", scene.image.transpose(2, 1, 0), "uint8").ref)
            parts["target"].append(_matlab(file, f"t{row}", _utf16(name.partition("_")[0]), "char").ref)
        for part, references in parts.items():
            column = file.create_dataset(f"value/{part}", (len(references), 1), h5py.ref_dtype)
            for row, reference in enumerate(references):
                column[row, 0] = reference
            column.attrs["MATLAB_class"] = np.bytes_("cell")
        file["value"].attrs["MATLAB_class"] = np.bytes_("struct")
    with path.open("r+b") as block:  # the 512 bytes before the HDF5 part
        block.write(MAT_HEADER.ljust(124) + b"\x00\x02IM")
    return path


def write_hub(folder: Path, scenes: Sequence[Scene], split: str = "val", encoding: MaskEncoding = "index") -> Path:
    """A DatasetDict with one split and the columns id, image, mask (PascalVOC classes), written by `save_to_disk`."""
    from datasets import DatasetDict

    DatasetDict({split: _table(scenes, encoding)}).save_to_disk(str(folder))
    return folder


def write_parquet(folder: Path, scenes: Sequence[Scene], split: str = "val", encoding: MaskEncoding = "index") -> Path:
    """The same table as one parquet shard, laid out like a repository on the Hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _table(scenes, encoding).to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def _table(scenes: Sequence[Scene], encoding: MaskEncoding) -> Any:
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    rows = {
        "id": [_stem("2012", row) for row in range(len(scenes))],
        "image": [{"bytes": _jpeg(scene.image), "path": None} for scene in scenes],
        "mask": [{"bytes": mask_png(voc_mask(scene), encoding), "path": None} for scene in scenes],
    }
    return Dataset.from_dict(rows, features=Features({"id": Value("string"), "image": Picture(), "mask": Picture()}))


def _voc_files(scenes: Sequence[Scene], split: str, year: str, encoding: MaskEncoding) -> Iterator[tuple[str, bytes]]:
    base = f"VOCdevkit/VOC{year}"
    listed = "".join(f"{_stem(year, row)}\n" for row in range(len(scenes)))
    yield f"{base}/ImageSets/Segmentation/{split}.txt", listed.encode()
    for row, scene in enumerate(scenes):
        yield f"{base}/JPEGImages/{_stem(year, row)}.jpg", _jpeg(scene.image)
        yield f"{base}/SegmentationClass/{_stem(year, row)}.png", mask_png(voc_mask(scene), encoding)


def _stem(year: str, row: int) -> str:
    return f"{year}_{row:06d}"


def _jpeg(image: np.ndarray) -> bytes:
    return _encoded(Image.fromarray(image), "JPEG", quality=95)


def mask_png(mask: np.ndarray, encoding: MaskEncoding = "index") -> bytes:
    """A mask with the VOC colour map as its palette, or painted in it."""
    picture = Image.fromarray(mask)
    picture.putpalette([part for index in range(256) for part in voc_colour(index)])
    return _encoded(picture.convert("RGB") if encoding == "rgb" else picture, "PNG")


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _matlab(file: Any, name: str, values: np.ndarray, kind: str) -> Any:
    stored = file.create_dataset(f"#refs#/{name}", data=values, compression="gzip" if kind == "uint8" else None)
    stored.attrs["MATLAB_class"] = np.bytes_(kind)
    if kind == "char":
        stored.attrs["MATLAB_int_decode"] = np.int32(2)
    return stored


def _utf16(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-16-le"), "<u2")[:, None]
