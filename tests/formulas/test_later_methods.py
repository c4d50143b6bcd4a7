"""Methods newer than ConceptAttention against literal versions of their formulas, on tiny random stock models, in float64."""

import math

import pytest
import torch
from scipy.linalg import eigh
from tiny_encoders import batch, one_by_one, tiny_clip, tiny_vit
from torch.nn.functional import cosine_similarity, linear

from conceptseg.backbones.base import sample_noise
from conceptseg.extractors.attnlrp import AttnLRP, relevance_forward
from conceptseg.extractors.beyond_intuition import BeyondIntuition
from conceptseg.extractors.clearclip import ClearCLIP
from conceptseg.extractors.grad_eclip import GradECLIP
from conceptseg.extractors.input_gradients import IntegratedGradients, SmoothGrad
from conceptseg.extractors.lposs import LPOSS
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.extractors.object_discovery import LOST, TokenCut
from conceptseg.extractors.pearl import PEARL, polar_factor
from conceptseg.extractors.sclip import SCLIP
from conceptseg.types import Batch


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"), dtype="float64")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("vit") / "model", dtype="float64")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("dino") / "images", dtype="float64", classes=0, labels=(), img_size=32)


# ---------------------------------------------------------------- CLIP's last block, head by head and row by row


def last_block(clip, shown):
    """The last block, what enters it [T d], and (q, k, v) of each head, [T k] each."""
    x = clip.model._embeds(clip.images(shown.tasks))
    blocks = clip.model.transformer.resblocks
    for block in blocks[:-1]:
        x = block(x)
    block, x = blocks[-1], x[0]
    parts = linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    return block, x, [tuple(part[:, 8 * h : 8 * h + 8] for part in parts) for h in range(3)]


def share(logits):
    weights = [math.exp(v) for v in logits.tolist()]
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def attended(rows_of_scores, values):
    return torch.stack([share(row) @ values for row in rows_of_scores])


def cosines(clip, tokens, word="apple"):
    vectors = clip.model.ln_post(tokens) @ clip.model.proj
    return cosine_similarity(vectors, clip.text_vectors([word]), dim=-1).view(3, 3)


def test_sclip_adds_attention_of_queries_and_of_keys(clip):
    shown = batch(1)
    block, x, heads = last_block(clip, shown)
    mixed = [attended(q @ q.T / 8**0.5, v) + attended(k @ k.T / 8**0.5, v) for q, k, v in heads]
    y = x + block.attn.out_proj(torch.cat(mixed, -1))
    torch.testing.assert_close(SCLIP(clip).saliency(shown)[0, 0], cosines(clip, (y + block.mlp(block.ln_2(y)))[1:]))


def test_clearclip_is_attention_of_queries_alone(clip):
    shown = batch(1)
    block, _, heads = last_block(clip, shown)
    mixed = torch.cat([attended(q @ q.T / 8**0.5, v) for q, _, v in heads], -1)
    torch.testing.assert_close(ClearCLIP(clip).saliency(shown)[0, 0], cosines(clip, block.attn.out_proj(mixed)[1:]))


def test_pearl_rotates_keys_onto_queries_before_it_attends(clip):
    """With many steps the rotation is U Vᵀ of the singular value decomposition."""
    shown = batch(1)
    block, _, heads = last_block(clip, shown)
    mixed = []
    for q, k, v in heads:
        qc, kc = q - q.mean(0), k - k.mean(0)
        left, _, right = torch.linalg.svd(kc.T @ qc)
        scores = torch.zeros(10, 10, dtype=torch.float64)
        for i in range(10):
            for j in range(10):
                scores[i, j] = (q[i] @ (k[j] @ left @ right) + 0.08 * kc[i] @ kc[j]) / 8**0.5
        mixed.append(attended(scores, v))
    wanted = cosines(clip, block.attn.out_proj(torch.cat(mixed, -1))[1:])
    torch.testing.assert_close(PEARL(clip, steps=40).saliency(shown)[0, 0], wanted)
    assert not torch.allclose(PEARL(clip).saliency(shown)[0, 0], wanted, atol=1e-4)  # five steps are an approximation


