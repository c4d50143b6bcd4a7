"""Protocols: what a sample becomes, what is left out and why, and what every conf/protocol holds."""

import numpy as np
import pytest
from composing import GROUPS, plainly
from PIL import Image
from sklearn.metrics import average_precision_score

from conceptseg.errors import ConfigError, DataError
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.segment.segmenter import Segmenter
from conceptseg.targets import instantiate
from conceptseg.types import VOID, Sample, Task

PROTOCOLS = GROUPS["protocol"]
PAPERS = ("chefer", "gandelsman")  # what their released code does, under the name it is known by
WORDS = {3: "bird", 8: "cat", 12: "dog"}
CAPTIONS = {"metagame_single": "", "metagame_multi": "", "seg4diff": "cat"}  # the others say "a cat"


def built(name):
    return instantiate(plainly(f"protocol={name}")["protocol"], "protocol")


def protocol(**settings):
    given = {"name": "p", "version": 1, "task": "single", "background": ["grass", "sky"], "segmenters": [Segmenter("argmax")]}
    return SegmentationProtocol(**{**given, **settings})


def sample(*classes, size=(40, 30), void=False, words=None):
    """Vertical stripes, one a class, in the order given."""
    mask = np.zeros(size, np.uint8)
    for stripe, label in zip(np.array_split(np.arange(size[1]), len(classes)), classes, strict=True):
        mask[:, stripe] = label
    if void:
        mask[:2] = VOID
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    return Sample("set/1", image, mask, WORDS if words is None else words, {}, {word: label for label, word in WORDS.items()})


# ---------------------------------------------------------------- conf/protocol


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_on_disk_builds_and_sets_a_task(name):
    one = built(name)
    assert one.name == name and one.version >= 1 and one.label.startswith(f"{name} v{one.version}")
    task = one.prepare(sample(0, 8))
    assert isinstance(task, Task) and task.caption == CAPTIONS.get(name, "a cat") and "cat" in task.concepts.names
    assert task.image.dtype == np.float32 and 0 <= task.image.min() <= task.image.max() <= 1
    assert len({s.key for s in one.segmenters}) == len(one.segmenters)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_segmenter_of_every_protocol_can_score_its_tasks(name):
    one = built(name)
    task = one.prepare(sample(0, 8, void=True))
    maps = np.random.default_rng(0).random((len(task.concepts), 8, 8)).astype(np.float32)
    answers = list(one.score(task, maps))
    assert [segmenter for segmenter, _, _ in answers] == list(one.segmenters)
    for _, record, prediction in answers:
        assert record["valid"] + record["void"] == task.truth.size and prediction.labels.shape == task.truth.shape


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_name_says_the_variant(name):
    assert built(name).variant == ("released" if name.endswith("released") or name in PAPERS else "standard")


def test_imagenet_as_released():
    one = built("imagenet_released")
    task = one.prepare(sample(0, 8))
    assert task.image.shape == (512, 512, 3) and task.truth.shape == (224, 224)
    assert task.concepts.names == ("cat", "background", "floor", "tree", "person", "grass", "face") and task.concepts.target == 0
    assert [s.key for s in one.segmenters] == ["mean@grid/nearest"] and one.image_resample == "bicubic"


def test_voc_single_as_released():
    one = built("voc_single_released")
    task = one.prepare(sample(0, 8))
    assert task.image.shape == (512, 512, 3) and task.truth.shape == (224, 224) and one.image_resample == "nearest"
    assert task.concepts.names == ("background", "floor", "grass", "tree", "sky", "cat") and task.concepts.target == 5
    assert [s.key for s in one.segmenters] == ["argmax@grid/nearest", "mean@grid/nearest"]


def test_voc_multi_as_released():
    one = built("voc_multi_released")
    task = one.prepare(sample(0, 8, 3))
    assert task.truth.shape == (64, 64) and task.caption == "a bird,a cat" and task.classes == (0, 3, 8)
    assert task.concepts.names == ("background", "floor", "grass", "tree", "sky", "bird", "cat") and task.concepts.target is None
    assert [s.key for s in one.segmenters] == ["argmax@grid/nearest/colliding", "argmax@grid/nearest"]


