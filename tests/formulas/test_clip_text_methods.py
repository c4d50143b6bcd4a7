"""Dense readings of CLIP against literal versions, on tiny random stock towers, in float64."""

from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from crf_oracle import mean_field
from tiny_encoders import batch, one_by_one, tiny_clip, tiny_vit
from torch.nn.functional import cosine_similarity, linear

from conceptseg.extractors import dense_crf
from conceptseg.extractors.clip_as_rnn import CRF as CLIP_AS_RNN_CRF
from conceptseg.extractors.clip_as_rnn import CLIPasRNN, outlined, sinkhorn
from conceptseg.extractors.gem import GEM
from conceptseg.extractors.legrad import LeGrad
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.extractors.naclip import NACLIP, neighbourhood
from conceptseg.extractors.ovam import CRF as OVAM_CRF
from conceptseg.extractors.proxyclip import ProxyCLIP, affinity
from conceptseg.extractors.textspan import TextSpan, patch_contributions


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"), dtype="float64")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("dino"), "images", dtype="float64", classes=0, labels=(), img_size=32)


def residuals(clip, images):
    """Residual stream before every block and after the last, by the host's own blocks."""
    x = clip.model._embeds(images)
    found = [x]
    for block in clip.model.transformer.resblocks:
        found.append(block(found[-1]))
    return found


def heads(attn, x, count):
    """Queries, keys, values of each head of one image, a list of [T k]."""
    width = x.shape[-1] // count
    q, k, v = linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
    return [tuple(t[:, h * width : (h + 1) * width] for t in (q, k, v)) for h in range(count)]


def cosines(clip, tokens, word="apple"):
    vectors = clip.model.ln_post(tokens) @ clip.model.proj
    return cosine_similarity(vectors, clip.text_vectors([word]), dim=-1).view(3, 3)


def test_maskclip_is_the_last_block_with_the_identity_for_attention(clip):
    shown = batch(1)
    x = residuals(clip, clip.images(shown.tasks))[-2][0]
    block = clip.model.transformer.resblocks[-1]
    _, _, values = linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    y = x + block.attn.out_proj(values)
    torch.testing.assert_close(MaskCLIP(clip).saliency(shown)[0, 0], cosines(clip, (y + block.mlp(block.ln_2(y)))[1:]))