def test_the_polar_factor_of_a_rotation_is_itself_and_of_zero_is_zero():
    turned = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()).Q
    torch.testing.assert_close(polar_factor(3 * turned, 30), turned)
    assert not polar_factor(torch.zeros(2, 2), 5).any()


def test_grad_eclip_weighs_values_by_gradient_and_loose_attention(clip):
    """The gradient is autograd's, through the last block written out; everything else is a loop over patches."""
    shown = batch(3, names=("apple", "kite", "grass"), labels=(1, 2, 0))
    found = GradECLIP(clip).saliency(shown)
    for task, maps in zip(shown.tasks, found, strict=True):
        block, x, heads = last_block(clip, Batch((task,)))
        mixed = torch.cat([attended(q @ k.T / 8**0.5, v) for q, k, v in heads], -1).requires_grad_()
        y = x + block.attn.out_proj(mixed)
        y = y + block.mlp(block.ln_2(y))
        vector = clip.model.ln_post(y[0]) @ clip.model.proj
        q, k, v = (torch.cat([head[i] for head in heads], -1) for i in range(3))
        likeness = [float(cosine_similarity(block.attn.out_proj(q[0]), block.attn.out_proj(k[i]), dim=0)) for i in range(1, 10)]
        loose = [(c - min(likeness)) / (max(likeness) - min(likeness)) for c in likeness]
        for word, map_ in zip(("apple", "kite"), maps, strict=False):
            score = cosine_similarity(vector, clip.text_vectors([word])[0], dim=0)
            gradient = torch.autograd.grad(score, mixed, retain_graph=True)[0][0]
            wanted = [max(0.0, loose[i] * float(sum(g * u for g, u in zip(gradient, v[1 + i], strict=True)))) for i in range(9)]
            torch.testing.assert_close(map_.flatten(), torch.tensor(wanted, dtype=torch.float64))
    assert found[:, :2].any() and not found[:, 2].any()


def test_lposs_solves_the_propagation_pair_by_pair(clip, dino):
    shown = batch(1)
    tower = dino.tower
    normed = []
    hook = dino.model.blocks[-1].norm1.register_forward_hook(lambda m, a, output: normed.append(output))
    dino.model(dino.images(shown.tasks))
    hook.remove()
    values = dino.model.blocks[-1].attn.qkv(normed[0])[0, 1:].chunk(3, -1)[2]
    centres = [(8 * r + 4, 8 * c + 4) for r in range(4) for c in range(4)]
    edges = torch.zeros(16, 16, dtype=torch.float64)
    for i in range(16):
        likeness = [float(cosine_similarity(values[i], values[j], dim=0)) for j in range(16)]
        for j in sorted(range(16), key=lambda j: -likeness[j])[:5]:
            distance = math.dist(centres[i], centres[j])
            edges[i, j] = max(likeness[j], 0) ** 3 * math.exp(-0.01 * distance)
    edges = edges + edges.T
    edges.fill_diagonal_(0)
    degree = edges.sum(1)
    graph = edges / (degree[:, None] * degree[None]).sqrt()
    vectors = MaskCLIP(clip).patch_vectors(shown)[0].permute(2, 0, 1)[None]
    vectors = torch.nn.functional.interpolate(vectors, size=tower.grid, mode="bilinear")[0].flatten(1).T
    start = cosine_similarity(vectors, clip.text_vectors(["apple"]), dim=-1)
    total, term = start.clone(), start
    for _ in range(2000):  # Σ (alpha W)^n
        term = 0.95 * graph @ term
        total = total + term
    torch.testing.assert_close(LPOSS(clip, dino, neighbours=5).saliency(shown)[0, 0].flatten(), total)


# ---------------------------------------------------------------- gradients and relevance of a classifier


def forward(vit, images):
    """timm's ViT written out; attention matrices of each block are leaves of the graph of what follows."""
    model, matrices, seen = vit.model, [], []
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(1, 10, 3, 3, 8).permute(2, 0, 3, 1, 4)
        matrix = torch.softmax(q @ k.mT / 8**0.5, -1).requires_grad_()
        seen.append((x, v))
        matrices.append(matrix)
        x = x + block.attn.proj((matrix @ v).transpose(1, 2).reshape(1, 10, 24))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])[0], matrices, seen


