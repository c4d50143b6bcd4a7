"""Drawn scenes as a data set."""

from dataclasses import replace

import numpy as np
import pytest

from conceptseg.data import drawn
from conceptseg.data.base import SegmentationDataset
from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS, standing_out
from conceptseg.data.drawn import Scenes
from conceptseg.errors import ConfigError, DataError
from conceptseg.metrics.average_precision import average_precision


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
    "setting",
    [
        {"split": "train"}, {"seed": 1}, {"size": 48}, {"objects": [2, 3]}, {"distractors": [3, 6]}, {"distractor_tints": 8},
        {"placement": "inside"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
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
    [
        {"split": "test"},
        {"seed": -1},
        {"count": 0},
        {"size": 8},
        {"objects": [0, 3]},
        {"objects": [3, 2]},
        {"objects": [1]},
        {"distractors": [3]},
        {"distractors": [4, 3]},
        {"distractors": [-1, 3]},
        {"distractor_tints": 0},
        {"distractor_tints": 9},
        {"placement": "everywhere"},
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(setting):
    with pytest.raises(ConfigError, match=f"dataset.{next(iter(setting))} is"):
        Scenes(**setting)


def test_litter_changes_no_object_and_takes_the_tints_that_stand_out():
    """Training scenes and data set scenes show the same objects; only unnamed things differ."""
    crowded, bare = Scenes(count=8, objects=(1, 1)), Scenes(count=8, objects=(1, 1), distractors=(0, 0))
    for key in crowded.keys():  # noqa: SIM118
        shown, alone = crowded.read(key), bare.read(key)
        assert shown.about == alone.about
        inside = (shown.mask > 0) & (shown.mask < 255)
        assert np.abs(shown.image.astype(int) - alone.image)[inside].max(initial=0) <= 26
    assert standing_out("snow", 3) == ("red", "green", "blue") and standing_out("brick", 8) == tuple(TINTS)


def contrast_finds(scenes):
    """How well the distance from the mean colour ranks the pixels of the one object."""
    found = []
    for key in scenes.keys():  # noqa: SIM118
        sample = scenes.read(key)
        distance = np.linalg.norm(sample.image - sample.image.mean((0, 1)), axis=-1)
        counted = sample.mask != 255
        found.append(average_precision(distance[counted], sample.mask[counted] > 0))
    return float(np.nanmean(found))


AS_IN_TRAINING = {"distractors": (3, 6), "distractor_tints": 8, "placement": "inside"}


def test_an_odd_colour_says_less_of_a_scene_of_the_data_set_than_of_a_training_scene():
    measured, training = (Scenes(count=120, objects=(1, 1), **s) for s in ({}, AS_IN_TRAINING))
    assert contrast_finds(measured) < 0.36 < 0.5 < contrast_finds(training)


def covered(placement):
    """How often the middle sixteenth of a scene is the object's, by the middle quarter. Distractors lie where room is left."""
    scenes = Scenes(count=150, objects=(1, 1), size=32, placement=placement, distractors=(0, 0))
    share = np.mean([scenes.read(key).mask > 0 for key in scenes.keys()], axis=0)  # noqa: SIM118
    return share[12:20, 12:20].mean() / share[8:24, 8:24].mean()


def test_the_middle_is_covered_no_more_often_than_what_is_around_it():
    assert covered("anywhere") < 1.12 < 1.2 < covered("inside")


def test_a_thing_that_would_stick_out_is_moved_inwards():
    for index in range(60):
        scene = drawn.draw_scene("val", 0, index, 32, layout=replace(drawn.MEASURED, distractors=(0, 0)))
        assert all(0 <= left <= 32 - side and 0 <= top <= 32 - side for left, top, side in (o.box for o in scene.objects))


def test_a_key_of_another_set_is_refused():
    with pytest.raises(DataError, match='Did you mean "scenes/val/0/00003"'):
        Scenes(count=4).read("scenes/val/0/0003")