@pytest.mark.parametrize("name", [n for n in PROTOCOLS if n.endswith("released") and "14x14" not in n])
def test_the_standard_twin_asks_for_the_same_words_at_the_truths_own_size(name):
    released, standard = built(name), built(name.replace("released", "standard"))
    assert (released.task, released.background, released.order) == (standard.task, standard.background, standard.order)
    assert standard.mask_size is standard.image_size is None
    assert all(s.enlarge == "bilinear" and s.cut == "mask" and s.relabel == "right" for s in standard.segmenters)
    one = sample(0, 8, size=(41, 30), void=True)
    task = standard.prepare(one)
    assert task.truth.shape == (41, 30) and np.array_equal(task.image, one.image.astype(np.float32) / 255)


def test_an_image_with_a_sliver_of_a_second_class_is_kept_by_the_released_rule_alone():
    """A class of one pixel vanishes from the 224-pixel truth that the released script counts labels on."""
    one = sample(0, 8, size=(500, 500))
    one.mask[0, 0] = 12
    assert isinstance(built("voc_single_released").prepare(one), Task)
    assert isinstance(built("voc_single_standard").prepare(one), Excluded)


def test_two_classes_that_fill_the_image_are_kept_by_the_released_rule_alone():
    one = sample(3, 8)
    task = built("voc_single_released").prepare(one)
    assert isinstance(task, Task) and (task.truth == 1).all()
    assert isinstance(built("voc_single_standard").prepare(one), Excluded)


# ---------------------------------------------------------------- who is left out


@pytest.mark.parametrize(
    ("select", "classes", "reason"),
    [
        ("one_class", (0, 3, 8), "2 foreground classes, wanted exactly one"),
        ("one_class", (0,), "0 foreground classes, wanted exactly one"),
        ("two_labels", (0, 3, 8), "3 labels after resizing, wanted at most two with one foreground class"),
        ("two_labels", (0,), "1 labels after resizing, wanted at most two with one foreground class"),
    ],
)
def test_a_sample_is_left_out_with_its_reason(select, classes, reason):
    assert protocol(select=select).prepare(sample(*classes)) == Excluded("set/1", reason)


@pytest.mark.parametrize(("select", "classes"), [("one_class", (0, 8)), ("one_class", (8,)), ("two_labels", (8,)), ("any", (0,))])
def test_a_sample_is_kept(select, classes):
    assert isinstance(protocol(select=select).prepare(sample(*classes)), Task)


def test_void_is_no_label():
    assert isinstance(protocol(select="two_labels").prepare(sample(0, 8, void=True)), Task)


def test_labels_are_counted_after_resizing():
    one = sample(0, 8, size=(60, 60))
    one.mask[0, 0] = 12
    assert isinstance(protocol(select="two_labels", mask_size=6).prepare(one), Task)
    assert isinstance(protocol(select="two_labels").prepare(one), Excluded)


def test_a_multi_class_sample_without_classes_is_left_out():
    assert protocol(task="multi").prepare(sample(0)) == Excluded(
        "set/1", "no foreground class is present at the size that is scored"
    )


# ---------------------------------------------------------------- what a task says


def test_a_single_class_truth_is_foreground_background_and_void():
    task = protocol().prepare(sample(0, 8, void=True))
    assert set(np.unique(task.truth)) == {0, 1, VOID} and task.classes == (0, 1)


def test_a_multi_class_truth_keeps_its_indices():
    task = protocol(task="multi").prepare(sample(0, 12, 3))
    assert task.classes == (0, 3, 12) and task.concepts.labels == (0, 0, 3, 12) and task.caption == "a bird and a dog"


def test_the_truth_is_resized_by_pillows_nearest():
    one = sample(0, 8, size=(37, 53))
    wanted = np.asarray(Image.fromarray(one.mask).resize((20, 20), Image.Resampling.NEAREST)) > 0
    assert np.array_equal(protocol(mask_size=20).prepare(one).truth, wanted)


@pytest.mark.parametrize(("order", "names", "target"), [
    ("target_first", ("cat", "grass", "sky"), 0), ("background_first", ("grass", "sky", "cat"), 2),
])  # fmt: skip
def test_the_target_is_where_the_order_puts_it(order, names, target):
    concepts = protocol(order=order).prepare(sample(0, 8)).concepts
    assert concepts.names == names and concepts.target == target and concepts.labels[target] == 1


