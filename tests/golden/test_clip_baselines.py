"""TextSpan's maps against what clip_text_span (49f70f3) and ConceptAttention's wrapper of it returned on tiny random CLIPs.

Float32 on both sides; tolerances are the judge's own (vit_baselines/tolerances.json).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_encoders import task, write_clip

from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.extractors.textspan import TextSpan, patch_contributions
from conceptseg.segment.resize import resize_image
from conceptseg.segment.threshold import above_mean
from conceptseg.types import Batch

ROOT = Path(__file__).parent / "vit_baselines"
TOLERANCES = json.loads((ROOT / "tolerances.json").read_text())
CASES = {"clip_img32_p8": ([0.5] * 3, [0.25] * 3), "clip_wrapper_224": ([0.0] * 3, [1.0] * 3)}


class Reference:
    """One case: its tensors, and a backbone whose prompts have the token ids that the reference gave them."""

    def __init__(self, name, folder):
        about = json.loads((ROOT / name / "config.json").read_text())
        self.name, self.words = name, tuple(about["concepts"])
        self.inputs, self.wanted = (load_file(ROOT / name / f"{part}.safetensors") for part in ("inputs", "outputs"))
        write_clip(folder, load_file(ROOT / name / "weights.safetensors"), config=about["model_cfg"], tokenizer=False)
        mean, std = CASES[name]
        self.backbone = CLIPBackbone(str(folder), mean=mean, std=std, labels=list(self.words), tokenizer="bpe")
        ids = {t.replace("{}", w): self.inputs["token_ids"][c][n] for c, w in enumerate(self.words)
               for n, t in enumerate(self.backbone.templates)}  # fmt: skip
        self.backbone.token_ids = lambda texts: torch.stack([ids[text] for text in texts])
        self.images = [image.permute(1, 2, 0).numpy() for image in self.inputs["image_u8"]]

    def batch(self, images):
        return Batch(tuple(task(i, self.words, range(1, len(self.words) + 1), f"made/{n}") for n, i in enumerate(images)))

    def differs(self, got, key):
        """By how many tolerances a tensor differs from the reference's."""
        kind, allowed = TOLERANCES[self.name][key]
        wanted = self.wanted[key]
        assert got.shape == wanted.shape
        off = (got - wanted).abs().max() / (wanted.abs().max() if kind == "rel" else 1)
        print(f"{self.name} {key}: {float(off):.1e} {kind}")
        return float(off) / allowed


@pytest.fixture(scope="module", params=CASES)
def reference(request, tmp_path_factory):
    return Reference(request.param, tmp_path_factory.mktemp(request.param))


def test_text_vectors_are_means_of_unit_vectors_over_80_templates(reference):
    assert len(reference.backbone.templates) == 80
    vectors = reference.backbone.text_vectors(reference.words)
    assert reference.differs(vectors.T, "concept_vectors") <= 1


def test_the_image_vector_and_the_patches_parts_of_it_are_the_references(reference):
    shown = reference.batch(reference.images)
    with torch.no_grad():
        patches, vectors = patch_contributions(reference.backbone, reference.backbone.images(shown.tasks))
    assert reference.differs(vectors, "representation") <= 1
    wanted = reference.wanted["attention_contributions"].sum((1, 3))[:, 1:]
    allowed = TOLERANCES[reference.name]["attention_contributions"][1]
    assert float((patches - wanted).abs().max() / wanted.abs().max()) <= allowed


def test_all_terms_of_the_decomposition_sum_to_the_unit_image_vector(reference):
    """Gandelsman et al. 2024, section 3: with the class token's own part and the MLPs, nothing is missing."""
    found = reference.wanted
    total = found["attention_contributions"].sum((1, 2, 3)) + found["mlp_contributions"].sum(1)
    shown = reference.batch(reference.images)
    with torch.no_grad():
        patches, vectors = patch_contributions(reference.backbone, reference.backbone.images(shown.tasks))
    others = found["attention_contributions"][:, :, 0].sum((1, 2)) + found["mlp_contributions"].sum(1)
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(patches.sum(1) + others, unit, atol=1e-5, rtol=0)
    torch.testing.assert_close(total, unit, atol=1e-5, rtol=0)


def test_maps_told_the_words_are_the_wrappers_and_so_are_their_masks(reference):
    images, size = reference.images, reference.backbone.image_size
    if "image_for_wrapper_u8" in reference.inputs:
        image = reference.inputs["image_for_wrapper_u8"].permute(1, 2, 0).numpy()
        images = [resize_image(image, size, "bilinear")]
        shown = reference.inputs["image_after_wrapper_transform"].permute(1, 2, 0).numpy()
        assert np.array_equal(images[0], shown)
    method = TextSpan(reference.backbone, explained_class="given", reference="none", clip_at_zero=False)
    maps = method.saliency(reference.batch(images))
    assert reference.differs(maps, "wrapper_heatmaps") <= 1
    masks = np.stack([[above_mean(one) for one in image] for image in maps.numpy()])
    assert np.array_equal(masks, reference.wanted["wrapper_masks_all"].numpy().astype(bool))
    assert np.array_equal(maps.argmax(1).numpy(), reference.wanted["multiclass_argmax"].numpy())


def test_normalising_what_the_wrapper_does_not_would_be_seen(reference):
    if reference.name == "clip_wrapper_224":
        image = reference.inputs["image_after_wrapper_transform"].permute(1, 2, 0).numpy()
        method = TextSpan(reference.backbone, explained_class="given", reference="none", clip_at_zero=False)
        maps = method.saliency(reference.batch([image]))[0]
        negative = reference.wanted["heatmap_if_clip_normalised"]
        assert float((maps - negative).abs().max() / maps.abs().max()) > 1


def test_maps_of_its_own_class_are_the_papers_and_so_are_their_masks(reference):
    """Mean over classes subtracted, enlarged, cut at 0; min-max and the cut at the mean are the protocol's."""
    method = TextSpan(reference.backbone, explained_class="predicted", reference="labels", clip_at_zero=True)
    maps = method.saliency(reference.batch(reference.images))
    assert (maps == maps[:, :1]).all(), "told nothing, it shows one map whatever is asked for"
    chosen = (reference.wanted["representation"] @ reference.wanted["concept_vectors"]).argmax(1)
    assert torch.equal(chosen.int(), reference.wanted["seg.chosen_class"])
    scaled = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in maps[:, 0]])
    if "seg.Res" in reference.wanted:
        assert reference.differs(scaled, "seg.Res") <= 1
    masks = np.stack([above_mean(m) for m in scaled.numpy()])
    assert np.array_equal(masks, reference.wanted["seg.mask"].numpy().astype(bool))
