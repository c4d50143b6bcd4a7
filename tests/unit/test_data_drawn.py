"""Drawn scenes as a data set."""

import numpy as np
import pytest

from conceptseg.data import drawn
from conceptseg.data.base import SegmentationDataset
from conceptseg.data.drawn import Scenes
from conceptseg.data.scenes import GROUNDS, OBJECTS, TINTS
from conceptseg.errors import ConfigError, DataError


def test_a_sample_names_what_its_mask_shows():
    scenes = Scenes(count=12)
    assert isinstance(scenes, SegmentationDataset) and scenes.problems() == [] and len(set(scenes.keys())) == 12
    for key in tuple(scenes.keys()):
        sample = scenes.read(key)
        assert set(sample.words) == set(np.unique(sample.mask).tolist()) - {0, 255}
        assert all(word == OBJECTS[label - 1] for label, word in sample.words.items())
        assert sample.about["ground"] in GROUNDS and set(sample.about["tints"].values()) <= set(TINTS)
        assert set(sample.words.values()) <= set(sample.about["tints"])


def test_keys_say_split_seed_and_number():
    assert Scenes("unseen", seed=4, count=13).keys()[12] == "scenes/unseen/4/00012"


def test_a_key_gives_the_same_scene_whatever_the_count():
    key = "scenes/val/0/00003"
    assert (Scenes(count=4).read(key).image == Scenes(count=40).read(key).image).all()


@pytest.mark.parametrize(
    "setting", [{"split": "train"}, {"seed": 1}, {"size": 48}, {"objects": [2, 3]}], ids=lambda s: next(iter(s))
)
def test_what_changes_a_scene_changes_the_fingerprint(setting):
    assert Scenes(count=1).fingerprint() == Scenes(count=8).fingerprint()  # so that a run can be continued with more scenes
    assert Scenes(count=8).fingerprint() == Scenes(count=8, objects=[1, 3]).fingerprint()
    assert Scenes(**{"count": 8, **setting}).fingerprint() != Scenes(count=8).fingerprint()


def test_the_fingerprint_notices_another_drawing(monkeypatch):
    before = Scenes(count=8).fingerprint()

    def paler(*arguments):
        scene = drawn.draw_scene(*arguments)
        scene.image[0, 0, 0] ^= 1
        return scene

    monkeypatch.setattr(drawn, "kept_scene", paler)
    assert Scenes(count=8).fingerprint() != before


@pytest.mark.parametrize(
    "setting",
    [{"split": "test"}, {"seed": -1}, {"count": 0}, {"size": 8}, {"objects": [0, 3]}, {"objects": [3, 2]}, {"objects": [1]}],
    ids=str,
)
def test_a_wrong_setting_is_refused(setting):
    with pytest.raises(ConfigError, match=f"dataset.{next(iter(setting))} is"):
        Scenes(**setting)


def test_a_key_of_another_set_is_refused():
    with pytest.raises(DataError, match='Did you mean "scenes/val/0/00003"'):
        Scenes(count=4).read("scenes/val/0/0003")