@pytest.mark.parametrize("weights", ["heads", "tokens"])
def test_beyond_intuition_is_weighted_rollout_times_integrated_gradient(vit, weights):
    shown = batch(1)
    images = vit.images(shown.tasks)
    logits, matrices, seen = forward(vit, images)
    label = int(logits.argmax())
    gradients = torch.autograd.grad(logits[label], matrices)
    rolled = torch.eye(10, dtype=torch.float64)
    for layer in (1, 2):
        a, g, (x, v) = matrices[layer][0].detach(), gradients[layer][0], seen[layer]
        if weights == "heads":
            importance = [float((a[h].T @ g[h]).abs().mean()) for h in range(3)]
            step = sum(w / sum(importance) * m for w, m in zip(importance, a, strict=True))
        else:
            carried = v[0].transpose(0, 1).reshape(10, 24) @ vit.model.blocks[layer].attn.proj.weight.T
            ratio = [float(carried[t].norm() / x[0, t].norm()) for t in range(10)]
            step = a.mean(0) @ torch.diag(torch.tensor(ratio, dtype=torch.float64))
        rolled = rolled + step @ rolled
    total = 0
    for step in range(5):
        logits, matrices, _ = forward(vit, images * (step / 4))
        total = total + torch.autograd.grad(logits[label], matrices[-1])[0][0]
    wanted = ((total / 5).clamp(min=0).mean(0) * rolled)[0, 1:]
    found = BeyondIntuition(vit, weights, start_layer=1, steps=5).saliency(shown)[0, 0]
    torch.testing.assert_close(found.flatten(), wanted.detach())


def test_integrated_gradients_add_up_to_what_the_image_changes(vit):
    shown = batch(2)
    images = vit.images(shown.tasks)
    black = vit.black(images)
    assert torch.equal(black, torch.full_like(black, -1))  # (0 - 0.5) / 0.5
    explained = vit.predicted(vit.model(images))
    change = vit.score(vit.model(images), explained) - vit.score(vit.model(black), explained)
    found = IntegratedGradients(vit, steps=300, sign="signed").saliency(shown)
    torch.testing.assert_close(found[:, 0].sum((1, 2)), change, atol=1e-3, rtol=1e-3)
    absolute = IntegratedGradients(vit, steps=3).saliency(shown)
    assert (absolute >= IntegratedGradients(vit, steps=3, sign="signed").saliency(shown).abs() - 1e-12).all()


def test_integrated_gradients_are_differences_of_the_score_pixel_by_pixel(vit):
    """Central differences at the middles of two steps."""
    shown = batch(1)
    images = vit.images(shown.tasks)
    black = vit.black(images)
    label = vit.predicted(vit.model(images))
    found = IntegratedGradients(vit, steps=2, sign="signed").saliency(shown)[0, 0]
    for row, column in ((0, 0), (7, 13), (23, 5)):
        wanted = 0.0
        for colour in range(3):
            nudge = torch.zeros_like(images)
            nudge[0, colour, row, column] = 1e-5
            for share_of in (0.25, 0.75):
                at = black + share_of * (images - black)
                rise = vit.score(vit.model(at + nudge), label) - vit.score(vit.model(at - nudge), label)
                wanted += float((images - black)[0, colour, row, column] * rise / 2e-5 / 2)
        assert found[row, column].item() == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def test_smoothgrad_without_noise_is_the_gradient_and_with_noise_its_mean(vit):
    shown = batch(1)
    images = vit.images(shown.tasks)
    label = vit.predicted(vit.model(images))
    spread = 0.3 * float(images.max() - images.min())
    total = torch.zeros(24, 24, dtype=torch.float64)
    for draw in range(3):
        noisy = images + spread * sample_noise((3, 24, 24), 7, shown.keys, draw).double()
        noisy.requires_grad_()
        (gradient,) = torch.autograd.grad(vit.score(vit.model(noisy), label).sum(), noisy)
        total += gradient[0].sum(0) / 3
    method = SmoothGrad(vit, samples=3, noise=0.3, seed=7, sign="signed")
    torch.testing.assert_close(method.saliency(shown)[0, 0], total)
    still = SmoothGrad(vit, samples=2, noise=0.0, sign="signed").saliency(shown)
    torch.testing.assert_close(still, SmoothGrad(vit, samples=1, noise=0.0, sign="signed").saliency(shown))


