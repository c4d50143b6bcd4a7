"""Drawn scenes: nothing but looking tells where a word is, and hard scenes are what they are called."""

import numpy as np
import pytest

from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS
from conceptseg.data.drawn import HardScenes
from conceptseg.data.scenes import HARD_KINDS, LOOK_ALIKES, Layout, draw_hard_scene, draw_scene, is_held_out
from conceptseg.errors import ConfigError, DataError
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.segment.segmenter import Segmenter

BARE = Layout(distractors=(0, 0))
"""Objects and grounds are the same without distractors, which take most of the time: that they are is a test."""


@pytest.fixture(scope="module")
def many():
    return [draw_scene("val", 3, index, size=32, layout=BARE) for index in range(500)]


def uneven(table):
    """Largest standardised residual of a contingency table: how far the worst cell is from independence, in deviations."""
    table = np.asarray(table, float)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(np.abs((table - expected) / np.sqrt(expected)).max())


@pytest.mark.parametrize("what", ["ground", "tint", "place", "size"])
def test_what_is_free_does_not_depend_on_the_word(many, what):
    rows = []
    for scene in many:
        for o in scene.objects:
            left, top, side = o.box
            span = {1: (0.34, 0.66), 2: (0.28, 0.5), 3: (0.25, 0.42)}[len(scene.objects)]
            value = {
                "ground": GROUNDS.index(scene.ground),
                "tint": list(TINTS).index(o.tint),
                "place": 2 * (left + side / 2 > 16) + (top + side / 2 > 16),
                "size": int(side / 32 > sum(span) / 2),
            }[what]
            rows.append((OBJECTS.index(o.word), int(value)))
    words, values = np.array(rows).T
    table = np.zeros((len(OBJECTS), values.max() + 1))
    np.add.at(table, (words, values), 1)
    assert uneven(table) < 3.9  # of up to 96 cells the worst of chance alone lies near 2.6
    skewed = np.where(words == 0, 0, values)  # the test can fail: apples always take the first value
    broken = np.zeros_like(table)
    np.add.at(broken, (words, skewed), 1)
    assert uneven(broken) > 5


def test_odd_colour_is_no_sign_of_an_object():
    """With one object, what is unlike the mean colour is as often a distractor: outside the mask lie odd-coloured pixels too."""
    shares = []
    for index in range(100):
        scene = draw_scene("val", 3, index, size=32, objects=(1, 1))
        distance = np.linalg.norm(scene.image - scene.image.mean((0, 1)), axis=-1)
        valid = scene.mask != 255
        oddest = valid & (distance >= np.quantile(distance[valid], 0.9))
        shares.append((scene.mask[oddest] > 0).mean())
    assert np.mean(shares) < 0.5


def test_a_plain_scene_is_the_same_without_its_distractors_and_what_they_cover_is_no_object(many):
    covered = 0
    for index, plain in enumerate(many[:60]):
        scene = draw_scene("val", 3, index, size=32)
        assert plain.objects == scene.objects and plain.ground == scene.ground
        laid = (plain.image != scene.image).any(-1)
        assert laid.any() and (scene.mask == plain.mask)[~laid].all()
        inside = (scene.mask > 0) & (scene.mask < 255)
        assert np.abs(plain.image.astype(int) - scene.image)[inside].max(initial=0) <= 26, "opaque by a tenth at most"
        covered += int((laid & (plain.mask > 0) & ~inside).sum())
    assert covered > 0


def test_training_never_shows_the_held_out_pairs_and_unseen_only_them():
    for split, held in (("train", False), ("unseen", True)):
        for index in range(60):
            scene = draw_scene(split, 0, index, size=32, layout=BARE)
            assert all(is_held_out(o.word, scene.ground) == held for o in scene.objects)
            hard = draw_hard_scene(split, 0, index, size=32, kind="tint", layout=BARE).scene
            assert all(is_held_out(o.word, hard.ground) == held for o in hard.objects)


@pytest.mark.parametrize("index", range(12))
def test_hard_scenes_are_what_their_kind_says(index):
    kind = HARD_KINDS[index % 3]
    hard = draw_hard_scene("val", 1, index)
    objects, labels = hard.scene.objects, set(np.unique(hard.scene.mask).tolist()) - {0, 255}
    assert hard.kind == kind
    if kind == "tint":
        assert objects[0].word == objects[1].word and objects[0].tint != objects[1].tint and labels == {1, 2}
        assert hard.names == {1: f"{objects[0].tint} {objects[0].word}", 2: f"{objects[1].tint} {objects[1].word}"}
    elif kind == "part":
        assert tuple(sorted(o.word for o in objects)) in LOOK_ALIKES and labels == {1, 2}
        assert objects[0].tint == objects[1].tint and objects[0].box[2] == objects[1].box[2]
    else:
        assert labels == {1} and hard.names[1] == objects[0].word
        assert hard.names[2] not in {o.word for o in objects}


def test_hard_scenes_come_with_stable_keys():
    assert HardScenes(count=5).keys()[1] == "scenes_hard/val/0/part-00001"
    key = HardScenes(count=5).keys()[0]
    assert (HardScenes(count=5).read(key).image == HardScenes(count=9).read(key).image).all()
    assert HardScenes(count=5).fingerprint() == HardScenes(count=9).fingerprint() != HardScenes(seed=1).fingerprint()
    with pytest.raises(DataError, match="scenes_hard"):
        HardScenes(count=5).read("scenes_hard/val/0/tint-00099")


@pytest.mark.parametrize(
    "setting",
    [{"split": "test"}, {"kinds": ["tints"]}, {"kinds": []}, {"count": 0}, {"size": 4}, {"distractor_tints": 9}],
    ids=str,
)
def test_a_wrong_setting_is_refused(setting):
    with pytest.raises(ConfigError, match=r"dataset"):
        HardScenes(**setting)


def test_an_absent_word_is_asked_for_and_what_is_claimed_for_it_is_counted():
    sample = HardScenes(count=3).read("scenes_hard/val/0/absent-00002")
    decide = [Segmenter(decision="argmax", cut="mask", enlarge="bilinear")]
    named = SegmentationProtocol("hard", 1, "multi", ["grass"], decide, names="named").prepare(sample)
    assert not isinstance(named, Excluded)
    assert named.concepts.names == ("grass", sample.words[1], sample.words[2]) and named.classes == (0, 1, 2)
    assert sample.words[2] not in named.caption
    maps = np.zeros((3, 4, 4), np.float32)
    maps[2, :2] = 1  # the absent word takes the upper half
    (_, record, _), = SegmentationProtocol("hard", 1, "multi", ["grass"], decide, names="named").score(named, maps)  # fmt: skip
    assert record["pred"][2] > 0 and record["label"][2] == 0 and record["inter"][2] == 0
    with pytest.raises(ConfigError, match=r"protocol\.names"):
        SegmentationProtocol("hard", 1, "multi", ["grass"], decide, names="al")
