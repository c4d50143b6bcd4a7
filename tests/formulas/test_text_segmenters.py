"""GroupViT and CLIPSeg, on tiny random models of the stock classes."""

import pytest
import torch
from tiny_encoders import batch, one_by_one
from tiny_transformers import made

from conceptseg.errors import ConfigError
from conceptseg.extractors.clipseg import CLIPSeg
from conceptseg.extractors.groupvit import GroupViT


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    names = ("GroupViTModel", "CLIPSegForImageSegmentation")
    return {name: made(tmp_path_factory.mktemp(name), name) for name in names}


def test_groupvit_asks_each_image_about_its_own_words(models):
    method, shown = GroupViT(models["GroupViTModel"]), batch(2)
    ids, mask = method.backbone.token_ids(["apple"])
    wanted = method.backbone.model(
        input_ids=ids, attention_mask=mask, pixel_values=method.backbone.images(shown.tasks[1:]), output_segmentation=True
    ).segmentation_logits[0, 0]
    torch.testing.assert_close(method.saliency(shown)[1, 0], wanted)


def test_clipseg_is_the_probability_of_the_hosts_logits(models):
    method, shown = CLIPSeg(models["CLIPSegForImageSegmentation"]), batch(2)
    ids, mask = method.backbone.token_ids(["grass"])
    wanted = method.backbone.model(
        input_ids=ids, attention_mask=mask, pixel_values=method.backbone.images(shown.tasks[:1])
    ).logits
    torch.testing.assert_close(method.saliency(shown)[0, 1], torch.sigmoid(wanted[0] if wanted.ndim == 3 else wanted))


def test_batches_change_nothing_and_another_model_is_refused(models):
    shown = batch(2)
    for method in (GroupViT(models["GroupViTModel"]), CLIPSeg(models["CLIPSegForImageSegmentation"])):
        torch.testing.assert_close(method.saliency(shown), one_by_one(method, shown), atol=1e-5, rtol=1e-5)
        assert method.told == "true name"
    with pytest.raises(ConfigError, match=r"is a GroupViTModel, but this method reads a CLIPSegForImageSegmentation"):
        CLIPSeg(models["GroupViTModel"])
