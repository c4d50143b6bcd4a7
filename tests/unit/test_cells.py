"""Cells and how views fold them, against loops over single numbers."""

import math
from itertools import product

import pytest
import torch

from conceptseg.saliency.cells import CellStore, cell_scores, kinds_by_layer
from conceptseg.saliency.normalize import (
    gaussian_blur,
    linear_over_concepts,
    shapley_over_concepts,
    softmax_over_concepts,
    unit_length,
)
from conceptseg.saliency.views import CellKind, Fold, Normalize, Softmax, View

ROWS, HEADS, CONCEPTS, TOKENS, WIDTH = 2, 3, 4, 6, 5


def vectors(heads=True):
    g = torch.Generator().manual_seed(0)
    shape = (ROWS, HEADS) if heads else (ROWS,)
    return torch.randn(*shape, CONCEPTS, WIDTH, generator=g), torch.randn(*shape, TOKENS, WIDTH, generator=g)


def kind(softmax=Softmax.NONE, heads=Fold.MEAN):
    return CellKind("any", Normalize.NONE, softmax, heads)


def literal(concepts, tokens, softmax):
    """Scores of one head of one row, as nested lists."""
    scores = [[sum(a * b for a, b in zip(c, x, strict=True)) for x in tokens] for c in concepts]
    if softmax is Softmax.PER_CELL:
        totals = [sum(math.exp(row[n]) for row in scores) for n in range(len(tokens))]
        return [[math.exp(value) / totals[n] for n, value in enumerate(row)] for row in scores]
    if softmax is Softmax.TOKENS:
        return [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in scores]
    return scores


CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32 dot products against Python's float64


@pytest.mark.parametrize("softmax", [Softmax.NONE, Softmax.PER_CELL, Softmax.TOKENS])
@pytest.mark.parametrize("fold", Fold)
def test_heads_are_folded_after_the_softmax_of_each(softmax, fold):
    concepts, tokens = vectors()
    got = cell_scores(concepts, tokens, kind(softmax, fold))
    for row in range(ROWS):
        heads = [torch.tensor(literal(concepts[row, a].tolist(), tokens[row, a].tolist(), softmax)) for a in range(HEADS)]
        wanted = sum(heads) / (1 if fold is Fold.SUM else HEADS)
        torch.testing.assert_close(got[row], wanted, **CLOSE)


def test_vectors_without_heads_are_one_dot_product():
    concepts, tokens = vectors(heads=False)
    wanted = torch.tensor([literal(concepts[r].tolist(), tokens[r].tolist(), Softmax.NONE) for r in range(ROWS)])
    torch.testing.assert_close(cell_scores(concepts, tokens, kind()), wanted, **CLOSE)


def test_scores_of_half_precision_vectors_are_added_up_in_float32():
    concepts, tokens = torch.full((1, 1, 4096), 1.0), torch.full((1, 2, 4096), 1.0)
    scores = cell_scores(concepts.bfloat16(), tokens.bfloat16(), kind())
    assert scores.dtype == torch.float32 and (scores == 4096).all()


def filled(view, values):
    """A store with values[layer, timestep, draw] for the view's kind, each [B C L]."""
    cells = CellStore()
    for i, layer in enumerate(view.layers):
        for j, level in enumerate(view.timesteps):
            for draw in range(view.draws):
                cells.put(view.cell, layer, level, draw, values[i, j, draw])
    return cells


VALUES = torch.randn(2, 3, 2, ROWS, CONCEPTS, TOKENS, generator=torch.Generator().manual_seed(1))


def read(**options):
    view = View("output", (3, 7), (0.25, 0.5, 0.75), 2, **options)
    return filled(view, VALUES).read(view, (2, 3))


def test_a_mean_is_over_layers_timesteps_and_draws():
    torch.testing.assert_close(read().flatten(2), VALUES.mean((0, 1, 2)), atol=1e-6, rtol=1e-6)