@pytest.mark.parametrize("order", ["target_first", "background_first"])
def test_a_class_word_among_the_background_words_is_asked_for_once_as_the_class(order):
    concepts = protocol(order=order, background=["cat", "grass"]).prepare(sample(0, 8)).concepts
    assert sorted(concepts.names) == ["cat", "grass"]
    assert concepts.names[concepts.target] == "cat" and concepts.labels[concepts.target] == 1


def test_the_sample_is_left_as_it_was():
    one = sample(0, 8, void=True)
    image, mask = one.image.copy(), one.mask.copy()
    protocol(image_size=16, mask_size=16).prepare(one)
    assert np.array_equal(one.image, image) and np.array_equal(one.mask, mask)


# ---------------------------------------------------------------- errors


def test_a_class_without_a_word_is_a_data_error_that_lists_the_words():
    with pytest.raises(DataError, match=r"set/1: its mask holds class 9, .*3: bird, 8: cat, 12: dog"):
        protocol().prepare(sample(0, 9))


def test_two_classes_with_one_word_are_a_data_error():
    with pytest.raises(DataError, match='set/1: its data set names "cat" twice'):
        protocol(task="multi").prepare(sample(0, 3, 8, words={3: "cat", 8: "cat"}))


def test_a_background_word_given_twice_is_an_error():
    with pytest.raises(ConfigError, match=r'protocol\.background names "sky" twice'):
        protocol(background=["sky", "grass", "sky"])


def test_no_segmenter_is_an_error_with_an_example():
    with pytest.raises(ConfigError, match=r"protocol\.segmenters is empty: .*decision: mean"):
        protocol(segmenters=[])


def test_the_same_segmenter_twice_is_an_error():
    with pytest.raises(ConfigError, match="the same decision twice"):
        protocol(segmenters=[Segmenter("mean"), Segmenter("mean")])


@pytest.mark.parametrize("key", ["image_size", "mask_size", "window"])
def test_sides_from_1_to_16384_are_taken(key):
    more = {"window_stride": 1} if key == "window" else {}
    assert protocol(**{key: 1}, **more) and protocol(**{key: 16_384}, **more)
    for wrong in (0, 16_385):
        with pytest.raises(ConfigError, match=rf"protocol\.{key} is {wrong}; wanted 1 to 16,384"):
            protocol(**{key: wrong}, **more)


@pytest.mark.parametrize(
    ("key", "value", "near"),
    [
        ("task", "sinlge", "single"), ("order", "target_frist", "target_first"), ("select", "one_clas", "one_class"),
        ("image_resample", "bicubc", "bicubic"), ("variant", "relased", "released"),
    ],
)  # fmt: skip
def test_a_misspelt_setting_names_key_and_nearest_choice(key, value, near):
    with pytest.raises(ConfigError, match=rf'protocol\.{key}: unknown "{value}".*Did you mean "{near}"'):
        protocol(**{key: value})


# ---------------------------------------------------------------- scoring


def literal_record(segmenter, task, maps):
    """Counts and average precision of the class words, from masks of one class at a time."""
    scores = segmenter.scores(maps, task.truth.shape)
    labels = segmenter(maps, scores, task.concepts, task.classes).labels
    valid = task.truth != VOID
    channels = [(c, k) for c, k in enumerate(task.concepts.labels) if k and (task.truth == k).any()]
    return {
        "inter": [int(((labels == k) & (task.truth == k)).sum()) for k in task.classes],
        "pred": [int(((labels == k) & valid).sum()) for k in task.classes],
        "label": [int((task.truth == k).sum()) for k in task.classes],
        "pred_void": [int(((labels == k) & ~valid).sum()) for k in task.classes],
        "valid": int(valid.sum()), "void": int((~valid).sum()), "correct": int(((labels == task.truth) & valid).sum()),
        "classes": list(task.classes),
        "ap": np.mean([average_precision_score(task.truth[valid] == k, scores[c][valid]) for c, k in channels]),
    }  # fmt: skip


