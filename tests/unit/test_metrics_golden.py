"""The released scripts' numbers, recomputed from the maps and masks they were given (tests/golden/concept_attention)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from composing import plainly
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from conceptseg.metrics.average_precision import minmax_scaled, two_channel_average_precision
from conceptseg.metrics.counts import count
from conceptseg.metrics.reported import metric
from conceptseg.targets import instantiate
from conceptseg.types import Concepts, Task

GOLDEN = Path(__file__).parents[1] / "golden" / "concept_attention"
CELLS = ("all_background", "all_foreground", "constant", "ignore", "nan_scores", "random", "ties")
AP = 1e-9
RATIO = 1e-9


def enlarged(values, size=224):
    """torch nearest: source index floor(i * h / H). PIL takes the pixel under the centre instead."""
    return interpolate(torch.as_tensor(values)[None, None].float(), size=(size, size), mode="nearest")[0, 0].numpy()


def label_224(mask):
    return np.asarray(Image.fromarray(mask.numpy()).resize((224, 224), Image.Resampling.NEAREST))


def record(index, counts, ap):
    return {
        "sample": f"{index:02d}", "view": "golden", "segmenter": "golden", "status": "ok", "classes": list(counts.classes),
        "inter": counts.inter, "pred": counts.pred, "label": counts.label, "pred_void": counts.pred_void,
        "valid": counts.valid, "correct": counts.correct, "void": counts.void, "ap": ap,
    }  # fmt: skip


def running(name, records):
    """The metric after each image."""
    measured = metric(name)
    values = []
    for row in records:
        measured.update([row])
        values.append(measured.compute().item())
    return values


def unpacked(file):
    """Tensors by name; masks and labels are kept as bits (see the folder's README): 1 for the object, 255 or -1 for void."""
    held = load_file(GOLDEN / f"{file}.safetensors")
    for name in [name.removesuffix(".bits") for name in held if name.endswith(".bits")]:
        shape = held[f"{name}.shape"].tolist()
        planes = [held.get(f"{name}.{kind}") for kind in ("bits", "void_bits")]
        one, void = (torch.from_numpy(np.unpackbits(p.numpy(), count=np.prod(shape)).reshape(shape)) if p is not None else None
                     for p in planes)  # fmt: skip
        if void is not None and "in.mask" not in name:
            one = one.to(torch.int8)
        held[name] = one if void is None else one.masked_fill(void.bool(), 255 if one.dtype == torch.uint8 else -1)
    return held


@pytest.fixture(scope="module")
def imagenet():
    return unpacked("metrics_imagenet")


@pytest.fixture(scope="module")
def voc():
    return unpacked("metrics_voc")


def target_wins(packed):
    """Where the last of six maps [6 H W] is the greatest, from their ranks, two maps a byte."""
    ranks = torch.stack([packed >> 4, packed & 15], dim=1).flatten(0, 1)
    return ranks.argmax(dim=0) == 5


@pytest.mark.parametrize(("case", "name"), [("imagenet", "imagenet_released"), ("imagenet_down14", "imagenet_14x14_released")])
def test_imagenet_segmentation(imagenet, case, name):
    records = []
    protocol = instantiate(plainly(f"protocol={name}")["protocol"], "protocol")
    for i in range(10):
        scores = imagenet[f"imagenet.in.map.{i}"]
        mask = enlarged(scores > scores.mean()).astype(np.uint8)
        truth = (label_224(imagenet[f"imagenet.in.mask.{i}"]) != 0).astype(np.uint8)
        np.testing.assert_array_equal(mask, imagenet["imagenet.mask_224"][i])
        np.testing.assert_array_equal(truth, imagenet["imagenet.label_224"][i])

        counts = count(mask, truth, (0, 1))
        # The stack holds every pixel twice; both of its classes have the plain number of right pixels as intersection.
        assert (2 * counts.correct, 2 * counts.valid) == (imagenet[f"{case}.correct"][i], imagenet[f"{case}.labeled"][i])
        assert imagenet[f"{case}.inter"][i].tolist() == [counts.correct] * 2
        assert imagenet[f"{case}.union"][i].tolist() == [2 * counts.valid - counts.correct] * 2

        scaled = minmax_scaled(scores.numpy())
        shown = enlarged(scaled if case == "imagenet" else enlarged(scaled, 14))
        ap = two_channel_average_precision(shown, truth, minmax=False)
        assert ap == pytest.approx(imagenet[f"{case}.ap"][i].item(), abs=AP)
        task = Task("golden/0", np.zeros((1, 1, 3), np.float32), truth, Concepts(("dog",), (1,), 0), "a dog", (0, 1))
        ((_, row, _),) = protocol.score(task, scores.numpy()[None])
        assert row["ap"]["two_channel_minmax"] == ap and row["correct"] == counts.correct
        if case == "imagenet":
            # All source pixels survive 64 -> 224, so the scaling may as well come last.
            assert two_channel_average_precision(enlarged(scores), truth, minmax=True) == ap
        records.append(record(i, counts, {"two_channel_minmax": ap}))

    names = ("accuracy", "released_miou_from_accuracy", "released_ap_two_channel_minmax")
    for name, golden in zip(names, ("running_pixAcc", "running_mIoU", "running_mAP"), strict=True):
        np.testing.assert_allclose(running(name, records), imagenet[f"{case}.{golden}"], atol=RATIO, rtol=0)
    finals = [running(name, records)[-1] for name in names]
    np.testing.assert_allclose(finals, imagenet[f"{case}.final"], atol=RATIO, rtol=0)
    # The usual mean IoU of the same masks is 0.43, where the script prints 0.48.
    assert running("miou_dataset", records)[-1] == pytest.approx(0.43, abs=0.005)
    assert finals[1] == pytest.approx(0.48, abs=0.005)


@pytest.mark.parametrize("case", ["voc_meanthr", "voc_argmax"])
def test_voc_single_class(voc, case):
    records = []
    for i in range(8):
        scores = voc[f"voc.in.map.{i}"]
        won = target_wins(voc[f"voc.in.heatmaps_bg5_then_target.{i}.ranks"])
        mask = enlarged(won if case == "voc_argmax" else scores > scores.mean()).astype(np.uint8)
        label = label_224(voc[f"voc.in.mask.{i}"])
        truth = np.where(label == 255, 255, np.minimum(label, 1)).astype(np.uint8)
        np.testing.assert_array_equal(mask, voc[f"{case}.mask_224"][i])
        np.testing.assert_array_equal(np.where(truth == 255, -1, truth.astype(int)), voc["voc.label_224"][i])

        counts = count(mask, truth, (0, 1))
        assert 2 * counts.correct == voc[f"{case}.correct"][i]
        assert 2 * counts.valid + counts.void == voc[f"{case}.labeled"][i]
        assert list(counts.inter) == voc[f"{case}.inter"][i].tolist()
        union = np.array(counts.pred) + counts.label - np.array(counts.inter)
        assert union.tolist() == voc[f"{case}.union"][i].tolist()

        ap = two_channel_average_precision(enlarged(scores), truth, minmax=False)
        assert ap == pytest.approx(voc[f"{case}.ap"][i].item(), abs=AP)
        records.append(record(i, counts, {"two_channel": ap}))

    names = ("released_accuracy_void_half", "miou_dataset", "released_ap_two_channel")
    for name, golden in zip(names, ("running_pixAcc", "running_mIoU", "running_mAP"), strict=True):
        np.testing.assert_allclose(running(name, records), voc[f"{case}.{golden}"], atol=RATIO, rtol=0)
    finals = [running(name, records)[-1] for name in names]
    np.testing.assert_allclose(finals, voc[f"{case}.final"], atol=RATIO, rtol=0)


@pytest.mark.parametrize("case", CELLS)
def test_the_metric_functions_on_small_maps(case):
    golden = load_file(GOLDEN / "metrics_functions.safetensors")
    predict, target, scores = (golden[f"fn.{case}.{name}"].numpy() for name in ("predict", "target", "scores"))
    truth = np.where(target < 0, 255, target).astype(np.uint8)
    counts = count(predict.astype(np.uint8), truth, (0, 1))
    assert [counts.correct, counts.valid] == golden[f"fn.{case}.correct_labeled"].tolist()
    union = np.array(counts.pred) + counts.label - np.array(counts.inter)
    assert [list(counts.inter), union.tolist()] == golden[f"fn.{case}.inter_union"].tolist()
    ap = two_channel_average_precision(scores[1], truth, minmax=False)
    assert ap == pytest.approx(golden[f"fn.{case}.ap"].item(), abs=AP)
