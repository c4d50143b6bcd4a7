"""Methods that read the joint attention of a diffusion transformer, against loops over pairs of tokens on the oracle's blocks."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from composing import plainly
from flux_oracle import CLOSE, GRID, LEVEL, Oracle, inputs, random_flux, wrapped

from conceptseg.backbones import attention_rows
from conceptseg.backbones.attention_rows import MeanAttention, mean_attention_bytes
from conceptseg.backbones.transformers.concept_stream import ConceptTokens
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError
from conceptseg.evaluation.plan import plan_run
from conceptseg.extractors.attention_chains import AttentionChains
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Softmax, View

PROMPT, IMAGE = 5, GRID[0] * GRID[1]
WORDS = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
"""Shares of the prompt's five tokens in two words."""
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def model():
    return random_flux()


@pytest.fixture(scope="module")
def blocks(model):
    """The oracle's layers of two images, from the very noise that the methods draw."""
    given = inputs()
    noisy, level = ConceptAttention(wrapped(model)).noised(given["latents"], LEVEL, ["a", "b"], 1)
    return [Oracle(model)(noisy[i], given["captions"][i], given["concepts"][i], level) for i in range(2)]


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """Four rows of both heads: eleven tokens take three steps."""
    monkeypatch.setattr(attention_rows, "HELD_SCORES", 2 * 11 * 4)


def read(method, view, tokens):
    given = inputs()
    words = WORDS.expand(2, -1, -1) if tokens == "captions" else None
    cells = method.read_cells(
        given["latents"], Prompts(given["captions"]), ConceptTokens(given[tokens], words), ["a", "b"], [view]
    )
    return cells.read(view, GRID).double()


def softmaxed(numbers):
    most = max(numbers)
    shares = [math.exp(number - most) for number in numbers]
    return [share / sum(shares) for share in shares]


def joint(found):
    """Attention of every token of prompt and image to all of them, mean over heads, pair by pair."""
    total = torch.zeros(PROMPT + IMAGE, PROMPT + IMAGE, dtype=torch.float64)
    for qp, kp, qx, kx in zip(found["qp"], found["kp"], found["turned_q"], found["kx"], strict=True):
        queries, keys = [*qp, *qx], [*kp, *kx]
        for i, query in enumerate(queries):
            total[i] += torch.tensor(softmaxed([float(query @ key) / len(key) ** 0.5 for key in keys]))
    return total / len(found["qp"])


def over_layers(of_layer, found):
    return sum(of_layer(found[layer]) for layer in LAYERS) / len(LAYERS)


# ---------------------------------------------------------------- attention chains


def chain(attention, shares, bounces, direction, alpha=0.99):
    n = len(attention)
    steps = [[alpha * float(attention[i, j]) + (1 - alpha) / n for j in range(n)] for i in range(n)]
    if direction == "incoming":
        columns = [sum(steps[i][j] for i in range(n)) for j in range(n)]
        steps = [[steps[i][j] / columns[j] for j in range(n)] for i in range(n)]
    weights = [*shares.tolist(), *[0.0] * (n - len(shares))]
    for _ in range(bounces):
        weights = [weight / sum(weights) for weight in weights]
        if direction == "incoming":
            weights = [sum(steps[i][j] * weights[j] for j in range(n)) for i in range(n)]
        else:
            weights = [sum(steps[j][i] * weights[j] for j in range(n)) for i in range(n)]
    return torch.tensor(weights[PROMPT:], dtype=torch.float64)


@pytest.mark.parametrize("direction", ["incoming", "outgoing"])
def test_a_chain_bounces_along_the_attention_averaged_over_heads_and_layers(model, blocks, direction):
    method = AttentionChains(wrapped(model), direction=direction)
    for bounces in (1, 3):
        wanted = [[chain(over_layers(joint, found), word, bounces, direction) for word in WORDS] for found in blocks]
        maps = read(method, View(f"bounce_{bounces}", LAYERS, (LEVEL,)), "captions")
        torch.testing.assert_close(maps, torch.stack([torch.stack(one) for one in wanted]).unflatten(-1, GRID), **CLOSE)


def test_sets_of_layers_and_draws_are_read_side_by_side(model):
    """From one forward pass for all: what each view would give alone, with its own softmax."""
    method, given = AttentionChains(wrapped(model)), inputs()
    views = [
        View("bounce_2", layers, (LEVEL,), 2, softmax=kind)
        for layers in ((0,), (0, 1))
        for kind in (Softmax.NONE, Softmax.PER_CELL)
    ]
    asked = Prompts(given["captions"]), ConceptTokens(given["captions"], WORDS.expand(2, -1, -1)), ["a", "b"]
    together = method.read_cells(given["latents"], *asked, views)
    for view in views:
        alone = method.read_cells(given["latents"], *asked, [view])
        torch.testing.assert_close(together.read(view, GRID), alone.read(view, GRID))
    plain, shares = (together.read(view, GRID) for view in views[:2])
    assert not torch.allclose(plain, together.read(views[2], GRID))
    torch.testing.assert_close(shares.sum(1), torch.ones_like(shares[:, 0]))


# ---------------------------------------------------------------- memory

tracing = importlib.util.spec_from_file_location("daam_tracing", Path(__file__).parents[2] / "benchmarks/speed/daam_tracing.py")
measuring = importlib.util.module_from_spec(tracing)
tracing.loader.exec_module(measuring)


def test_the_peak_is_the_one_that_is_computed_whatever_heads_and_layers_there_are(monkeypatch):
    monkeypatch.setattr(attention_rows, "HELD_SCORES", 2**18)
    rows, heads, tokens, width = 2, 6, 700, 16
    queries, keys = torch.randn(rows, heads, tokens, width), torch.randn(rows, heads, tokens, width)

    def added(layers):
        mean = MeanAttention()
        for _ in range(layers):
            mean.add(queries, keys, 0.25)
        return mean.read()

    computed = mean_attention_bytes(rows, heads, tokens, tokens, width)
    one, four = (measuring.peak_bytes(partial(added, layers)) for layers in (1, 4))
    assert one == four and 0.9 * computed < one <= computed
    assert computed < 4 * rows * heads * tokens**2 / 2  # half of one layer's matrices, of which softmax would hold two
    torch.testing.assert_close(added(2), (0.25 * queries @ keys.mT).softmax(-1).mean(1))


def test_the_plan_counts_the_matrices_and_a_backbone_whose_keys_are_turned_later_is_refused():
    common = ["backbone@extractor.backbone=flux_schnell", "protocol=scenes_single", "dataset=scenes", "dataset.count=2"]
    plain, chains = (plan_run("one", plainly(f"extractor={name}", *common)) for name in ("concept_attention", "attention_chains"))
    matrices = 4 * 8 * (4096 + 256) ** 2
    assert matrices < chains.memory - plain.memory < 1.5 * matrices
    with pytest.raises(ConfigError, match="rotates the prompt's keys"):
        from conceptseg.backbones.transformers.qwen_image import QwenImageBackbone

        AttentionChains(QwenImageBackbone("lab:none"))
