"""conceptseg/store/maps.py: a picture belongs to its sample, whatever letters the sample's key is made of."""

from __future__ import annotations

import logging
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


def kept(folder, key, value, view="map"):
    """Keep a map whose labels are all `value`, and the keeper that did it."""
    truth = np.ones((4, 4), np.uint8)
    task = Task(key, np.zeros((4, 4, 3), np.float32), truth, Concepts(("dot", "sky"), (1, 0), 0), "a dot", (0, 1))
    keeper = MapKeeper(folder, frozenset(["map", "Map", "m p", "m_p"]), lambda: KEYS)
    prediction = Prediction(np.full((4, 4), value, np.uint8), np.zeros((2, 4, 4), np.float32))
    keeper.keep(task, view, "mean@grid/nearest", np.random.default_rng(value).random((2, 2, 2)), prediction)
    return keeper


def test_every_sample_has_a_picture_of_its_own(tmp_path):
    for number, key in enumerate(KEYS):
        keeper = kept(tmp_path, key, number)
    for number, key in enumerate(KEYS):
        assert keeper.read(key, "map", "mean@grid/nearest")[1].tolist() == [[number] * 4] * 4
    assert all(tmp_path in file.parents for file in tmp_path.rglob("*.png")) and len(list(tmp_path.rglob("*.png"))) == 2 * len(
        KEYS
    )


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
def test_a_damaged_map_is_left_out_with_a_word(tmp_path, caplog, spoil):
    keeper = kept(tmp_path, "a", 1)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(spoil(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert keeper.read("a", "map", "mean@grid/nearest") is None
    assert len(caplog.messages) == 1 and "sample a is left out" in caplog.text


def test_a_map_that_was_never_kept_is_none_without_a_word(tmp_path, caplog):
    assert MapKeeper(tmp_path, frozenset()).read("a", "map", "mean@grid/nearest") is None and not caplog.messages
