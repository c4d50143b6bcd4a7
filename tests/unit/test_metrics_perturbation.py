"""Deletion and insertion: closed forms for controls, the definition written out step by step, and what a run keeps of them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from composing import plainly
from torchvision.transforms.functional import gaussian_blur

from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import assemble
from conceptseg.evaluation.carry_out import carry_out
from conceptseg.evaluation.readings import readings
from conceptseg.metrics.definitions import Rows
from conceptseg.metrics.measured import ASKING
from conceptseg.metrics.perturbation import STEPS, deletion, insertion, ranks
from conceptseg.metrics.reported import metric
from conceptseg.segment.resize import bilinear
from conceptseg.types import Batch

SIDE = 16
OBJECT = np.zeros((SIDE, SIDE), bool)
OBJECT[4:12, 2:10] = True  # a quarter of the pixels
SHARE = OBJECT.mean()
DOTS = torch.zeros(3, SIDE, SIDE)
DOTS[:, OBJECT] = 1e6 * (torch.rand(3, int(OBJECT.sum()), generator=torch.Generator().manual_seed(0)) + 1)


def kept(images):
    """A classifier that counts the object's pixels that are as in the image."""
    return (images == DOTS).all(1)[:, torch.from_numpy(OBJECT)].double().mean(1)


def test_controls_have_closed_forms():
    """An object of share a: the oracle deletes to a / 2 and inserts to 1 - a / 2, its inverse the other way, chance to 1/2."""
    oracle = OBJECT.astype(np.float32)
    for scores, gone, back in ((oracle, SHARE / 2, 1 - SHARE / 2), (-oracle, 1 - SHARE / 2, SHARE / 2)):
        assert deletion(DOTS, scores, kept, "a") == pytest.approx(gone, abs=1e-9)
        assert insertion(DOTS, scores, kept, "a") == pytest.approx(back, abs=1e-9)
    constant = np.full((SIDE, SIDE), 0.3, np.float32)
    for draw in (lambda k: constant, lambda k: np.random.default_rng(k).random((SIDE, SIDE)).astype(np.float32)):
        for measure in (deletion, insertion):
            assert np.mean([measure(DOTS, draw(k), kept, f"{k}") for k in range(40)]) == pytest.approx(0.5, abs=0.02)


def test_equal_scores_are_ordered_by_the_samples_key_alone():
    flat = np.zeros((4, 5), np.float32)
    assert np.array_equal(ranks(flat, "set/1"), ranks(flat + 2, "set/1")) and not np.array_equal(
        ranks(flat, "set/1"), ranks(flat, "b")
    )
    assert sorted(ranks(flat, "a").ravel()) == list(range(20))
    assert ranks(np.arange(20, dtype=np.float32).reshape(4, 5), "a").ravel().tolist() == list(range(19, -1, -1))


@pytest.mark.parametrize(("measure", "into"), [(deletion, "grey"), (insertion, "image")])
def test_pixels_are_exchanged_in_the_order_of_the_map(measure, into):
    generator = torch.Generator().manual_seed(3)
    image, scores = torch.randn(3, 8, 8, generator=generator), np.random.default_rng(2).permutation(64).reshape(8, 8) / 64.0
    weights = torch.randn(3, 8, 8, generator=generator)
    start = image.clone() if into == "grey" else gaussian_blur(image, [11, 11], [5.0, 5.0])
    end = torch.zeros_like(image) if into == "grey" else image
    order = sorted(((y, x) for y in range(8) for x in range(8)), key=lambda at: -scores[at])
    curve = []
    for step in range(STEPS + 1):
        shown = start.clone()
        for y, x in order[: round(step / STEPS * 64)]:
            shown[:, y, x] = end[:, y, x]
        curve.append(float(torch.sigmoid((shown * weights).sum())))
    wanted = (sum(curve) - curve[0] / 2 - curve[-1] / 2) / STEPS
    found = measure(image, scores, lambda images: torch.sigmoid((images * weights).sum((1, 2, 3))), "a")
    assert found == pytest.approx(wanted, abs=1e-5)


# ---------------------------------------------------------------- a run


@cache
def run(folder, extractor, *more):
    words = "dataset=scenes,dataset.count=4,dataset.objects=[1,1],protocol=scenes_single,protocol.measures=[deletion,insertion]"
    given = words.replace(",protocol", "|protocol").replace(",dataset", "|dataset").split("|")
    evaluation = assemble(plainly(*given, f"extractor={extractor}", f"runtime.runs={folder}", *more))
    carry_out(evaluation, "made")
    return evaluation


