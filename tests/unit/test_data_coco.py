"""conceptseg/data/coco.py: masks as pycocotools draws them, and nothing that it would read from beside its memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.coco import Coco, decode
from conceptseg.errors import ConfigError, DataError

drawing = pytest.importorskip("pycocotools.mask")

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "big cat"}, {"id": 90, "name": "cup"}]
SQUARE = [[1, 1, 4, 1, 4, 4, 1, 4]]


def packed(mask):
    found = drawing.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def runs_of(mask):
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), len(flat)]
    return [0] * int(flat[0]) + [int(n) for n in np.diff(edges)]


def test_run_lengths_are_those_of_pycocotools():
    draw = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (64, 3), (300, 200)):
        for share in (0, 0.02, 0.5, 1):
            mask = draw.random((height, width)) < share
            assert np.array_equal(decode(packed(mask), height, width, "a"), mask)
            assert np.array_equal(decode({"size": [height, width], "counts": runs_of(mask)}, height, width, "a"), mask)


def test_polygons_are_those_of_pycocotools():
    draw = np.random.default_rng(1)
    for _ in range(20):
        polygons = [draw.uniform(-3, 40, 2 * draw.integers(3, 9)).tolist() for _ in range(draw.integers(1, 4))]
        wanted = drawing.decode(drawing.merge(drawing.frPyObjects(polygons, 30, 37))).astype(bool)
        assert wanted.any() and np.array_equal(decode(polygons, 30, 37, "a"), wanted)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": [4, 4], "counts": [5, 5]}, "add up"),
        ({"size": [4, 4], "counts": [-5, 21]}, "add up"),
        ({"size": [4, 4], "counts": ""}, "add up"),
        ({"size": [4, 4], "counts": "\0\1"}, "byte 0"),
        ({"size": [4, 4], "counts": "é"}, "add up"),
        ({"size": [4, 4], "counts": "o" * 99}, "none of theirs"),
        ({"size": [4, 4], "counts": "o"}, "end within"),
        ({"size": [9, 9], "counts": [81]}, "size"),
        ([], "no segmentation"),
        ([[1, 1, 2, 2]], "three or more"),
        ([[1, 1, 2, 2, 3, float("nan")]], "no number"),
        ([[1, 1, 2, 2, 3, 1e12]], "far outside"),
        ([[1, 1, 2, 2, 3, 10**400]], "far outside"),
        ([[5, 5, 9, 5, 9, 9]], "lie outside"),
        (None, "no segmentation"),
    ],
)
def test_what_can_not_be_a_mask_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        decode(given, 4, 4, "a")


@pytest.fixture
def write(tmp_path):
    def written(annotations, images=None, categories=CATEGORIES):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "val" / "7.png")
        images = images or [{"id": 7, "file_name": "7.png", "height": 6, "width": 8}]
        body = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "a.json").write_text(json.dumps(body))
        return tmp_path

    return written


def instance(category, segmentation, number=1, crowd=0, image=7):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": crowd}


def test_instances_become_classes_and_what_two_of_them_claim_is_void(write):
    left, right = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    left[:, :4], right[:, 3:6] = True, True
    crowd = np.ones((6, 8), bool)
    root = write([instance(3, packed(left)), instance(18, packed(right), 2), instance(3, {**packed(crowd)}, 3, 1)])
    data = Coco(root, "a.json", "val")
    sample = data.read("a/7")
    assert sample.mask[0].tolist() == [1, 1, 1, 255, 2, 2, 255, 255] and sample.words == {1: "big cat", 2: "dog"}
    assert data.problems() == [] and len(data.keys()) == 1
    asked = Coco(root, "a.json", "val", classes={"big cat": "animal", "dog": "animal"}).read("a/7")
    assert asked.mask[0].tolist() == [1, 1, 1, 1, 1, 1, 255, 255] and asked.words == {1: "animal"}
    assert Coco(root, "a.json", "val", classes=["dog"]).read("a/7").mask[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match='"big cat"'):
        Coco(root, "a.json", "val", classes=["bigcat"]).keys()
    fingerprints = {Coco(root, "a.json", "val", classes=c).fingerprint() for c in (None, ["dog"], {"dog": "hound"})}
    assert len(fingerprints) == 3 and Coco(root, "a.json", "val", limit=1).fingerprint() in fingerprints


def test_panoptic_numbers_become_classes(write):
    segments = [{"id": 5, "category_id": 3, "iscrowd": 0}, {"id": 70_000, "category_id": 18, "iscrowd": 1}]
    root = write([{"image_id": 7, "file_name": "7.png", "segments_info": segments}])
    numbers = np.zeros((6, 8), np.int64)
    numbers[:, :2], numbers[:, 2:5] = 5, 70_000
    coloured = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)
    (root / "seg").mkdir()
    Image.fromarray(coloured).save(root / "seg" / "7.png")
    data = Coco(root, "a.json", "val", "seg")
    sample = data.read("a/7")
    assert sample.mask[0].tolist() == [1, 1] + [255] * 6 and sample.words == {1: "big cat"}

    def read(*segments, times=1):
        write([{"image_id": 7, "file_name": "7.png", "segments_info": segments}] * times)
        return Coco(root, "a.json", "val", "seg").read("a/7")

    zero, twice, absent = {"id": 0, "category_id": 3}, {**segments[0], "category_id": 18}, {"id": 8, "category_id": 3}
    for strange, message in (
        (zero, "segment 0; distinct"),
        (twice, "segment 5; distinct"),
        (absent, "segment 8, which .* not show"),
    ):
        with pytest.raises(DataError, match=message):
            read(*segments, strange)
    with pytest.raises(DataError, match="image 7 has two lists"):
        read(*segments, times=2)
    read(*segments)
    before = data.fingerprint()
    coloured[0, 7] = 9, 0, 0
    Image.fromarray(coloured).save(root / "seg" / "7.png")
    with pytest.raises(DataError, match="segment 9"):
        data.read("a/7")
    assert Coco(root, "a.json", "val", "seg").fingerprint() != before
    with pytest.raises(ConfigError, match=r"dataset\.segments"):
        Coco(root, "a.json", "val").keys()


@pytest.mark.parametrize(
    ("annotations", "images", "message"),
    [
        ([instance(4, SQUARE)], None, "category 4"),
        ([instance(3, SQUARE, image=8)], None, "image 8, which is not listed"),
        ([instance(3, SQUARE, image=[7])], None, r"image \[7\], which is not listed"),
        ([instance([3], SQUARE)], None, r"category \[3\]"),
        ([{**instance(3, SQUARE), "iscrowd": "0"}], None, "iscrowd is '0'"),
        ([], [{"id": 7, "file_name": "\ud800.png", "height": 6, "width": 8}], "not in"),
        ([], [{"id": 7, "file_name": "../a.json", "height": 6, "width": 8}], "not in"),
        ([], [{"id": 7, "file_name": "7.png", "height": 8, "width": 6}], "8 x 6"),
        ([], [{"id": 7, "file_name": "7.png", "height": 10**6, "width": 10**6}], "can't be"),
        ([], [{"id": 7, "file_name": "7.png"}, {"id": 7, "file_name": "8.png"}], "no distinct"),
    ],
)
def test_annotations_that_do_not_hold_together_are_refused(write, annotations, images, message):
    data = Coco(write(annotations, images), "a.json", "val")
    with pytest.raises(DataError, match=message):
        data.read(data.keys()[0])


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="COCO's object"):
        Coco(tmp_path, "a.json", "val").keys()
