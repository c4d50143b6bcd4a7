"""Protocols chefer and gandelsman: a golden image of the released metric code, and images cut as torchvision cuts them."""

import numpy as np
import pytest
from composing import plainly
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from conceptseg.metrics.released import f1_over_rows
from conceptseg.metrics.summary import summarise
from conceptseg.targets import instantiate
from conceptseg.types import Concepts, Sample, Task

SCORES = np.array([[1, 0.2], [0.4, 0]], np.float32)
TRUTH = np.array([[1, 1], [0, 0]], np.uint8)


def built(name):
    return instantiate(plainly(f"protocol={name}")["protocol"], "protocol")


def numbers(scores, truth):
    task = Task("made/0", np.zeros((*truth.shape, 3), np.float32), truth, Concepts(("dog",), (1,), 0), "a dog", (0, 1))
    ((segmenter, record, prediction),) = built("chefer").score(task, scores[None])
    row = {"sample": "made/0", "view": "map", "segmenter": segmenter.key, "status": "ok", **record}
    names = [
        "accuracy", "miou_dataset", "released_ap_two_channel_minmax", "ap_image", "released_f1_rowwise", "f1_image",
        "released_miou_from_accuracy",
    ]  # fmt: skip
    return prediction, {k: v.value for k, v in summarise([row], names, 10, 0.95).items()}


def test_the_golden_image_gives_the_printed_numbers():
    prediction, found = numbers(SCORES, TRUTH)
    assert prediction.labels.tolist() == [[1, 0], [0, 0]]  # 0.4, the mean, is not above the mean
    assert found == pytest.approx(
        {
            "accuracy": 3 / 4, "miou_dataset": 0.583333, "released_ap_two_channel_minmax": 0.854167, "ap_image": 0.833333,
            "released_f1_rowwise": 1 / 3, "f1_image": 2 / 3, "released_miou_from_accuracy": 0.6,
        },
        abs=1e-6,
    )  # fmt: skip


def test_a_constant_map_is_background_everywhere_and_scores_0_in_both_channels():
    prediction, found = numbers(np.full((2, 2), 0.3, np.float32), TRUTH)
    assert not prediction.labels.any()
    assert found["released_f1_rowwise"] == found["f1_image"] == 0 and found["released_ap_two_channel_minmax"] == 0.5


def test_the_accidental_f1_is_one_of_each_row():
    """Literal: F1 of every row by its own counts, 0 where undefined."""
    rng = np.random.default_rng(0)
    found, truth = rng.random((9, 5)) > 0.7, rng.random((9, 5)) > 0.8
    rows = []
    for m, g in zip(found, truth, strict=True):
        hits, misses, false = (m & g).sum(), (~m & g).sum(), (m & ~g).sum()
        rows.append(2 * hits / (2 * hits + misses + false) if hits + misses + false else 0.0)
    assert 0.0 in rows and f1_over_rows(found, truth) == pytest.approx(np.mean(rows))


@pytest.mark.parametrize("size", [(300, 260), (225, 301), (224, 224), (100, 333)])
@pytest.mark.parametrize(("name", "by"), [
    ("chefer", Resize((224, 224))),
    ("gandelsman", Compose([Resize(224, interpolation=InterpolationMode.BICUBIC), CenterCrop(224)])),
])  # fmt: skip
def test_images_are_cut_and_resized_as_the_released_transforms_do(name, by, size):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[: size[0] // 2] = 1
    task = built(name).prepare(Sample("made/0", image, mask, {1: "dog"}))
    assert isinstance(task, Task) and task.concepts.names == ("dog",)
    assert np.array_equal(np.round(255 * task.image).astype(np.uint8), np.asarray(by(Image.fromarray(image))))
    assert np.array_equal(task.truth, np.asarray(Image.fromarray(mask).resize((224, 224), Image.Resampling.NEAREST)))
