"""ResCLIP and OSP against literal versions of their formulas, on tiny random stock models, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_encoders import batch, one_by_one, tiny_clip
from torch.nn.functional import cosine_similarity, linear

from conceptseg.errors import ConfigError
from conceptseg.extractors.legrad import LeGrad
from conceptseg.extractors.osp import OSP, residual
from conceptseg.extractors.resclip import ResCLIP, same_class
from conceptseg.segment.refine import pamr
from conceptseg.segment.resize import bilinear
from conceptseg.types import Batch, Concepts

NAMES, LABELS = ("apple", "fish", "grass"), (1, 2, 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"), dtype="float64")


def blurred_rows(classes, sigma):
    """generate_attention_sfr of the released code, pair by pair."""
    height, width = len(classes), len(classes[0])
    cells = [(y, x) for y in range(height) for x in range(width)]
    longest = max(height, width) - 1
    rows = []
    for sy, sx in cells:
        row = []
        for ey, ex in cells:
            if classes[sy][sx] != classes[ey][ex]:
                row.append(0.0)
                continue
            steps, broken = max(abs(ey - sy), abs(ex - sx)), False
            for k in range(min(steps, longest) + 1):
                t = k / longest
                y, x = round(sy * (1 - t) + ey * t), round(sx * (1 - t) + ex * t)
                broken = broken or classes[y][x] != classes[sy][sx]
            row.append(math.exp(-steps / longest) if broken else 1.0)
        rows.append(row)
    size = min(len(cells), int(6 * sigma + 1))
    size += 1 - size % 2
    half = size // 2
    kernel = [math.exp(-((k - half) ** 2) / (2 * sigma**2)) for k in range(size)]
    kernel = [k / sum(kernel) for k in kernel]
    found = []
    for row in rows:
        smooth = [
            sum(kernel[k] * row[j + k - half] for k in range(size) if 0 <= j + k - half < len(row)) for j in range(len(row))
        ]
        found.append([v / (sum(smooth) + 1e-8) for v in smooth])
    greatest = max(map(max, found))
    return torch.tensor([[v / greatest for v in row] for row in found])


@pytest.mark.parametrize("classes", [[[0, 0, 1], [1, 0, 1], [0, 0, 0]], [[2, 1, 2, 2], [2, 1, 1, 2]]])
@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_patches_of_one_class_attend_along_unbroken_lines(classes, sigma):
    torch.testing.assert_close(same_class(torch.tensor(classes), sigma), blurred_rows(classes, sigma), atol=1e-5, rtol=1e-4)


def literal(clip, shown, feedback):
    """The maps of ResCLIP for one image, head by head: [C h w]."""
    x = clip.model._embeds(clip.images(shown.tasks))
    blocks, matrices = clip.model.transformer.resblocks, []
    for block in blocks[:-1]:
        q, k, _ = (
            part.view(10, 3, 8).transpose(0, 1)
            for part in linear(block.ln_1(x)[0], block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        )
        matrices.append(torch.stack([torch.softmax(q[h] @ k[h].T / 8**0.5, -1) for h in range(3)]))
        x = block(x)
    block = blocks[-1]
    _, k, v = (
        part.view(10, 3, 8).transpose(0, 1)
        for part in linear(block.ln_1(x)[0], block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    )
    near = torch.zeros(10, 10, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            distance = (i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2
            near[1 + i, 1 + j] = math.exp(-distance / (2 * 2.0**2))
    middle = (matrices[1] + matrices[2]) / 2
    words = clip.text_vectors(list(NAMES))

    def read(same):
        mixed = []
        for h in range(3):
            scores = k[h] @ k[h].T / 8**0.5
            if same is not None:
                scores = 1.5 * (0.4 * scores + 0.6 * same)
            attention = 2.0 * (0.7 * torch.softmax(scores + near, -1) + 0.3 * middle[h])
            mixed.append(attention @ v[h])
        tokens = block.attn.out_proj(torch.cat(mixed, -1))[1:]
        vectors = clip.model.ln_post(tokens) @ clip.model.proj
        return torch.stack([cosine_similarity(vectors, word[None], dim=-1) for word in words]).view(3, 3, 3)

    first = read(None)
    if not feedback:
        return first
    image = bilinear(shown.tasks[0].image.transpose(2, 0, 1), (24, 24)).transpose(1, 2, 0)
    scores = pamr(bilinear(first.float().numpy(), (24, 24)), image, 1, (8, 16))
    shares = torch.softmax(400 * torch.from_numpy(scores), 0)
    classes = [[0] * 3 for _ in range(3)]
    for i in range(3):
        for j in range(3):
            votes = []
            for y in range(8 * i, 8 * i + 8):
                for z in range(8 * j, 8 * j + 8):
                    share = shares[:, y, z]
                    votes.append(int(share.argmax()) if share.max() >= 0.4 else 0)
            classes[i][j] = min(set(votes), key=lambda c: (-votes.count(c), c))
    assert len({c for row in classes for c in row}) > 1
    same = torch.zeros(10, 10, dtype=torch.float64)
    same[1:, 1:] = blurred_rows(classes, 2.0).double()
    return read(same)


@pytest.mark.parametrize("feedback", [False, True])
def test_resclip_mixes_middle_attention_and_its_own_answer_into_the_last(clip, feedback):
    weights = (1.5, 0.6) if feedback else None
    method = ResCLIP(clip, (1, 2), (2.0, 0.3), weights, threshold=0.4, logit_scale=400.0, sigma=2.0, pamr_steps=1)
    shown = batch(1, seed=1, names=NAMES, labels=LABELS)
    torch.testing.assert_close(method.saliency(shown)[0], literal(clip, shown, feedback), atol=1e-5, rtol=1e-4)


def test_resclip_reads_blocks_before_the_last_and_each_image_for_itself(clip):
    for wrong in ((1, 3), (2, 1), (-1, 2)):
        with pytest.raises(ConfigError, match=r"extractor\.middle is"):
            ResCLIP(clip, wrong).saliency(batch(1, names=NAMES, labels=LABELS))
    method, shown = ResCLIP(clip, (1, 2), sigma=2.0), batch(3, names=NAMES, labels=LABELS)
    torch.testing.assert_close(one_by_one(method, shown), method.saliency(shown))


# ---------------------------------------------------------------- OSP


def test_the_residual_is_orthogonal_to_what_the_pursuit_takes():
    generator = torch.Generator().manual_seed(0)
    word, rows = (
        torch.nn.functional.normalize(torch.randn(*size, generator=generator).double(), dim=-1) for size in ((7,), (4, 7))
    )
    left = residual(word, rows, 2)
    first = int((rows @ word).abs().argmax())
    once = word - (rows[first] @ word) * rows[first]
    second = max((k for k in range(4) if k != first), key=lambda k: abs(float(rows[k] @ once)))
    chosen = rows[[first, second]]
    basis = torch.linalg.qr(chosen.T).Q
    wanted = word - basis @ (basis.T @ word)
    torch.testing.assert_close(left, wanted / wanted.norm(), atol=1e-4, rtol=1e-4)
    assert float((chosen @ left).abs().max()) < 1e-4
    torch.testing.assert_close(residual(word, rows[:0], 8), word)
    torch.testing.assert_close(residual(word, torch.eye(7).double(), 7), word)  # wholly explained: its own vector


def test_osp_is_legrad_of_the_residual_word(clip):
    shown = batch(2, names=NAMES, labels=LABELS)
    plain, osp = LeGrad(clip).saliency(shown), OSP(clip, most_alike=1.0).saliency(shown)
    assert not torch.allclose(plain[:, :2], osp[:, :2]) and not osp[:, 2].any()
    torch.testing.assert_close(OSP(clip, most_alike=-1.0).saliency(shown), plain)  # every other word is too much alike
    words = dict(zip(NAMES, clip.text_vectors(list(NAMES)), strict=True))
    wanted = residual(words["apple"], torch.stack([words["fish"], words["grass"]]), 8)
    (row, _) = OSP(clip, most_alike=1.0).named(["apple", "apple"], shown).rows
    torch.testing.assert_close(row, wanted)
    (row, _) = OSP(clip, dictionary=["grass", "Apple"], most_alike=1.0).named(["apple", "apple"], shown).rows
    torch.testing.assert_close(row, residual(words["apple"], words["grass"][None], 8))
    with pytest.raises(ConfigError, match="wanted concepts, or a list of words"):
        OSP(clip, dictionary="wordnet")
    assert np.isfinite(osp.numpy()).all()


def test_absent_names_have_maps_and_background_words_have_none(clip):
    """As class words of a protocol of several classes they would be explained alike."""
    shown = batch(2, names=NAMES, labels=(1, 0, 0))
    offered = Concepts(NAMES, (1, 0, 0), 0, distractors=(1,))
    absent = Batch((replace(shown.tasks[0], concepts=offered), shown.tasks[1]))
    named = batch(2, names=NAMES, labels=(1, 2, 0))
    for method in (LeGrad(clip), OSP(clip)):
        found, asked = method.saliency(absent), method.saliency(named)
        torch.testing.assert_close(found[0], asked[0])
        torch.testing.assert_close(found[1, 0], asked[1, 0])
        assert found[0, 1].any() and not found[0, 2].any() and not found[1, 1:].any(), type(method).__name__
