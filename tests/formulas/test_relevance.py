"""Relevance rules and the vision-transformer methods against slow literal versions of their formulas, in float64.

Numbers that the released code gave for small inputs, and laws that the rules must keep, are here too.
"""

import pytest
import torch
from relevance_oracle import RuleByRule
from tiny_encoders import activations, batch, one_by_one, tiny_clip, tiny_vit

from conceptseg.backbones.encoders.relevance import (
    AddRelevance,
    LinearRelevance,
    MatmulRelevance,
    equal_signs,
    patch_relevance,
    relevance_graph,
)
from conceptseg.backbones.encoders.tower import Weights, tap_attended, tap_normed
from conceptseg.backbones.taps import TapSet
from conceptseg.data.drawings import OBJECTS
from conceptseg.extractors.attention_gradcam import AttentionGradCAM, weighted_heads
from conceptseg.extractors.lrp import LRP
from conceptseg.extractors.partial_lrp import PartialLRP
from conceptseg.extractors.rollout import Rollout, mixed_in
from conceptseg.extractors.self_attention import SelfAttention
from conceptseg.extractors.textspan import TextSpan
from conceptseg.extractors.transinterp import TransInterp, class_row

PRINTED = {"atol": 1e-6, "rtol": 0}  # six decimals


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def relevance(output, arriving, *inputs):
    return torch.autograd.grad(output, inputs, arriving)


# ---------------------------------------------------------------- numbers printed in the note


def test_the_linear_rules_give_the_printed_relevance():
    x, weight, arriving = tensor(1, -2, 3)[None], tensor([1, -1, 0.5], [-2, 0.5, 1]), tensor(1, 2)[None]
    for joint, wanted in ((True, (0.222222, 0.444444, 2.333333)), (False, (0.4, 1.0, 2.6))):
        leaf = x.clone().requires_grad_()
        (found,) = relevance(LinearRelevance.apply(leaf, Weights(weight), x @ weight.T, joint), arriving, leaf)
        torch.testing.assert_close(found[0], tensor(*wanted), **PRINTED)


def test_the_rules_of_addition_give_the_printed_relevance():
    a, b, arriving = (t[None].requires_grad_() for t in (tensor(1, -2, 0.5), tensor(3, 1, -0.25), tensor(1, 2, -1)))
    for rescale, of_a, of_b in (
        (False, (0.25, 4, -2), (0.75, -2, 1)),
        (True, (0.2, 3.2, -1.6), (-0.6, 1.6, -0.8)),
    ):
        found = relevance(AddRelevance.apply(a, b, rescale), arriving, a, b)
        for got, wanted in zip(found, (of_a, of_b), strict=True):
            torch.testing.assert_close(got[0], tensor(*wanted), **PRINTED)


def test_the_rule_of_matrix_products_gives_the_printed_relevance():
    matrix, values, arriving = tensor([0.7, 0.3], [0.4, 0.6]), tensor([1, 2], [3, -1]), tensor([1, 0.5], [0, 2])
    matrix, values = matrix.requires_grad_(), values.requires_grad_()
    of_matrix, of_values = relevance(MatmulRelevance.apply(matrix, values), arriving, matrix, values)
    torch.testing.assert_close(of_matrix, tensor([0.536932, 0.213068], [4, -3]), **PRINTED)
    torch.testing.assert_close(of_values, tensor([0.218750, 4.318182], [0.281250, -3.068182]), **PRINTED)


def test_the_patch_rule_gives_the_printed_relevance():
    image = tensor(0.1, 0.5, -0.3, 0.9, 0.2, -0.6, 0.4, 0, -0.8, 0.7, 0.3, -0.2).view(1, 3, 2, 2)
    first = tensor(1, -1, 0.5, 2, -1, 0, 1, 0.5, 0.25, -0.5, 1, -2)
    second = tensor(-0.5, 1, 0, 1, 2, -1, -1, 0.5, 1, 1, -1, 0)
    patch = Weights(torch.stack([first, second]).view(2, 3, 2, 2))
    torch.testing.assert_close((image * patch.weight).sum((1, 2, 3)), tensor(1.6, 1.55), **PRINTED)
    found = patch_relevance(image, tensor(1, 2)[None, None], patch, (1, 1))
    torch.testing.assert_close(found[0], tensor([0.635083, 0.915635], [0.461659, 0.987623]), **PRINTED)