class LiteralAttnLRP:
    """Relevance of one image, from the score back to the pixels, rule by rule: the input's share is x · Wᵀ (R / z)."""

    def __init__(self, vit):
        self.model = vit.model

    def linear(self, layer, x, relevance):
        z = layer(x)
        return x * ((relevance / z) @ layer.weight)

    def norm(self, norm, x, relevance):
        """y = (x - mean) / sd · w + b with sd a constant: a linear map of x, written out as a matrix."""
        size = x.shape[-1]
        centring = torch.eye(size, dtype=torch.float64) - 1 / size
        sd = (x.var(-1, correction=0) + norm.eps).sqrt()
        z = norm(x)
        return x * ((relevance / z * norm.weight / sd[:, None]) @ centring)

    def product(self, a, b, relevance):
        """A matrix product: each factor gets half of its entry's share, Σ a_ik b_kj R_ij / (2 z_ij)."""
        part = relevance / (2 * (a @ b))
        return a * (part @ b.T), b * (a.T @ part)

    def softmax(self, scores, relevance):
        """Relevance of x is x (R - s ΣR), per row (the paper's proposition)."""
        shares = torch.softmax(scores, -1)
        return scores * (relevance - shares * relevance.sum(-1, keepdim=True))

    def __call__(self, image, label):
        model = self.model
        patches = model.patch_embed(image)[0]
        tokens = torch.cat([model.cls_token[0], patches])
        x = tokens + model.pos_embed[0]
        kept = []
        for block in model.blocks:
            normed = block.norm1(x)
            q, k, v = block.attn.qkv(normed).view(10, 3, 3, 8).permute(1, 2, 0, 3)
            scores = [q[h] @ k[h].T / 8**0.5 for h in range(3)]
            mixed = torch.cat([torch.softmax(scores[h], -1) @ v[h] for h in range(3)], -1)
            after = x + block.attn.proj(mixed)
            hidden = block.mlp.fc1(block.norm2(after))
            kept.append((x, normed, q, k, v, scores, mixed, after, hidden))
            x = after + block.mlp.fc2(block.mlp.act(hidden))
        feature = model.norm(x)[:1]
        relevance = torch.zeros_like(x)
        relevance[:1] = self.norm(model.norm, x[:1], (feature[0] * model.head.weight[label])[None])
        for block, (x0, normed, q, k, v, scores, mixed, after, hidden) in reversed(list(zip(model.blocks, kept, strict=True))):
            down = block.mlp.fc2(block.mlp.act(hidden))
            whole = after + down
            to_mlp = self.linear(block.mlp.fc2, block.mlp.act(hidden), relevance * down / whole)
            to_mlp = self.linear(block.mlp.fc1, block.norm2(after), to_mlp)
            relevance = relevance * after / whole + self.norm(block.norm2, after, to_mlp)
            out = block.attn.proj(mixed)
            to_mixed = self.linear(block.attn.proj, mixed, relevance * out / after)
            parts = torch.zeros(10, 3, 3, 8, dtype=torch.float64)
            for h in range(3):
                of_attention, of_v = self.product(torch.softmax(scores[h], -1), v[h], to_mixed[:, 8 * h : 8 * h + 8])
                of_scores = self.softmax(scores[h], of_attention)
                of_q, of_k = self.product(q[h], k[h].T, of_scores)
                parts[:, 0, h], parts[:, 1, h], parts[:, 2, h] = of_q, of_k.T, of_v
            to_norm = self.linear(block.attn.qkv, normed, parts.reshape(10, 72))
            relevance = relevance * x0 / after + self.norm(block.norm1, x0, to_norm)
        of_tokens = relevance * tokens / (tokens + model.pos_embed[0])
        back = torch.nn.functional.conv_transpose2d(
            (of_tokens[1:] / patches).T.reshape(1, 24, 3, 3), model.patch_embed.proj.weight, stride=8
        )
        return (image * back)[0].sum(0)