def test_naclip_is_keys_with_keys_and_a_gaussian_head_by_head(clip):
    shown = batch(1)
    block = clip.model.transformer.resblocks[-1]
    x = block.ln_1(residuals(clip, clip.images(shown.tasks))[-2][0])
    near = torch.zeros(10, 10, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            near[1 + i, 1 + j] = np.exp(-((i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2) / 50)
    mixed = [torch.softmax(k @ k.T / 8**0.5 + near, -1) @ v for _, k, v in heads(block.attn, x, 3)]
    wanted = cosines(clip, block.attn.out_proj(torch.cat(mixed, -1))[1:])
    torch.testing.assert_close(NACLIP(clip).saliency(shown)[0, 0], wanted)
    assert neighbourhood((3, 3), 5.0)[0, 0] == 1


def test_gem_is_a_second_stream_of_self_self_attention(clip):
    shown = batch(1)
    before = residuals(clip, clip.images(shown.tasks))
    stream = before[2][0]
    for layer in (2, 3):
        block = clip.model.transformer.resblocks[layer]
        x = block.ln_1(before[layer][0])
        sharp = x.norm(dim=-1).mean() / 8**0.5
        mixed = []
        for q, k, v in heads(block.attn, x, 3):
            total = 0
            for kind in (q, k, v):
                unit = kind / kind.norm(dim=-1, keepdim=True)
                unit = torch.softmax(unit @ unit.T * sharp, -1) @ unit
                unit = unit / unit.norm(dim=-1, keepdim=True)
                total = total + torch.softmax(unit @ unit.T * sharp, -1) @ v
            mixed.append(total / 3)
        stream = stream + block.attn.out_proj(torch.cat(mixed, -1))
    torch.testing.assert_close(GEM(clip, layers=2).saliency(shown)[0, 0], cosines(clip, stream[1:]))


def test_proxyclip_mixes_values_by_the_affinity_of_the_other_encoder(clip, dino):
    shown = batch(1)
    block = clip.model.transformer.resblocks[-1]
    x = block.ln_1(residuals(clip, clip.images(shown.tasks))[-2][0])
    values = torch.cat([v for _, _, v in heads(block.attn, x, 3)], -1)[1:].T.view(1, -1, 3, 3)
    values = torch.nn.functional.interpolate(values, size=(4, 4), mode="bilinear")[0].flatten(1).T
    patches = dino.model.forward_features(dino.images(shown.tasks))[0, 1:]
    cosine = cosine_similarity(patches[:, None], patches[None], dim=-1)
    score = 3 * (cosine - 1.2 * cosine.mean())
    weights = torch.where(score < 0, 0, score.exp())
    mixed = (weights / weights.sum(-1, keepdim=True)) @ values
    vectors = clip.model.ln_post(block.attn.out_proj(mixed)) @ clip.model.proj
    wanted = cosine_similarity(vectors, clip.text_vectors(["apple"]), dim=-1).view(4, 4)
    torch.testing.assert_close(ProxyCLIP(clip, dino).saliency(shown)[0, 0], wanted)


def test_patches_that_are_all_alike_keep_to_themselves():
    assert torch.equal(affinity(torch.ones(1, 3, 2), 1.2, 3.0)[0], torch.eye(3))


def test_legrad_is_positive_gradients_of_each_blocks_own_score(clip):
    """Attention is formed explicitly and put back into the block; the gradient is autograd's."""
    shown = batch(1)
    before = residuals(clip, clip.images(shown.tasks))
    total = torch.zeros(9, dtype=torch.float64)
    for layer in (2, 3):
        block, x = clip.model.transformer.resblocks[layer], before[layer][0]
        matrices = [torch.softmax(q @ k.T / 8**0.5, -1).requires_grad_() for q, k, _ in heads(block.attn, block.ln_1(x), 3)]
        values = [v for _, _, v in heads(block.attn, block.ln_1(x), 3)]
        y = x + block.attn.out_proj(torch.cat([m @ v for m, v in zip(matrices, values, strict=True)], -1))
        y = y + block.mlp(block.ln_2(y))
        vector = clip.model.ln_post(y.mean(0)) @ clip.model.proj
        score = cosine_similarity(vector, clip.text_vectors(["apple"])[0], dim=0)
        gradients = torch.stack(torch.autograd.grad(score, matrices)).clamp(min=0)
        total += gradients.mean((0, 1))[1:]
    torch.testing.assert_close(LeGrad(clip, layers=2).saliency(shown)[0, 0], total.view(3, 3))


def test_textspans_patches_are_the_sum_over_layers_and_heads_term_by_term(clip):
    """The decomposition of Gandelsman et al. 2024, section 3, with biases shared out; all terms sum to the image vector."""
    shown = batch(1)
    stream = residuals(clip, clip.images(shown.tasks))
    depth, count, tokens = 4, 3, 10
    parts = 2 * depth + 1
    cls, norm = stream[-1][0, 0], clip.model.ln_post
    mean, sigma = cls.mean(), (cls.var(correction=0) + norm.eps).sqrt()
    vector = clip.model(clip.images(shown.tasks))[0]
    terms = torch.zeros(tokens, 20, dtype=torch.float64)
    others = torch.zeros(20, dtype=torch.float64)

    def placed(term, share):
        return ((term - mean / share) * norm.weight / sigma + norm.bias / share) @ clip.model.proj / vector.norm()

    others += placed(stream[0][0, 0], parts)
    for layer, block in enumerate(clip.model.transformer.resblocks):
        x, width = block.ln_1(stream[layer][0]), 8
        middle = stream[layer][0] + block.attention(block.ln_1(stream[layer]))[0]
        others += placed(block.mlp(block.ln_2(middle))[0], parts)
        for head, (q, k, v) in enumerate(heads(block.attn, x, count)):
            row = torch.softmax(q[0] @ k.T / width**0.5, -1)
            out = block.attn.out_proj.weight[:, head * width : (head + 1) * width]
            for i in range(tokens):
                terms[i] += placed(row[i] * out @ v[i] + block.attn.out_proj.bias / (tokens * count), parts * tokens * count)
    torch.testing.assert_close(terms.sum(0) + others, vector / vector.norm())
    with torch.no_grad():
        patches, _ = patch_contributions(clip, clip.images(shown.tasks))
    torch.testing.assert_close(patches[0], terms[1:])


def test_sinkhorn_gives_a_symmetric_matrix_whose_rows_nearly_sum_to_one():
    found = sinkhorn(torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).double() + 0.1)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=torch.float64), atol=1e-3, rtol=0)