def test_a_matrix_product_halves_the_relevance_between_its_factors():
    """Conservation: each branch carries half of what arrives."""
    a, b = (torch.rand(1, 3, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    arriving = torch.rand(1, 3, 3, dtype=torch.float64)
    for found in relevance(MatmulRelevance.apply(a, b), arriving, a, b):
        torch.testing.assert_close(found.sum(), arriving.sum() / 2)


def test_products_of_equal_sign_are_found_from_the_known_sum_of_all():
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 7), (4, 7), (4,)))
    wanted = x.clamp(min=0) @ weight.clamp(min=0).T + x.clamp(max=0) @ weight.clamp(max=0).T
    torch.testing.assert_close(equal_signs(x, Weights(weight, bias), x @ weight.T + bias), wanted)


def test_relevance_is_0_where_nothing_is_of_equal_sign():
    """In float32 rounding leaves a little in the denominator: nothing may come of it."""
    x, weight = torch.rand(1, 50).add(0.1).requires_grad_(), Weights(-torch.rand(3, 50) - 0.1)
    value = (x @ weight.weight.T).detach()
    (found,) = relevance(LinearRelevance.apply(x, weight, value, True), torch.ones(1, 3), x)
    assert not found.any()


A = [
    tensor([0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]),
    tensor([0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.25, 0.5, 0.25]),
    tensor([0.4, 0.4, 0.2], [0.2, 0.7, 0.1], [0.3, 0.1, 0.6]),
]


@pytest.mark.parametrize(("start", "wanted"), [(1, (0.32, 0.1875)), (0, (0.39, 0.1965))])
def test_rollout_gives_the_printed_row(start, wanted):
    product = None
    for attention in A[start:]:
        product = mixed_in(attention[None], product)
    torch.testing.assert_close(product[0, 0, 1:], tensor(*wanted), **PRINTED)


def test_transinterp_is_not_normalised_by_rows_and_gives_the_printed_row():
    row = None
    for step in reversed(A[1:]):
        row = class_row(row, step[None])
    torch.testing.assert_close(row[0, 1:], tensor(1.28, 0.75), **PRINTED)


def test_gradcam_of_heads_that_all_point_away_is_background_everywhere():
    attention = torch.rand(1, 2, 4)
    assert not weighted_heads(-torch.ones(1, 2, 4), attention).any()


# ---------------------------------------------------------------- methods against literal versions