def test_attnlrp_is_its_rules_from_the_score_to_the_pixels(vit):
    shown = batch(1)
    images = vit.images(shown.tasks)
    label = int(vit.model(images).argmax())
    feature = relevance_forward(vit.tower, images)
    torch.testing.assert_close(vit.model.head(feature), vit.model(images))
    with torch.no_grad():
        wanted = LiteralAttnLRP(vit)(images, label)
    torch.testing.assert_close(AttnLRP(vit).saliency(shown)[0, 0], wanted, atol=1e-8, rtol=1e-6)


# ---------------------------------------------------------------- objects without words


def made_keys():
    """Two clumps of patches and a few in between, [12 5], and what they have in common."""
    drawn = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)).double()
    drawn[:7, 0] += 2
    drawn[7:, 1] += 2
    return drawn


def test_lost_starts_at_the_patch_that_few_resemble(dino):
    keys = made_keys()
    resembling = [sum(float(keys[i] @ keys[j]) > 0 for j in range(12) if j != i) for i in range(12)]
    order = sorted(range(12), key=lambda i: resembling[i])
    joined = [i for i in order[:6] if float(keys[order[0]] @ keys[i]) > 0]
    wanted = [sum(float(keys[i] @ keys[j]) for j in joined) for i in range(12)]
    torch.testing.assert_close(LOST(dino, patches=6).objectness(keys), torch.tensor(wanted, dtype=torch.float64))
    assert len(set(resembling)) > 2 and 1 < len(joined) < 6


def test_tokencut_is_the_second_generalised_eigenvector_with_the_object_on_top(dino):
    keys = made_keys()
    edges = torch.ones(12, 12, dtype=torch.float64)
    for i in range(12):
        for j in range(12):
            edges[i, j] = 1.0 if float(cosine_similarity(keys[i], keys[j], dim=0)) > 0.2 else 1e-5
    degree = torch.diag(edges.sum(1))
    values, vectors = eigh((degree - edges).numpy(), degree.numpy())
    assert values[2] - values[1] > 1e-3  # else any vector of a plane would do
    cut = torch.from_numpy(vectors[:, 1])
    cut = cut if cut[cut.abs().argmax()] > cut.mean() else -cut
    torch.testing.assert_close(TokenCut(dino).objectness(keys), cut, atol=1e-9, rtol=1e-9)
    assert not TokenCut(dino, threshold=-1.0).objectness(keys).any()  # every pair alike: nothing to cut


@pytest.mark.parametrize("kind", [LOST, TokenCut])
def test_objects_are_found_in_the_keys_of_the_last_block_for_every_word_alike(dino, kind):
    shown = batch(1)
    normed = []
    hook = dino.model.blocks[-1].norm1.register_forward_hook(lambda m, a, output: normed.append(output))
    dino.model(dino.images(shown.tasks))
    hook.remove()
    keys = dino.model.blocks[-1].attn.qkv(normed[0])[0, 1:].chunk(3, -1)[1].detach()
    method = kind(dino)
    found = method.saliency(shown)[0]
    torch.testing.assert_close(found[0].flatten(), method.objectness(keys), atol=1e-9, rtol=1e-9)
    assert torch.equal(found[0], found[2])


# ---------------------------------------------------------------- batches


def methods(clip, vit, dino):
    return [
        SCLIP(clip), ClearCLIP(clip), PEARL(clip), GradECLIP(clip), LPOSS(clip, dino, neighbours=5), AttnLRP(vit),
        BeyondIntuition(vit, "heads", 1, 3), BeyondIntuition(vit, "tokens", 1, 3, "given"), IntegratedGradients(vit, 3),
        SmoothGrad(vit, 3), LOST(dino, 4), TokenCut(dino),
    ]  # fmt: skip


def test_a_batch_is_its_images_one_by_one(clip, vit, dino):
    shown, differing = batch(3), []
    for method in methods(clip, vit, dino):
        alone = one_by_one(method, shown)
        if float((method.saliency(shown) - alone).abs().max() / alone.abs().max()) > 1e-8:
            differing.append(type(method).__name__)
    assert differing == []