def test_the_judge_sees_a_red_ellipse_and_a_blur_outside():
    image = np.random.default_rng(0).random((40, 40, 3)).astype(np.float32)
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    shown = outlined(image, mask)
    assert np.allclose(shown[20, 20], image[20, 20], atol=1 / 255) and not np.allclose(shown[2, 2], image[2, 2], atol=0.02)
    assert (shown == np.array([1, 0, 0], np.float32)).all(-1).any()


def test_a_word_that_fails_the_judge_is_struck_off_and_the_best_stays(clip):
    method = CLIPasRNN(clip, clip, ["grass", "sky"], ["a {}"], keep=1.1)
    maps = method.saliency(batch(1, names=("apple", "kite", "grass"), labels=(1, 2, 0)))[0]
    assert sum(bool(m.any()) for m in maps) == 1 and not maps[2].any()
    alone = CLIPasRNN(clip, clip, ["grass"], ["a {}"], crf_iterations=0).saliency(batch(1))[0]
    assert alone[0].min() == 0 and alone[0].max() == 1


LETTERS = {  # of arXiv:1210.5644 as the notes state them: w1, alpha, beta, w2, gamma, iterations
    "CLIPasRNN": (CLIP_AS_RNN_CRF, (4, 67, 3, 3, 1, 10)), "OVAM": (OVAM_CRF, (10, 80, 13, 3, 3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", LETTERS)
@pytest.mark.parametrize("pairs", [1 << 24, 1 << 7], ids=["kept", "in parts"])
def test_a_methods_crf_is_mean_field_over_every_pair_of_pixels(name, pairs, monkeypatch):
    monkeypatch.setattr(dense_crf, "PAIRS_AT_ONCE", pairs)
    crf, letters = LETTERS[name]
    assert astuple(crf) == letters
    rng = np.random.default_rng(0)
    image, given = rng.random((3, 4, 5)) * 0.05, rng.dirichlet([1, 1, 1], size=(2, 4, 5)).transpose(0, 3, 1, 2)
    found = replace(crf, iterations=2)(torch.tensor(given), torch.tensor(image))  # more, and every pixel is sure
    for one, wanted in zip(found, given, strict=True):
        torch.testing.assert_close(one, torch.tensor(mean_field(wanted, image, *letters[:-1], 2)))


def test_the_crf_draws_an_edge_where_colours_change():
    """Evidence leaks one column over the edge of two colours; the CRF takes it back."""
    image = torch.zeros(3, 6, 8, dtype=torch.float64)
    image[:, :, 4:] = 1
    leaning = torch.where(torch.arange(8) < 5, 0.7, 0.2).double().expand(6, 8)
    found = CLIP_AS_RNN_CRF(torch.stack([leaning, 1 - leaning])[None], image)[0, 0]
    assert (leaning[:, 4] > 0.5).all() and ((found > 0.5) == (image[0] == 0)).all()


METHODS = [
    (MaskCLIP, {}), (NACLIP, {}), (GEM, {"layers": 2}), (LeGrad, {}), (TextSpan, {"explained_class": "given"}), (TextSpan, {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), METHODS)
def test_a_batch_of_eight_is_eight_batches_of_one(clip, kind, settings):
    method, shown = kind(clip, **settings), batch(8)
    alone = one_by_one(method, shown)
    assert float((method.saliency(shown) - alone).abs().max() / alone.abs().max()) <= 1e-9