METHODS = {
    "lrp": (LRP, {"rules": "orig"}), "lrp_new": (LRP, {"rules": "new"}),
    "partial": (PartialLRP, {"rules": "orig"}), "partial_new": (PartialLRP, {"rules": "new"}),
    "transinterp": (TransInterp, {"start_layer": 1}), "transinterp0": (TransInterp, {"start_layer": 0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny_vit(tmp_path_factory.mktemp("vit"), dtype="float64")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"), dtype="float64")


@pytest.fixture(scope="module")
def turned_clip(tmp_path_factory):
    """The same CLIP with its image vectors turned round: of `clip` nearly all heads point away, and GradCAM cuts them to 0."""
    backbone = tiny_clip(tmp_path_factory.mktemp("turned"), dtype="float64")
    backbone.model.proj.data.neg_()
    return backbone


@pytest.mark.parametrize("told", ["predicted", "given"])
@pytest.mark.parametrize("host", ["vit", "clip"])
@pytest.mark.parametrize("name", METHODS)
def test_relevance_by_autograd_is_relevance_rule_by_rule(request, name, host, told):
    backbone = request.getfixturevalue(host)
    kind, settings = METHODS[name]
    method, shown = kind(backbone, **settings, explained_class=told), batch(2)
    images = backbone.images(shown.tasks)
    with torch.no_grad():
        output = backbone.model(images)
    explained = backbone.named(["apple", "apple"]) if told == "given" else backbone.predicted(output)
    maps = method.saliency(shown)[:, 0]
    for number in range(2):
        oracle = RuleByRule(backbone.tower, images[number : number + 1], explained.rows[number])
        if kind is TransInterp:
            wanted = oracle.transinterp(explained.index is None, settings["start_layer"])
        else:
            wanted = oracle.pixels(settings["rules"]) if kind is LRP else oracle.last_block(settings["rules"])
        torch.testing.assert_close(maps[number], wanted.view_as(maps[number]), rtol=1e-7, atol=1e-9 * float(wanted.abs().max()))


def test_new_rules_conserve_relevance_block_by_block_and_orig_rules_do_not(vit):
    images = vit.images(batch(2).tasks)
    rows = vit.model.head.weight[[3, 5]]
    for rules, conserved in (("new", True), ("orig", False)):
        graph = relevance_graph(vit.tower, activations(vit, images), rows, rules)
        totals = [r.flatten(1).sum(1) for r in graph.relevance_of(*graph.inputs)]
        same = [torch.allclose(t, torch.ones_like(t), atol=1e-6) for t in totals]
        assert all(same) if conserved else not any(same[:-1])


@pytest.mark.parametrize("name", [*METHODS, "gradcam", "attention", "rollout"])
@pytest.mark.parametrize("host", ["vit", "clip"])
def test_a_batch_of_four_is_four_batches_of_one(request, name, host):
    """Totals of the rule of addition are a sample's own ."""
    backbone = request.getfixturevalue("turned_clip" if (name, host) == ("gradcam", "clip") else host)
    shown = batch(4, names=OBJECTS, labels=range(1, len(OBJECTS) + 1))
    others = {"gradcam": (AttentionGradCAM, {}), "attention": (SelfAttention, {}), "rollout": (Rollout, {})}
    kind, settings = {**METHODS, **others}[name]
    told = {} if name in ("attention", "rollout") else {"explained_class": "given" if name == "gradcam" else "predicted"}
    method = kind(backbone, **settings, **told)
    alone = one_by_one(method, shown)
    assert int(alone.flatten(1).any(1).sum()) >= 3, "maps of most images are not empty"
    assert float((method.saliency(shown) - alone).abs().max()) <= 1e-9 * float(alone.abs().max())


def test_block_0_enters_or_not_as_asked(vit):
    shown = batch(1)
    for kind in (Rollout, TransInterp):
        one, two = kind(vit, start_layer=0).saliency(shown), kind(vit, start_layer=1).saliency(shown)
        assert float((one - two).abs().max() / two.abs().max()) > 1e-3


def test_attention_and_its_gradient_from_taps_are_those_of_a_plain_forward_pass(vit):
    """The host stays fused: its matrices are formed again, and dA = (g W_O) Vᵀ."""
    images = vit.images(batch(2).tasks)
    held, normed, attended = [], [], []
    fused = [block.attn.fused_attn for block in vit.model.blocks]
    for block in vit.model.blocks:
        block.attn.fused_attn = False
    watching = [b.attn.attn_drop.register_forward_hook(lambda m, a, out: held.append(out)) for b in vit.model.blocks]
    plain = vit.model(images.clone().requires_grad_())
    wanted = torch.autograd.grad(plain[:, 2].sum(), held)
    for handle, block, flag in zip(watching, vit.model.blocks, fused, strict=True):
        handle.remove()
        block.attn.fused_attn = flag
    with TapSet(vit.model) as taps:
        for layer in range(3):
            tap_normed(taps, vit.tower, layer, normed.append)
            tap_attended(taps, vit.tower, layer, attended.append)
        score = vit.run(images.clone().requires_grad_(), taps)[:, 2].sum()
    for layer, arriving in enumerate(torch.autograd.grad(score, attended)):
        torch.testing.assert_close(vit.tower.attention(layer, normed[layer]), held[layer])
        _, _, values = vit.tower.query_key_value(layer, normed[layer])
        torch.testing.assert_close(vit.tower.attention_gradient(layer, values, arriving), wanted[layer])


def test_explaining_the_own_prediction_ignores_what_is_asked_for(vit, clip):
    for backbone, kind in ((vit, TransInterp), (clip, LRP), (clip, TextSpan)):
        method = kind(backbone)
        assert method.told == "own prediction"
        one = method.saliency(batch(2, names=("apple", "grass"), labels=(1, 0)))
        two = method.saliency(batch(2, names=("kite", "sky"), labels=(1, 0)))
        assert torch.equal(one, two)


def test_a_given_class_changes_the_map_and_background_words_get_none(vit, clip):
    for backbone in (vit, clip):
        method = TransInterp(backbone, explained_class="given")
        assert method.told == "true name"
        one = method.saliency(batch(1, names=("apple", "grass"), labels=(1, 0)))
        two = method.saliency(batch(1, names=("kite", "grass"), labels=(1, 0)))
        assert not torch.equal(one[:, 0], two[:, 0]) and not one[:, 1].any()
