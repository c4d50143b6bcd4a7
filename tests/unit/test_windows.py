"""Sliding windows and PAMR: literal versions of both, what a run does with windows, and who is refused."""

import math
import statistics

import numpy as np
import pytest
import torch
from composing import plainly
from torch.nn.functional import interpolate

from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import assemble
from conceptseg.evaluation.loop import Failures, Model
from conceptseg.extractors.base import OneView
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import View
from conceptseg.segment.refine import pamr
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import Concepts, Sample, Task
from conceptseg.windows import Windows

RNG = np.random.default_rng(0)


def task(height, width, key="set/1"):
    image = np.random.default_rng(height * width).random((height, width, 3)).astype(np.float32)
    return Task(key, image, np.zeros((height, width), np.uint8), Concepts(("cat", "dog"), (1, 2)), "", (0, 1, 2))


def slid(image, side, stride, maps_of):
    """forward_slide of the released SCLIP code, by the pixel: sums and counts, then their quotient."""
    height, width = image.shape[:2]
    total, covering = np.zeros((2, height, width)), np.zeros((height, width))
    for i in range(max(height - side + stride - 1, 0) // stride + 1):
        for j in range(max(width - side + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + side, height), min(j * stride + side, width)
            top, left = max(bottom - side, 0), max(right - side, 0)
            found = torch.from_numpy(maps_of(image[top:bottom, left:right]))[None]
            enlarged = interpolate(found, size=(bottom - top, right - left), mode="bilinear")[0].numpy()
            for y in range(top, bottom):
                for x in range(left, right):
                    total[:, y, x] += enlarged[:, y - top, x - left]
                    covering[y, x] += 1
    assert covering.min() > 0
    return total / covering


class Quadrants(OneView):
    """Red and green of each quarter of the image: a map of 2 x 2 per word."""

    version = 1
    told, trained_on = "nothing", "nothing"
    windowed = True

    def __init__(self):
        self.shown = []

    @staticmethod
    def maps(image):
        halves = [np.array_split(half, 2, axis=1) for half in np.array_split(image.astype(np.float64), 2, axis=0)]
        return np.stack([[[q[..., colour].mean() for q in row] for row in halves] for colour in (0, 1)])

    def saliency(self, batch):
        self.shown.append(len(batch))
        return torch.from_numpy(np.stack([self.maps(one.image) for one in batch.tasks]))


@pytest.mark.parametrize("size", [(12, 20), (7, 15), (6, 6), (13, 5), (4, 3)])
def test_maps_of_windows_are_averaged_as_released(tmp_path, size):
    method, one = Quadrants(), task(*size)
    model = Model(method, Failures(tmp_path), Windows(6, 4))
    ((_, answer),) = model.answers([one], [View("map")])
    assert answer.maps["map"].shape == (2, *size)
    np.testing.assert_allclose(answer.maps["map"], slid(one.image, 6, 4, Quadrants.maps), atol=1e-6)


def test_a_tasks_windows_are_shown_as_many_at_a_time_as_the_batch_has_tasks(tmp_path):
    method = Quadrants()
    model = Model(method, Failures(tmp_path), Windows(6, 6))
    found = dict(model.answers([task(12, 18, "set/1"), task(6, 30, "set/2"), task(6, 4, "set/3")], [View("map")]))
    assert method.shown == [3, 3, 3, 2, 1] and [found[f"set/{k}"].maps["map"].shape[1:] for k in (1, 2, 3)] == [
        (12, 18), (6, 30), (6, 4),
    ]  # fmt: skip
    alone = Model(Quadrants(), Failures(tmp_path), Windows(6, 6)).answers([task(12, 18, "set/1")], [View("map")])
    np.testing.assert_array_equal(dict(alone)["set/1"].maps["map"], found["set/1"].maps["map"])


def refined(scores, image, steps, dilations):
    """PAMR pixel by pixel, as its paper and code say."""
    height, width, _ = image.shape

    def at(y, x):
        return min(max(y, 0), height - 1), min(max(x, 0), width - 1)

    around = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    others = [place for place in around if place != (0, 0)]
    for _ in range(steps):
        after = np.zeros_like(scores)
        for y in range(height):
            for x in range(width):
                logits = []
                for dy, dx in others:
                    parts = []
                    for colour in range(3):
                        values = [float(image[at(y + a, x + b)][colour]) for a, b in around]
                        difference = abs(float(image[y, x, colour]) - float(image[at(y + dy, x + dx)][colour]))
                        parts.append(-difference / (1e-8 + 0.1 * statistics.stdev(values)))
                    logits.append(sum(parts) / 3)
                weights = [math.exp(v - max(logits)) for v in logits]
                for weight, (dy, dx) in zip(weights, others, strict=True):
                    row, column = at(y + dy, x + dx)
                    after[:, y, x] += weight / sum(weights) * scores[:, row, column]
        scores = after
    return scores


@pytest.mark.parametrize(("steps", "dilations"), [(1, (1,)), (3, (1, 2))])
def test_pamr_is_the_weighted_mean_of_neighbours_alike_in_colour(steps, dilations):
    scores, image = RNG.normal(size=(2, 5, 6)), RNG.random((5, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(pamr(scores, image, steps, dilations), refined(scores, image, steps, dilations), atol=1e-5)


def test_pamr_leaves_an_image_of_one_colour_to_plain_means_and_keeps_edges():
    flat = np.full((6, 6, 3), 0.3, np.float32)
    scores = RNG.normal(size=(1, 6, 6))
    assert pamr(scores, flat, 1, (1,))[0, 2, 2] == pytest.approx((scores[0, 1:4, 1:4].sum() - scores[0, 2, 2]) / 8, abs=1e-6)
    edge = np.zeros((8, 8, 3), np.float32)
    edge[:, 4:] = 1
    step = np.zeros((1, 8, 8))
    step[:, :, 4:] = 1
    blurred = pamr(step + 0.3 * RNG.normal(size=step.shape), edge, 10, (1,))[0]
    assert blurred[:, :4].max() < blurred[:, 4:].min()


def test_a_segmenter_refines_enlarged_scores_and_then_forms_shares():
    maps, image = RNG.normal(size=(2, 3, 3)).astype(np.float32), RNG.random((4, 4, 3)).astype(np.float32)
    plain = Segmenter("argmax")
    one = Segmenter("argmax", pamr_steps=2, pamr_dilations=[1], logit_scale=40.0)
    assert one.key == "argmax@mask/bilinear/pamr2d1/softmaxx40" and plain.key == "argmax@mask/bilinear"
    larger = np.asarray(interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size=(8, 8), mode="bilinear"))[0]
    wanted = pamr(plain.scores(maps, (8, 8)), larger.transpose(1, 2, 0), 2, (1,))
    shares = np.exp(40 * wanted) / np.exp(40 * wanted).sum(0)
    np.testing.assert_allclose(one.scores(maps, (8, 8), image), shares, atol=1e-4)
    with pytest.raises(ConfigError, match="no image was given"):
        one.scores(maps, (8, 8))
    for wrong in ({"pamr_steps": 1}, {"logit_scale": 2.0}):
        with pytest.raises(ConfigError, match='Set cut "mask"'):
            Segmenter("mean", cut="grid", **wrong)


def test_a_protocol_refines_by_the_image_and_keeps_each_way_of_forming_scores_apart():
    maps = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    cuts = [Segmenter("argmax"), Segmenter("argmax", pamr_steps=3, pamr_dilations=[1]), Segmenter("argmax", logit_scale=5.0)]
    made = SegmentationProtocol("made", 1, "multi", [], cuts)
    answers = {s.key: prediction.scores for s, _, prediction in made.score(task(9, 9), maps)}
    for cut in cuts:
        np.testing.assert_array_equal(answers[cut.key], cut.scores(maps, (9, 9), task(9, 9).image))
    assert len({scores.tobytes() for scores in answers.values()}) == 3


# ---------------------------------------------------------------- settings


def test_windows_are_part_of_a_protocols_identity_and_label():
    sheet = plainly("protocol=voc20_slide")["protocol"]
    sheet.pop("_target_")
    cuts = [Segmenter("argmax")]
    one = SegmentationProtocol(**{**sheet, "segmenters": cuts})
    assert one.label == "voc20_slide v1, names: all, windows of 224, stride 112 of an image of short side 336"
    assert (one.identity()["window"], one.identity()["window_stride"], one.identity()["image_fit"]) == (224, 112, "short_side")
    whole = SegmentationProtocol(**{**sheet, "segmenters": cuts, "window": None, "window_stride": None})
    assert "window" not in whole.identity() and "window" not in whole.label
    vocabulary = {"cat": 1, "dog": 2}
    tall = Sample("set/1", np.zeros((50, 35, 3), np.uint8), np.ones((50, 35), np.uint8), {1: "cat"}, {}, vocabulary)
    assert one.prepare(tall).image.shape == (480, 336, 3) and one.prepare(tall).truth.shape == (50, 35)
    for wrong in ({"window": 224, "window_stride": None}, {"window": 224, "window_stride": 300}):
        with pytest.raises(ConfigError, match="window"):
            SegmentationProtocol(**{**sheet, "segmenters": cuts, **wrong})


def test_a_method_whose_maps_of_windows_have_no_one_scale_is_refused_by_name(tmp_path):
    overrides = ("dataset=scenes", "protocol=voc20_slide", f"runtime.runs={tmp_path}", "extractor=")
    for method, name in (("concept_attention", "ConceptAttention"), ("lposs", "LPOSS"), ("transinterp_clip", "TransInterp")):
        with pytest.raises(ConfigError, match=rf"voc20_slide .* and {name}'s maps of two windows can't be averaged"):
            assemble(plainly(*overrides[:-1], overrides[-1] + method))
    assemble(plainly(*overrides[:-1], "extractor=sclip"))


def test_background_words_and_a_threshold_decide_together():
    def labels(rule, level, background=("sky",)):
        cut = Segmenter("argmax_above", level=level)
        made = SegmentationProtocol("made", 1, "multi", background, [cut], background_rule=rule)
        mask = np.ones((1, 3), np.uint8)
        one = made.prepare(Sample("set/1", np.zeros((1, 3, 3), np.uint8), mask, {1: "cat"}))
        maps = np.array([[[0.1, 0.9, 0.0]], [[0.6, 0.2, 0.3]]], np.float32)
        return next(iter(made.score(one, maps)))[2].labels.tolist()

    assert labels("words_and_threshold", 0.5) == [[1, 0, 0]] and labels("words_and_threshold", 0.2) == [[1, 0, 1]]
    with pytest.raises(ConfigError, match="words_and_threshold go together"):
        SegmentationProtocol("made", 1, "multi", ["sky"], [Segmenter("argmax")], background_rule="words_and_threshold")
