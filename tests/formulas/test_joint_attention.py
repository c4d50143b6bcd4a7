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
from conceptseg.extractors.anchordiff import AnchorDiff
from conceptseg.extractors.attention_chains import AttentionChains
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.extractors.goca import GoCA
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


# ---------------------------------------------------------------- AnchorDiff


def cosine(a, b):
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def answers(found, word):
    """Attention of a concept to image tokens, of all concepts and image tokens, mean over heads."""
    total = [0.0] * IMAGE
    for qc, kc, kx in zip(found["qc"], found["kc"], found["kx"], strict=True):
        shares = softmaxed([float(qc[word] @ key) / len(key) ** 0.5 for key in [*kc, *kx]])
        total = [a + share / len(found["qc"]) for a, share in zip(total, shares[-IMAGE:], strict=True)]
    return torch.tensor(total, dtype=torch.float64)


def similarity(found):
    outputs = torch.cat([*found["ox"]], -1)
    return torch.tensor([[cosine(a, b) for b in outputs] for a in outputs], dtype=torch.float64)


def anchored(found, word, gate, steps):
    attention, alike = over_layers(joint, found)[PROMPT:, PROMPT:], over_layers(similarity, found)
    peak = int(over_layers(lambda one: answers(one, word), found).argmax())
    edges = torch.zeros(IMAGE, IMAGE, dtype=torch.float64)
    for i in range(IMAGE):
        for j in range(IMAGE):
            if attention[i, j] >= gate * float(attention[i].sum()) / IMAGE:
                edges[i, j] = max(0.0, float(alike[i, j]))
        edges[i] /= edges[i].sum()
    seed = [1.0 if i == peak else 0.0 for i in range(IMAGE)]
    for _ in range(steps):
        seed = [sum(seed[i] * float(edges[i, j]) for i in range(IMAGE)) for j in range(IMAGE)]
    return torch.tensor(seed, dtype=torch.float64) / max(seed)


def test_anchordiff_spreads_the_seed_of_one_image_token_over_the_gated_graph(model, blocks):
    method = AnchorDiff(wrapped(model), gate=0.9, steps=3)
    maps = read(method, View("propagated", LAYERS, (LEVEL,)), "concepts")
    wanted = torch.stack([torch.stack([anchored(found, word, 0.9, 3) for word in range(4)]) for found in blocks])
    torch.testing.assert_close(maps, wanted.unflatten(-1, GRID), **CLOSE)
    assert not torch.allclose(wanted[0, 0], anchored(blocks[0], 0, 0.0, 3), atol=1e-3)  # the gate leaves edges out
    attention = read(method, View("attention", LAYERS, (LEVEL,)), "concepts")
    torch.testing.assert_close(attention[1, 2].flatten(), over_layers(lambda one: answers(one, 2), blocks[1]), **CLOSE)


# ---------------------------------------------------------------- GoCA


def weighted_layer(model, found, temperature=0.1):
    """Words' maps of one layer, [C L], times the layer's weight; the weight; and the attention between image tokens."""
    heads, width = len(found["qp"]), found["qp"].shape[-1]
    project = dict(model.named_parameters())[f"{found['at']}.attn.to_out.0.weight"].detach()
    between, maps = joint(found)[PROMPT:, PROMPT:], torch.zeros(len(WORDS), IMAGE, dtype=torch.float64)
    for i in range(IMAGE):
        shares, parts = [], []
        for a in range(heads):
            keys = [*found["kp"][a], *found["kx"][a]]
            share = softmaxed([float(found["turned_q"][a][i] @ key) / width**0.5 for key in keys])[:PROMPT]
            seen = sum(s * v for s, v in zip(share, found["vp"][a], strict=True))
            parts.append(project[:, a * width : (a + 1) * width] @ seen)
            shares.append(torch.tensor(share, dtype=torch.float64))
        along = [max(0.0, float(part @ sum(parts))) for part in parts]
        for a in range(heads):
            maps[:, i] += along[a] / sum(along) * (WORDS @ shares[a])
    alike = similarity(found) / temperature
    weight = (
        sum(cosine(between[i], torch.tensor(softmaxed(alike[i].tolist()), dtype=torch.float64)) for i in range(IMAGE)) / IMAGE
    )
    return weight * maps, weight, between


def test_goca_weighs_heads_by_pixel_and_layers_and_rescales_words(model, blocks):
    for space in ("aggregated", "rescaled"):
        wanted = []
        for found in blocks:
            layers = [weighted_layer(model, found[layer]) for layer in LAYERS]
            maps = sum(one for one, _, _ in layers) / sum(weight for _, weight, _ in layers)
            between = sum(one for _, _, one in layers)
            if space == "rescaled":
                maps = maps / maps.sum(0)
                maps = torch.stack([(one - min(one.tolist())) / (max(one.tolist()) - min(one.tolist())) for one in maps])
                for _ in range(2):
                    maps = torch.stack([sum(between[:, j] * one[j] for j in range(IMAGE)) / between.sum(1) for one in maps])
            wanted.append(maps)
        found = read(GoCA(wrapped(model), refinements=2), View(space, LAYERS, (LEVEL,)), "captions")
        torch.testing.assert_close(found, torch.stack(wanted).unflatten(-1, GRID), atol=1e-4, rtol=1e-4)


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
    matrices = 4 * 2 * (4096 + 256) ** 2  # float32, of two images
    assert matrices < chains.memory - plain.memory < 1.5 * matrices
    with pytest.raises(ConfigError, match="rotates the prompt's keys"):
        from conceptseg.backbones.transformers.qwen_image import QwenImageBackbone

        AttentionChains(QwenImageBackbone("lab:none"))