def test_a_run_keeps_both_for_the_class_that_is_explained(tmp_path):
    evaluation = run(tmp_path, "raw_attention")
    rows = [row for row in evaluation.store.rows().values() if row["status"] == "ok"]
    assert len(rows) == 4 * len(evaluation.protocol.segmenters) or len(rows) == 4
    assert all(row["measured"].keys() == {"deletion", "insertion"} for row in rows)
    (reading, *_) = readings(evaluation, ["deletion", "insertion"])
    for name in ASKING:
        counted = metric(name)
        counted.update([row for row in rows if row["segmenter"] == reading.segmenter])
        assert float(counted.compute()) == pytest.approx(reading.values[name].value)
        assert reading.values[name].low <= reading.values[name].value <= reading.values[name].high and reading.values[name].n == 4
        assert np.isfinite(Rows.from_records(rows[:1]).per_image[name]).all()
    # By hand, of the first sample: its predicted class, whose probability runs from the image's to the grey image's.
    backbone = evaluation.extractor.backbone
    key = sorted(evaluation.dataset.keys())[0]
    task = evaluation.protocol.prepare(evaluation.dataset.read(key))
    shown = backbone.images([task])
    whole = torch.softmax(backbone.model(shown), 1)
    value = next(row for row in rows if row["sample"] == key)["measured"]["deletion"]
    assert 0 <= value <= 1 and value < float(whole.max()) + 1e-6


def test_a_given_word_is_the_class_and_a_method_without_a_classifier_is_refused(tmp_path):
    predicted, given = run(tmp_path, "raw_attention"), run(tmp_path, "transinterp_given")
    assert predicted.run_id != given.run_id
    assert all("measured" in row for row in given.store.rows().values())
    for method, name in (("daam", "DAAM"), ("oracle", "Oracle")):
        with pytest.raises(ConfigError, match=f"{name} has none"):
            run(tmp_path, method)


def literal_area(clip, image, scores, key, place, names, gone):
    """The curve of one class, image by image and pixel by pixel, from open_clip's own vectors and scale."""
    rank = ranks(scores, key)
    order = sorted(((y, x) for y in range(scores.shape[0]) for x in range(scores.shape[1])), key=lambda at: rank[at])
    texts = [clip.clip.encode_text(clip.token_ids([f"a {name}"]), normalize=True)[0] for name in names]
    blurred = gaussian_blur(image, [11, 11], [5.0, 5.0])
    shown, curve = (image.clone() if gone else blurred.clone()), []
    for step in range(STEPS + 1):
        for y, x in order[round((step - 1) / STEPS * len(order)) if step else 0 : round(step / STEPS * len(order))]:
            shown[:, y, x] = torch.zeros(3) if gone else image[:, y, x]
        vector = clip.clip.encode_image(shown[None], normalize=True)[0]
        scaled = [float(clip.clip.logit_scale.exp() * vector @ text) for text in texts]
        weights = np.exp(np.array(scaled) - max(scaled))
        curve.append(weights[place] / weights.sum())
    return (sum(curve) - curve[0] / 2 - curve[-1] / 2) / STEPS


def test_clip_is_a_zero_shot_classifier_of_its_labels_and_of_other_words(tmp_path):
    """The labels without the true one, so that the word is a further class; the prediction is among the labels alone."""
    for extractor, given in (("naclip", True), ("raw_attention", False)):
        labels = "extractor.backbone.labels=[ball,kite,boat]"
        evaluation = run(tmp_path, extractor, "dataset.count=1", "backbone@extractor.backbone=lab_clip", labels)
        clip, (key,) = evaluation.extractor.backbone, evaluation.dataset.keys()
        task = evaluation.protocol.prepare(evaluation.dataset.read(key))
        image, names = clip.images([task])[0], ["ball", "kite", "boat"]
        with torch.no_grad():
            maps = evaluation.extractor.saliency(Batch((task,)))[0].numpy()
            place, word = 3, task.concepts.names[task.concepts.target]
            if given:
                assert word not in names
                names.append(word)
            else:
                vector = clip.clip.encode_image(image[None], normalize=True)
                place = int((vector @ clip.text_vectors(names).T).argmax())
            scores = bilinear(maps, clip.image_size)[task.concepts.target if given else 0]
            wanted = [literal_area(clip, image, scores, key, place, names, gone) for gone in (True, False)]
        measured = next(iter(evaluation.store.rows().values()))["measured"]
        assert [measured["deletion"], measured["insertion"]] == pytest.approx(wanted, abs=1e-5), extractor


def test_a_control_lends_a_classifier_the_map_of_its_class_word(tmp_path):
    evaluation = run(tmp_path, "centre_prior", "+backbone@extractor.backbone=lab_vit", "protocol.order=background_first")
    vit, key = evaluation.extractor.backbone, next(iter(evaluation.dataset.keys()))
    task = evaluation.protocol.prepare(evaluation.dataset.read(key))
    scores = bilinear(evaluation.extractor.saliency(Batch((task,)))[0].numpy(), vit.image_size)[task.concepts.target]
    assert task.concepts.target > 0 and scores[24, 24] > scores[0, 0]
    with torch.no_grad():
        image = vit.images([task])[0]
        place = int(vit.model(image[None]).argmax())
        wanted = deletion(image, scores, lambda images: torch.softmax(vit.model(images), 1)[:, place], key)
    found = next(row for row in evaluation.store.rows().values() if row["sample"] == key)["measured"]["deletion"]
    assert found == pytest.approx(wanted, abs=1e-6)
