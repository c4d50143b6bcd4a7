"""Which class names an image is given, and what that changes in tasks, run ids and counts."""

import json

import numpy as np
import pytest

from conceptseg.errors import ConfigError, DataError
from conceptseg.given_names import GivenNames
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import VOID, Sample

WORDS = ("cat", "dog", "boat", "car", "hot dog", "tree")
VOCABULARY = {word: label for label, word in enumerate(WORDS, 1)}
ARGMAX, ABOVE, MEAN = Segmenter("argmax"), Segmenter("argmax_above", level=0.4), Segmenter("mean")


def sample(*labels, key="set/1", vocabulary=VOCABULARY):
    mask = np.zeros((4, 6), np.uint8)
    for column, label in enumerate(labels):
        mask[:2, column] = label
    return Sample(key, np.zeros((4, 6, 3), np.uint8), mask, {k: WORDS[k - 1] for k in labels}, {}, vocabulary)


def protocol(task="multi", background=("grass",), segmenter=ARGMAX, **settings):
    return SegmentationProtocol("made", 1, task, background, [segmenter], **settings)


def names(one, **settings):
    return protocol(**settings).prepare(one).concepts.names


def test_truth_and_all_offer_the_mask_and_the_vocabulary():
    assert names(sample(2, 1)) == ("grass", "cat", "dog")
    whole = protocol(names="all").prepare(sample(2))
    # The truth leads, the others follow by name; "tree" is one concept whether or not it is a background word too.
    assert whole.concepts.names == ("grass", "dog", "boat", "car", "cat", "hot dog", "tree")
    assert whole.concepts.labels == (0, 2, 3, 4, 1, 5, 6) and whole.classes == (0, 1, 2, 3, 4, 5, 6)
    assert whole.concepts.distractors == (2, 3, 4, 5, 6) and whole.caption == "a dog"
    assert names(sample(2), names="all", background=("tree",)) == ("dog", "boat", "car", "cat", "hot dog", "tree")


def test_distractors_fill_up_to_the_total_and_depend_on_key_and_seed_alone():
    def drawn(*labels, key="set/1", **settings):
        given = names(sample(*labels, key=key), names="distractors", **settings)
        assert len(set(given)) == len(given)
        return given

    assert drawn(1, 2, 3, names_total=2) == ("grass", "cat", "dog", "boat")  # the truth is never cut
    assert drawn(1, names_total=0) == ("grass", "cat")
    assert len(drawn(1, names_total=4)) == 5 and len(drawn(1, names_total=99)) == 7
    assert drawn(1, names_total=4) == drawn(1, names_total=4)
    others = {drawn(1, names_total=4, key=f"set/{k}") for k in range(20)} | {
        drawn(1, names_total=4, names_seed=k) for k in range(9)
    }
    assert len(others) > 5


def test_a_single_class_protocol_keeps_its_target_among_distractors():
    task = protocol("single", segmenter=MEAN, names="distractors", names_total=3).prepare(sample(5))
    target = task.concepts.names.index("hot dog")
    assert task.concepts.target == target and task.concepts.labels[target] == 1 and sum(task.concepts.labels) == 1
    assert len(task.concepts.distractors) == 2 and target not in task.concepts.distractors and 0 not in task.concepts.distractors


def test_a_file_lists_names_for_each_image_or_for_all(tmp_path):
    each, every = tmp_path / "predicted.json", tmp_path / "words.txt"
    each.write_text(json.dumps({"set/1": ["Boat", "zebra"]}))
    every.write_text("cat\n\nboat\n")
    given = protocol(names="file", names_file=str(each)).prepare(sample(1, 3))
    # "Boat" is the data set's boat; a zebra is no class of it; the cat is missed and stays counted.
    assert (
        given.concepts.names == ("grass", "Boat", "zebra") and given.concepts.labels == (0, 3, 0) and given.classes == (0, 1, 3)
    )
    assert names(sample(1), names="file", names_file=str(every)) == ("grass", "cat", "boat")
    with pytest.raises(DataError, match="set/2"):
        names(sample(1, key="set/2"), names="file", names_file=str(each))
    single = protocol("single", segmenter=MEAN, names="file", names_file=str(each)).prepare(sample(3))
    assert single.concepts.names[single.concepts.target] == "Boat"
    left = protocol("single", segmenter=MEAN, names="file", names_file=str(every)).prepare(sample(2))
    assert isinstance(left, Excluded) and '"dog"' in left.reason
    ids = {protocol(names="file", names_file=str(path)).identity()["names_file"] for path in (each, every)}
    every.write_text("cat\nboat\ncar\n")
    assert len({*ids, protocol(names="file", names_file=str(every)).identity()["names_file"]}) == 3


def test_a_file_of_names_that_is_no_list_of_words_is_refused(tmp_path):
    read = []
    for name, text in (
        ("a.txt", ""), ("a.txt", '["cat"]'), ("a.txt", "cat\nCat\n"), ("a.csv", "cat\n"), ("a", "cat\n"), ("A.JSON", "cat\n"),
        ("a.json", '{"set/1": []}'), ("a.json", '{"set/1": ["cat", " CAT"]}'), ("a.json", '{"set/1": [1]}'),
        ("a.json", '["cat"]'), ("a.json", '{"set/1": "cat"}'), ("a.json", '{"set/1": [NaN]}'),
        ("a.json", '{"set/1": ["cat"], "set/1": ["dog"]}'),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        try:
            read.append((name, text, protocol(names="file", names_file=str(tmp_path / name)).identity()))
        except (ConfigError, DataError) as error:
            assert "names_file" in str(error)
    assert not read


def test_rules_are_part_of_the_identity_and_older_ids_stay():
    plain = protocol().identity()
    assert not {"names", "ask", "background_rule"} & plain.keys()
    assert protocol(names="named").identity() == protocol(ask="named").identity() == {**plain, "ask": "named"}
    assert protocol(names="distractors", names_total=5).identity() == {
        **plain, "names": "distractors", "names_total": 5, "names_seed": 0,
    }  # fmt: skip
    labels = [GivenNames(*given).label for given in [("truth",), ("distractors", 20), ("all",), ("file", 0, 0, "a/b.json")]]
    assert labels == ["truth", "truth + distractors up to 20", "all", "file b.json"]
    assert protocol().label == protocol(names="named").label == "made v1"
    assert protocol(names="distractors", names_total=5).label == "made v1, names: truth + distractors up to 5"


def test_without_background_words_the_level_decides_or_nothing_is_scored_there():
    maps = np.zeros((2, 4, 6), np.float32)
    maps[0, :2], maps[1, :, 4:] = 0.9, 0.3
    above = protocol(background=(), segmenter=ABOVE, background_rule="threshold")
    ((_, _, found),) = above.score(above.prepare(sample(1, 2)), maps)
    assert found.labels[:2].tolist() == [[1] * 6] * 2 and not found.labels[2:].any()
    things = protocol(background=(), background_rule="none").prepare(sample(1, 2))
    assert things.concepts.names == ("cat", "dog") and set(np.unique(things.truth)) == {1, 2, VOID}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"names": "truht"}, "protocol.names"),
        ({"names_total": 4}, "names=distractors"),
        ({"names": "file"}, "names_file"),
        ({"names": "distractors", "names_total": -1}, "names_total"),
        ({"background_rule": "none"}, "background"),
        ({"background_rule": "threshold", "background": ()}, "argmax_above"),
        ({"segmenter": ABOVE}, "argmax_above"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        protocol(**settings)


def test_a_data_set_without_vocabulary_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="names_file"):
        names(sample(1, vocabulary={}), names="all")
