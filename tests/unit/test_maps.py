"""conceptseg/store/maps.py: a picture belongs to its sample, whatever letters the sample's key is made of."""

from __future__ import annotations

import logging
import tarfile
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from conceptseg.store.maps import MapKeeper, file_name
from conceptseg.types import Concepts, Prediction, Task

KEYS = [
    "trips/苹果", "trips/香蕉", "trips/trip 1", "trips/trip_1", "trips/trip:1", "trips/trip/1", "trips/A", "trips/a", "trips/..",
    "trips/" + "x" * 300,
    "trips/" + "x" * 299 + "y", "trips/ü", "trips/u\u0308", "..", "a.map", "a", "trips/\ud800", "trips/a\nb",
]  # fmt: skip


def kept(folder, key, value, view="map", **more):
    """Keep a map whose labels are all `value`, and the keeper that did it."""
    truth = np.ones((4, 4), np.uint8)
    task = Task(key, np.zeros((4, 4, 3), np.float32), truth, Concepts(("dot", "sky"), (1, 0), 0), "a dot", (0, 1))
    keeper = MapKeeper(folder, frozenset(["map", "Map", "m p", "m_p"]), lambda: KEYS, **more)
    prediction = Prediction(np.full((4, 4), value, np.uint8), np.zeros((2, 4, 4), np.float32))
    keeper.keep(task, view, "mean@grid/nearest", np.random.default_rng(value).random((2, 2, 2)), prediction)
    return keeper


def test_every_sample_has_a_picture_of_its_own(tmp_path):
    for number, key in enumerate(KEYS):
        keeper = kept(tmp_path, key, number)
    for number, key in enumerate(KEYS):
        assert keeper.read(key, "map", "mean@grid/nearest")[1].tolist() == [[number] * 4] * 4
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    with tarfile.open(file) as archive:
        assert len({*archive.getnames()}) == len(archive.getnames()) == 2 * len(KEYS)


@pytest.mark.parametrize(("one", "other"), [("Map", "map"), ("m p", "m_p")])
def test_every_view_has_pictures_of_its_own(tmp_path, one, other):
    kept(tmp_path, "a", 1, one)
    keeper = kept(tmp_path, "a", 2, other)
    assert [keeper.read("a", view, "mean@grid/nearest")[1][0, 0] for view in (one, other)] == [1, 2]


def test_names_are_short_and_differ_also_where_case_is_folded():
    parts = [(key, what) for key in KEYS for what in ("map", "b.map", "mean@grid/nearest")]
    names = [file_name(*part) for part in parts]
    assert all(one.casefold() != other.casefold() for one, other in combinations(names, 2))
    assert all(len(name) < 200 and name.isascii() and "/" not in name and not name.startswith(".") for name in names)


def older(folder, name, value):
    """Files as versions before this one named them."""
    (folder / "map").mkdir(exist_ok=True)
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(folder / "map" / f"{name}.map.png")
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(folder / "map" / f"{name}.mean_grid_nearest.png")


def test_older_maps_are_read_where_one_sample_alone_can_have_made_them(tmp_path, caplog):
    older(tmp_path, "voc_7", 3)
    older(tmp_path, "trips_trip_1", 4)
    keeper = MapKeeper(tmp_path, frozenset(), lambda: ["voc/7", "voc/8", "trips/trip 1", "trips/trip_1"])
    assert keeper.read("voc/7", "map", "mean@grid/nearest")[1][0, 0] == 3
    assert keeper.read("trips/trip 1", "map", "mean@grid/nearest") is None and "share this file" in caplog.text
    assert keeper.read("x" * 300, "map", "mean@grid/nearest") is None


@pytest.mark.parametrize(
    "spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\0" * 50, lambda b: b[:20] + b"x" + b[21:]]
)
def test_a_damaged_file_of_a_map_is_left_out_with_a_word(tmp_path, caplog, spoil):
    older(tmp_path, "a", 1)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(spoil(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert MapKeeper(tmp_path, frozenset(), lambda: ["a"]).read("a", "map", "mean@grid/nearest") is None
    assert len(caplog.messages) == 1 and "sample a is left out" in caplog.text


def shown(folder):
    """The value of each sample's labels, by the first ten keys, None where a sample has none."""
    found = [MapKeeper(folder, frozenset()).read(key, "map", "mean@grid/nearest") for key in KEYS[:10]]
    return [None if one is None else int(one[1][0, 0]) for one in found]


def test_a_file_cut_at_any_byte_keeps_all_whole_maps_and_goes_on(tmp_path):
    for number, key in enumerate(KEYS[:3]):
        kept(tmp_path, key, number)
    (file,) = tmp_path.rglob("*.tar")
    whole, ends = file.read_bytes(), [0]
    with tarfile.open(file) as archive:
        ends += [entry.offset_data + 512 * -(-entry.size // 512) for entry in archive]
    for cut in {*range(0, len(whole), 101), *(end + step for end in ends for step in (-1, 0, 1)), len(whole) - 1} - {-1}:
        file.write_bytes(whole[:cut])
        pairs = sum(end <= cut for end in ends[2::2])
        assert shown(tmp_path)[:3] == [number if number < pairs else None for number in range(3)], cut
        kept(tmp_path, KEYS[2], 2)
        for number in range(2):
            kept(tmp_path, KEYS[number], number)
        assert shown(tmp_path)[:3] == [0, 1, 2] and file.stat().st_size == len(whole), cut


def test_a_damaged_byte_costs_its_own_map_and_is_said(tmp_path, caplog):
    for number, key in enumerate(KEYS[:3]):
        kept(tmp_path, key, number)
    (file,) = tmp_path.rglob("*.tar")
    whole = file.read_bytes()
    with tarfile.open(file) as archive:
        second = archive.getmembers()[2]
    for at in (second.offset, second.offset + 130, second.offset_data + 20):  # name, size, pixels
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        caplog.clear()
        assert shown(tmp_path)[:3] == [0, None, 2] and "damaged" in caplog.text
        kept(tmp_path, KEYS[3], 3)
        assert shown(tmp_path)[:4] == [0, None, 2, 3]
        file.write_bytes(whole)


def test_shards_have_files_of_their_own_and_the_same_map_is_kept_once(tmp_path):
    for shard in range(3):
        keeper = kept(tmp_path, KEYS[shard], shard, shard=shard, count=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"maps-{shard}of3.tar" for shard in range(3)]
    assert shown(tmp_path)[:3] == [0, 1, 2] and keeper.read(KEYS[0], "map", "mean@grid/nearest") is not None
    before = (tmp_path / "maps-1of3.tar").read_bytes()
    kept(tmp_path, KEYS[1], 1, shard=1, count=3)
    assert (tmp_path / "maps-1of3.tar").read_bytes() == before
    kept(tmp_path, KEYS[1], 7, shard=1, count=3)
    assert shown(tmp_path)[1] == 7


def test_a_map_that_was_never_kept_is_none_without_a_word(tmp_path, caplog):
    assert MapKeeper(tmp_path, frozenset()).read("a", "map", "mean@grid/nearest") is None and not caplog.messages