@pytest.mark.parametrize("task", ["single", "multi"])
@pytest.mark.parametrize("enlarge", ["nearest", "bilinear"])
def test_a_record_is_counted_class_by_class(task, enlarge):
    segmenters = [Segmenter("argmax", enlarge=enlarge), Segmenter("argmax", "grid", "nearest")]
    one = protocol(task=task, segmenters=segmenters[: 1 + (enlarge == "bilinear")])
    given = one.prepare(sample(0, 8, void=True) if task == "single" else sample(0, 8, 3, void=True))
    maps = np.random.default_rng(1).random((len(given.concepts), 5, 7)).astype(np.float32)
    for segmenter, record, _ in one.score(given, maps):
        wanted = literal_record(segmenter, given, maps)
        assert record["ap"].pop("foreground") == pytest.approx(wanted.pop("ap"), abs=1e-12)
        assert {key: record[key] for key in wanted} == wanted


def literal_14x14(scores, truth):
    """AP of (1 - s, s) against (1 - t, t), pixel by pixel: s scaled by its extremes, then read through 14 x 14 by flooring."""
    height, width = scores.shape
    low, high = scores.min(), scores.max()
    s, t = [], []
    for y in range(len(truth)):
        for x in range(len(truth[0])):
            row, column = y * 14 // len(truth), x * 14 // len(truth[0])
            one = (scores[row * height // 14, column * width // 14] - low) / (high - low)
            s += [1 - one, one]
            t += [1 - int(truth[y, x]), int(truth[y, x])]
    return average_precision_score(t, s)


def test_the_14x14_evaluation_coarsens_what_is_ranked_and_not_what_is_cut():
    task = built("imagenet_14x14_released").prepare(sample(0, 8, 0))
    fine, coarse = built("imagenet_released"), built("imagenet_14x14_released")
    assert np.array_equal(task.truth, fine.prepare(sample(0, 8, 0)).truth)
    maps = np.random.default_rng(2).random((len(task.concepts), 64, 64)).astype(np.float32)
    maps[0] += 0.3 * np.asarray(Image.fromarray(task.truth).resize((64, 64), Image.Resampling.NEAREST))
    ((_, plain, _),), ((segmenter, record, prediction),) = fine.score(task, maps), coarse.score(task, maps)
    assert segmenter.key == "mean@grid/nearest/scores14"
    assert record["ap"]["two_channel_minmax"] == pytest.approx(literal_14x14(maps[0], task.truth), abs=1e-9)
    assert {k: v for k, v in record.items() if k != "ap"} == {k: v for k, v in plain.items() if k != "ap"}
    assert abs(record["ap"]["two_channel_minmax"] - plain["ap"]["two_channel_minmax"]) > 1e-3
    assert len(np.unique(prediction.scores[0])) <= 14 * 14


def test_only_the_segmenters_that_are_asked_for_answer():
    one = protocol(segmenters=[Segmenter("mean"), Segmenter("argmax"), Segmenter("otsu", enlarge="nearest")])
    task = one.prepare(sample(0, 8))
    maps = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    alone, together = list(one.score(task, maps, one.segmenters[2:])), list(one.score(task, maps))
    assert len(alone) == 1 and alone[0][:2] == together[2][:2]


def test_a_ranking_does_not_depend_on_the_decision_or_the_offset_of_the_map():
    one = protocol(segmenters=[Segmenter("mean", enlarge="nearest"), Segmenter("otsu", enlarge="nearest")])
    task = one.prepare(sample(0, 8))
    maps = np.round(np.random.default_rng(0).random((3, 4, 4)) * 16).astype(np.float32)  # whole numbers: shifts are exact
    precisions = [record["ap"]["foreground"] for shift in (0, 64) for _, record, _ in one.score(task, maps + shift)]
    assert len(set(precisions)) == 1


# ---------------------------------------------------------------- identity


def test_segmenters_are_read_outs_and_stay_out_of_the_identity():
    assert protocol(segmenters=[Segmenter("mean")]).identity() == protocol(segmenters=[Segmenter("otsu")]).identity()


@pytest.mark.parametrize(
    "setting",
    [
        {"background": ["sky", "grass"]}, {"caption": "the {word}"}, {"caption_join": ","}, {"order": "target_first"},
        {"select": "one_class"}, {"image_size": 8}, {"image_resample": "nearest"}, {"mask_size": 8}, {"version": 2},
        {"task": "multi"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_what_a_model_is_shown_and_told_is_in_the_identity(setting):
    assert protocol(**setting).identity() != protocol().identity()