def test_a_sum_is_over_layers_timesteps_and_draws():
    torch.testing.assert_close(read(fold=Fold.SUM).flatten(2), VALUES.sum((0, 1, 2)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_softmax_of_the_mean_comes_after_the_fold(temperature):
    mean = VALUES.mean((0, 1, 2)) * temperature
    wanted = mean.exp() / mean.exp().sum(-2, keepdim=True)
    got = read(softmax=Softmax.OF_MEAN, temperature=temperature).flatten(2)
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_tokens_fill_the_grid_row_by_row():
    view = View("output", (0,), (0.5,))
    cells = filled(view, torch.arange(6.0).expand(1, 1, 1, 1, 1, 6))
    assert cells.read(view, (2, 3))[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_blur_comes_last():
    torch.testing.assert_close(read(softmax=Softmax.OF_MEAN, blur=1.0), gaussian_blur(read(softmax=Softmax.OF_MEAN), 1.0))


def test_a_subset_of_the_cells_can_be_read_on_its_own():
    whole, part = View("output", (3, 7), (0.25, 0.5, 0.75), 2), View("output", (7,), (0.5,), 1)
    cells = filled(whole, VALUES)
    assert len(cells) == 12
    assert torch.equal(cells.read(part, (2, 3)).flatten(2), VALUES[1, 1, 0])


def test_a_cell_put_twice_is_kept_once():
    cells = CellStore()
    for value in (0.0, 1.0):
        cells.put(kind(), 0, 0.5, 0, torch.full((1, 1, 4), value))
    assert len(cells) == 1


def test_views_that_differ_in_span_share_a_kind():
    views = [View("output", (0, 1), (0.5,)), View("output", (1, 2), (0.25,), draws=3, blur=1.0), View("value", (2,), (0.5,))]
    output, value = views[0].cell, views[2].cell
    assert kinds_by_layer(views) == {0: {output}, 1: {output}, 2: {output, value}}


# ---------------------------------------------------------------- normalisations


def test_linear_normalisation_gives_columns_that_sum_to_one_or_zero():
    vectors = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    vectors[..., 2] = 1.5
    sums = linear_over_concepts(vectors).sum(-2)
    torch.testing.assert_close(sums, torch.ones(3, 5).index_fill(1, torch.tensor(2), 0.0))


def test_linear_normalisation_follows_the_worked_columns_of_the_spec():
    columns = torch.tensor([[1.0, -2.0, 0.0], [3.0, -2.0, 0.0], [2.0, 1.0, 0.0]])
    wanted = torch.tensor([[0, 0, 0], [2 / 3, 0, 0], [1 / 3, 1, 0]])
    torch.testing.assert_close(linear_over_concepts(columns), wanted)


def test_one_concept_is_normalised_to_nothing():
    assert not linear_over_concepts(torch.randn(2, 1, 5)).any()


def test_linear_normalisation_permutes_with_the_concepts():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(linear_over_concepts(x[[2, 0, 3, 1]]), linear_over_concepts(x)[[2, 0, 3, 1]])


def test_unit_vectors_have_length_one():
    torch.testing.assert_close(unit_length(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_a_temperature_multiplies_the_scores():
    scores = torch.tensor([[[0.1], [0.3]]])
    torch.testing.assert_close(softmax_over_concepts(scores, 10.0), softmax_over_concepts(10 * scores))


def test_the_blur_is_a_loop_over_a_reflected_neighbourhood():
    maps = torch.rand(1, 1, 4, 3, generator=torch.Generator().manual_seed(4))
    weights = [math.exp(-0.5 * d * d) for d in (-1, 0, 1)]
    taps = [w / sum(weights) for w in weights]

    def reflected(i, size):
        return -i if i < 0 else 2 * size - 2 - i if i >= size else i

    wanted = torch.zeros(4, 3)
    for y in range(4):
        for x in range(3):
            wanted[y, x] = sum(
                taps[dy + 1] * taps[dx + 1] * maps[0, 0, reflected(y + dy, 4), reflected(x + dx, 3)]
                for dy in (-1, 0, 1) for dx in (-1, 0, 1)
            )  # fmt: skip
    torch.testing.assert_close(gaussian_blur(maps, 1.0)[0, 0], wanted, atol=1e-6, rtol=1e-6)


def enumerated(raw, always):
    """The Shapley mean over all 2^(N - 1) coalitions of each name, in float64; raw [C L]."""
    shares = raw.double().softmax(0)
    fixed = torch.tensor(always)
    ground = shares[fixed].sum(0)
    found, named = shares.clone(), shares[~fixed]
    rest = len(named) - 1
    coalitions = torch.tensor(list(product([0.0, 1.0], repeat=rest)), dtype=torch.float64)
    sizes = coalitions.sum(1).long().tolist()
    weights = torch.tensor([1 / (len(named) * math.comb(rest, size)) for size in sizes], dtype=torch.float64)
    for place, channel in enumerate((~fixed).nonzero().flatten().tolist()):
        others = torch.cat([named[:place], named[place + 1 :]])
        found[channel] = weights @ (named[place] / (named[place] + ground + coalitions @ others))
    return found


@pytest.mark.parametrize("spread", [0.5, 2, 6])
@pytest.mark.parametrize("grounds", [0, 1, 5])
def test_shapley_shares_are_those_of_all_coalitions(spread, grounds):
    g = torch.Generator().manual_seed(3)
    for names in (1, 2, 5, 12):
        raw = spread * torch.randn(2, names + grounds, 3, generator=g)
        # Background words lie anywhere, and elsewhere in every row.
        always = torch.stack([torch.randperm(names + grounds, generator=g) < grounds for _ in range(2)])
        got = shapley_over_concepts(raw / 2, always, temperature=2.0)
        wanted = torch.stack([enumerated(*one) for one in zip(raw, always.tolist(), strict=True)])
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=0)


def test_shapley_shares_stay_finite_where_scores_are_far_apart():
    got = shapley_over_concepts(torch.tensor([[[500.0], [-500.0], [0.0]]]), torch.tensor([[False, False, True]]))
    torch.testing.assert_close(got.flatten(), torch.tensor([1.0, 0.0, 0.0]))
    alone = shapley_over_concepts(torch.tensor([[[-300.0], [300.0]]]))  # half of a name's coalitions hold it alone
    torch.testing.assert_close(alone.flatten(), torch.tensor([0.5, 1.0]), atol=1e-6, rtol=0)


def test_a_view_takes_the_shapley_mean_after_its_fold():
    mean = VALUES.mean((0, 1, 2))
    background = torch.tensor([[True, False, False, False]] * ROWS)
    view = View("output", (3, 7), (0.25, 0.5, 0.75), 2, softmax=Softmax.SHAPLEY)
    got = filled(view, VALUES).read(view, (2, 3), background).flatten(2)
    torch.testing.assert_close(got, shapley_over_concepts(mean, background), **CLOSE)
    assert view.key.endswith("/shapley/mean")
