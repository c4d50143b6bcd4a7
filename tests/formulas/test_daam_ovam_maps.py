"""DAAM and OVAM on real images against slow literal restatements: an explicit attention, loops over layers, heads and tokens."""

import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from crf_oracle import mean_field
from torch.nn.functional import interpolate

from conceptseg.backbones.base import sample_noise, stack_images
from conceptseg.backbones.unets.optimised_tokens import write_tokens
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.errors import ConfigError, DataError, ViewError
from conceptseg.extractors.daam import DAAM
from conceptseg.extractors.diffcut import DiffCut
from conceptseg.extractors.diffseg import DiffSeg
from conceptseg.extractors.iseg import ISeg
from conceptseg.extractors.ovam import OVAM
from conceptseg.lab.models import build_sd, save
from conceptseg.saliency.views import Fold, View
from conceptseg.types import Batch, Concepts, Task

CLOSE = {"atol": 2e-6, "rtol": 1e-4}  # float32 in two orders, through one U-Net
LEVEL, STEP = 0.3, 300


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    sizes = {
        "channels": [8, 16], "reads_text": [True, True], "heads": 2, "norm_groups": 4, "text_tokens": 16, "text_width": 16,
        "text_layers": 1, "image_size": 24, "codec_patch": 2, "latent_scale": 1.5,
    }  # fmt: skip
    parts = build_sd(sizes)
    for name, weight in parts["unet"].named_parameters():
        if "attn2.to_" in name and name.endswith("weight"):
            weight.data.mul_(4)  # peaked attention, so that bicubic undershoots and the cut at 0 shows
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return UNetBackbone(str(folder), image_size=24)


@pytest.fixture(scope="module")
def task():
    image = np.random.default_rng(0).random((24, 24, 3)).astype(np.float32)
    return Task("one", image, np.zeros((24, 24), np.uint8), Concepts(("apple", "grass", "sky"), (1, 0, 0), 0), "a apple", (0, 1))


class Explicit:
    """An attention processor that computes probabilities, and keeps queries and probabilities: what taps must not need."""

    def __init__(self):
        self.queries, self.probabilities, self.output = None, None, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        split = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        self.queries = split[0]
        self.probabilities = (split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1])).softmax(-1)
        self.output = attn.to_out[0]((self.probabilities @ split[2]).transpose(1, 2).flatten(2))
        return self.output


def watched(backbone, task, prompt, self_attention=False):
    """Processors of every cross-attention (or self-attention) of up and down blocks after one pass with explicit attention."""
    latents = backbone.latents(stack_images([task.image], backbone.size, backbone.resize))
    share = backbone.signal_shares[STEP]
    noisy = share.sqrt() * latents + (1 - share).sqrt() * sample_noise(latents.shape[1:], 0, [task.key], 0)
    stock, explicit = backbone.unet.attn_processors, {}
    for layer in backbone.layers:
        explicit[layer.self_attention.path if self_attention else layer.path] = Explicit()
    backbone.unet.set_attn_processor({n: explicit.get(n.removesuffix(".processor"), p) for n, p in stock.items()})
    with torch.inference_mode():
        backbone.unet(noisy, STEP, encoder_hidden_states=backbone.text([prompt]))
    backbone.unet.set_attn_processor(stock)
    outside = [layer for layer in backbone.layers if not layer.path.startswith("mid")]
    return {one.index: explicit[one.self_attention.path if self_attention else one.path] for one in outside}


def enlarged(probabilities, token, how="bicubic"):
    side = math.isqrt(len(probabilities))
    one = probabilities[:, token].reshape(1, 1, side, side)
    wide = interpolate(one, size=(12, 12), mode=how)[0, 0]
    return wide.clamp_min(0) if how == "bicubic" else wide


def read(extractor, task, *views):
    return [maps.scores[0] for maps in extractor.stream(Batch((task,)), views)]


def view(extractor, space, **more):
    return View(space, extractor.axes().layers, (LEVEL,), **more)


def test_daam_is_the_mean_over_layers_heads_and_tokens(backbone, task):
    extractor = DAAM(backbone, concept="a {concept}", join=" and ")
    prompt = "a apple and a grass and a sky"
    positions = {"apple": [2], "grass": [5], "sky": [8]}
    seen = watched(backbone, task, prompt)
    spaces = ("words", "words_by_grid", "words_normalized", "words_standardized", "head_1")
    views = [view(extractor, space) for space in spaces]
    views[1] = View("words_by_grid", extractor.axes().layers[:-1], (LEVEL,))  # so that the grids differ in layers
    got = dict(zip(spaces, read(extractor, task, *views), strict=True))
    every = {}  # (layer, head) -> maps of all tokens of the prompt
    for layer, processor in seen.items():
        for head in range(2):
            every[layer, head] = torch.stack([enlarged(processor.probabilities[0, head], token) for token in range(10)])
    whole = sum(every.values()) / len(every)
    grids = {}
    for (layer, _), maps in [one for one in every.items() if one[0][0] != max(seen)]:
        grids.setdefault(seen[layer].queries.shape[2], []).append(maps)
    by_grid = sum(sum(maps) / len(maps) for maps in grids.values()) / len(grids)
    for number, word in enumerate(task.concepts.names):
        (at,) = positions[word]
        torch.testing.assert_close(got["words"][number], whole[at], **CLOSE)
        torch.testing.assert_close(got["words_by_grid"][number], by_grid[at], **CLOSE)
        torch.testing.assert_close(got["words_normalized"][number], whole[at] / (whole[1:9].sum(0) + 1e-6), **CLOSE)
        spread = (whole[at] - whole[at].mean()) / whole[at].std(correction=0)
        torch.testing.assert_close(got["words_standardized"][number], spread, atol=1e-3, rtol=1e-3)
        one_head = sum(maps for (_, head), maps in every.items() if head == 1) / len(seen)
        torch.testing.assert_close(got["head_1"][number], one_head[at], **CLOSE)
    assert not torch.allclose(whole, by_grid, atol=1e-4)


def test_daam_with_a_prompt_for_every_word(backbone, task):
    extractor = DAAM(backbone, concept="a {concept}", encode="separate")
    (got,) = read(extractor, task, view(extractor, "words"))
    for number, word in enumerate(task.concepts.names):
        seen = watched(backbone, task, f"a {word}")
        maps = [enlarged(one.probabilities[0, head], 2) for one in seen.values() for head in range(2)]
        torch.testing.assert_close(got[number], sum(maps) / len(maps), **CLOSE)


def test_daam_with_both_halves_of_guidance_and_with_what_words_leave_over(backbone, task):
    both = DAAM(backbone, concept="a {concept}", join=" and ", cfg_rows="all")
    seen = [watched(backbone, task, prompt) for prompt in ("a apple and a grass and a sky", "")]
    maps = [enlarged(one.probabilities[0, head], 2) for half in seen for one in half.values() for head in range(2)]
    torch.testing.assert_close(read(both, task, view(both, "words"))[0][0], sum(maps) / len(maps), **CLOSE)
    rest = DAAM(backbone, concept="a {concept}", background="complement")
    assert rest.asked(task)[0].prompt == "a apple"
    apple, grass, sky = read(rest, task, view(rest, "words"))[0]
    assert apple.min() == 0 and apple.max() == 1
    torch.testing.assert_close(grass, 1 - apple)
    torch.testing.assert_close(sky, grass)


def test_timesteps_and_draws_are_folded_by_the_views_rule(backbone, task):
    extractor = DAAM(backbone)
    layers = extractor.axes().layers
    one, two, mean, total = read(
        extractor, task, View("words", layers, (0.3,), 2), View("words", layers, (0.6,), 2), View("words", layers, (0.3, 0.6), 2),
        View("words", layers, (0.3, 0.6), 2, fold=Fold.SUM),
    )  # fmt: skip
    torch.testing.assert_close(mean, (one + two) / 2, **CLOSE)
    torch.testing.assert_close(total, 2 * (one + two), **CLOSE)
    assert extractor.backbone.forward_passes >= 2


@pytest.mark.parametrize("softmax", [True, False])
def test_ovam_lets_the_tokens_of_its_own_text_compete(backbone, task, softmax):
    extractor = OVAM(backbone)
    (got,) = read(extractor, task, view(extractor, "token_softmax" if softmax else "linear"))
    seen = watched(backbone, task, "a apple")  # the caption, not the words asked for
    tokens = backbone.tokenizer("apple grass sky").input_ids
    with torch.inference_mode():
        text = backbone.text_encoder(torch.tensor([tokens])).last_hidden_state
    maps = torch.zeros(3, 12, 12)
    for layer in backbone.layers:
        if layer.index not in seen:
            continue
        attention = backbone.unet.get_submodule(layer.path)
        keys = attention.to_k(text).unflatten(-1, (2, -1)).transpose(1, 2)
        for head in range(2):
            scores = seen[layer.index].queries[0, head] @ keys[0, head].T / math.sqrt(keys.shape[-1])
            scores = scores.softmax(-1) if softmax else scores
            maps += torch.stack([enlarged(scores, token, "bilinear") for token in (1, 2, 3)])
    torch.testing.assert_close(got, maps / (2 * len(seen)), atol=1e-5, rtol=1e-3)


def test_ovam_drops_context_after_encoding_and_can_ask_word_by_word(backbone, task):
    settings = {"attribution": "a {concepts} on sand", "attribute": "separate", "context": False, "end_token": False}
    extractor = OVAM(backbone, **settings)
    reader = extractor.reader(extractor.asked(task), False)
    assert reader.states.shape[:3] == (1, 3, 2)  # three texts of the start token and one word each
    whole = backbone.unpadded_text("a apple on sand")
    torch.testing.assert_close(reader.states[0, 0], whole[[0, 2]])
    (got,) = read(extractor, task, view(extractor, "token_softmax"))
    assert got.shape == (3, 12, 12) and (got > 0).all() and (got < 1).all()
    with pytest.raises(ConfigError, match="takes all attention everywhere"):
        OVAM(backbone, **{**settings, "start_token": False})


def test_ovam_multiplies_by_the_attention_that_positions_receive_from_the_image(backbone, task):
    floor = 0.85
    plain, extractor = OVAM(backbone), OVAM(backbone, self_attention_floor=floor)
    (without,), (got,) = (read(one, task, view(one, "token_softmax")) for one in (plain, extractor))
    received, layers = torch.zeros(12, 12), extractor.axes().layers
    for layer, processor in watched(backbone, task, "a apple", self_attention=True).items():
        assert layer in layers
        side = math.isqrt(processor.probabilities.shape[2])
        one = sum(processor.probabilities[0, head, query] for head in range(2) for query in range(side * side)) / 2
        received += interpolate(one.reshape(1, 1, side, side), size=(12, 12), mode="bilinear")[0, 0] / len(layers)
    scaled = (received - received.min()) / (received.max() - received.min())
    torch.testing.assert_close(got, without * (floor + (1 - floor) * scaled), **CLOSE)
    assert not torch.allclose(got, without, atol=1e-3)


def test_ovam_cuts_a_word_out_above_a_share_of_its_maximum_by_a_dense_crf(backbone, task):
    """The maximum is the unrefined map's; the CRF's settings are those of arXiv:2403.14291, on the image shown."""
    small = UNetBackbone(backbone.checkpoint.path, image_size=8)
    floor, level = {"self_attention_floor": 0.85}, 0.9
    methods = [OVAM(small), OVAM(small, **floor), OVAM(small, **floor, crf_level=level)]
    (without,), (refined,), (got,) = (read(one, task, view(one, "token_softmax")) for one in methods)
    image = stack_images([task.image], (8, 8), small.resize)[0].numpy()
    wide = interpolate(refined[None], size=(8, 8), mode="bilinear")[0]
    for number in range(3):
        mask = (wide[number] / without[number].max() > level).numpy()
        assert 0 < mask.sum() < mask.size
        given = np.stack([np.where(mask, 0.01, 0.99), np.where(mask, 0.99, 0.01)])
        wanted = mean_field(given, image, w1=10, alpha=80, beta=13, w2=3, gamma=3, iterations=5)[1]
        torch.testing.assert_close(got[number], torch.tensor(wanted).float(), **CLOSE)
    assert methods[1].comparable and not methods[2].comparable
    with pytest.raises(ConfigError, match="share of a map's maximum"):
        OVAM(small, crf_level=1.5)


def test_ovam_reads_optimised_tokens_and_activations(backbone, task, tmp_path):
    """An optimised word's text is its two states, whatever else is asked for; they serve the model they were made for."""
    file, states = tmp_path / "tokens.safetensors", torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    write_tokens(file, {"apple": states}, backbone.checkpoint.identity())
    write_tokens(file, {"sky": states.flip(0)}, backbone.checkpoint.identity())
    extractor = OVAM(backbone, attribute="separate", tokens=str(file), activation="clamp")
    reader = extractor.reader(extractor.asked(task), False)
    torch.testing.assert_close(reader.states[0, 0, :2], states)
    assert reader.present[0].sum(1).tolist() == [2, 3, 2] and reader.shares[0, 0, 0].tolist() == [0, 1, 0]
    got, own = (read(one, task, view(one, "token_softmax"))[0] for one in (extractor, OVAM(backbone, attribute="separate")))
    torch.testing.assert_close(got[1], own[1])
    assert not torch.allclose(got[0], own[0], atol=1e-3)
    raw, cut = (read(OVAM(backbone, activation=how), task, view(extractor, "linear"))[0] for how in ("none", "relu"))
    assert raw.min() < 0 <= cut.min()
    with pytest.raises(ConfigError, match="attribute=separate"):
        OVAM(backbone, tokens=str(file))
    write_tokens(tmp_path / "other.safetensors", {"apple": states}, {"path": "another"})
    with pytest.raises(ConfigError, match="were optimised for"):
        OVAM(backbone, attribute="separate", tokens=str(tmp_path / "other.safetensors"))


def test_prompts_that_do_not_fit_and_words_that_are_not_said_are_refused(backbone, task):
    long = DAAM(backbone, concept="a red a red a red {concept}", join=" and ")
    with pytest.raises(DataError, match="Ask for fewer words"):
        read(long, task, view(long, "words"))
    silent = DAAM(backbone, prompt="{caption}")
    with pytest.raises(DataError, match='looking for "grass"'):
        read(silent, task, view(silent, "words"))
    with pytest.raises(ConfigError, match="It may name: caption, concepts"):
        DAAM(backbone, prompt="{words}")


# ---------------------------------------------------------------- refined along self-attention


def mean_over_heads(processor):
    return sum(processor.probabilities[0, head] for head in range(2)).double() / 2


def test_iseg_iterates_daams_map_along_entropy_reduced_self_attention(backbone, task):
    extractor, entropy = ISeg(backbone, entropy=0.2, iterations=3), 0.2
    got, words = read(extractor, task, view(extractor, "refined"), view(extractor, "words"))
    plain = DAAM(backbone, exclude_factor=8)
    torch.testing.assert_close(words, read(plain, task, view(plain, "words"))[0])
    seen = [mean_over_heads(one) for one in watched(backbone, task, "a apple, a grass, a sky", self_attention=True).values()]
    finest = [one for one in seen if len(one) == 144]
    assert 0 < len(finest) < len(seen)
    attention = (sum(finest) / len(finest)).tolist()
    tops = [max(attention[i][j] for i in range(144)) for j in range(144)]
    moves = []
    for row in attention:
        sharp = [a / top for a, top in zip(row, tops, strict=True)]
        sharp = [max(0.0, x + entropy * math.log10(math.e * x)) for x in sharp]
        moves.append([x / sum(sharp) for x in sharp])
    for word, map_ in zip(words, got, strict=True):
        weights = word.flatten().double().tolist()
        for step in range(4):
            if step:
                weights = [sum(move * weight for move, weight in zip(row, weights, strict=True)) for row in moves]
            weights = [weight - min(weights) for weight in weights]
            weights = [weight / sum(weights) for weight in weights]
        wanted = torch.tensor(weights).view(12, 12) / max(weights)
        torch.testing.assert_close(map_, wanted, atol=1e-4, rtol=1e-3)  # what is left of nearly even attention


def test_diffseg_merges_attention_maps_and_names_the_segments_by_daam(backbone, task):
    weighted = []
    for one in watched(backbone, task, "a apple, a grass, a sky", self_attention=True).values():
        attention = mean_over_heads(one)
        side = math.isqrt(len(attention))
        for row in range(12):
            for column in range(12):
                keys = attention[(row * side // 12) * side + column * side // 12].reshape(1, 1, side, side)
                wide = interpolate(keys, size=(12, 12), mode="bilinear").flatten()
                weighted.append((row * 12 + column, side, wide / wide.sum()))
    maps = torch.zeros(144, 144, dtype=torch.float64)
    for cell, side, wide in weighted:
        maps[cell] += side * wide / sum(s for c, s, _ in weighted if c == cell)

    def apart(a, b):
        return float((a * (a.log() - b.log())).sum() + (b * (b.log() - a.log())).sum()) / 2

    anchors = [maps[row * 12 + column] for row in (1, 4, 7, 10) for column in (1, 4, 7, 10)]
    threshold = sorted(apart(a, b) for a in anchors for b in maps)[len(anchors) * len(maps) // 12]
    merged = [torch.stack([b for b in maps if apart(a, b) < threshold]).mean(0) for a in anchors]
    gone, kept = set(), []
    for i in range(len(merged)):
        if i not in gone:
            close = [j for j in range(len(merged)) if apart(merged[i], merged[j]) < threshold]
            gone.update(close)
            kept.append(torch.stack([merged[j] for j in close]).mean(0))
    segment = torch.stack(kept).argmax(0)
    assert len(set(segment.tolist())) > 1 and len(kept) < 16
    extractor = DiffSeg(backbone, points=4, threshold=threshold, merges=2)
    got, words = read(extractor, task, view(extractor, "refined"), view(extractor, "words"))
    for word, map_ in zip(words, got, strict=True):
        wanted = torch.stack([word.flatten()[segment == one].mean() for one in segment]).view(12, 12)
        torch.testing.assert_close(map_, wanted, **CLOSE)


def cut_apart(edges, nodes, tau):
    """Parts of a graph: the paper's Rayleigh quotient of each threshold's indicator, then the same of either side."""
    within = edges[np.ix_(nodes, nodes)]
    degree = np.diag(within.sum(1))
    vector = scipy.linalg.eigh(degree - within, degree)[1][:, 1] if len(nodes) > 1 else np.zeros(1)
    vector = vector * np.sign(vector[np.abs(vector).argmax()])
    best, side = math.inf, None
    for threshold in np.linspace(0.99 * vector.min(), 0.99 * vector.max(), 100):
        x = np.where(vector > threshold, 1.0, -1.0)
        if len(set(x)) == 2:
            k = degree.diagonal()[x > 0].sum() / degree.sum()
            y = (1 + x) - k / (1 - k) * (1 - x)
            cost = (y @ (degree - within) @ y) / (y @ degree @ y)
            best, side = (cost, x > 0) if cost < best else (best, side)
    if best >= tau:
        return [nodes]
    return cut_apart(edges, nodes[side], tau) + cut_apart(edges, nodes[~side], tau)


def test_diffcut_cuts_features_recursively_and_names_the_segments_by_daam(backbone, task):
    """Of the self-attention that runs last on the way down, and of another; a pass that ends before it is refused."""
    seen = watched(backbone, task, "a apple, a grass, a sky", self_attention=True)
    paths = {one.index: one.path for one in backbone.layers}
    last = max(index for index in seen if paths[index].startswith("down"))
    first = min(index for index in seen if paths[index].startswith("down"))
    for layer, alpha, tau in ((last, 10.0, 0.75), (first, 4.0, 0.97)):
        features = seen[layer].output[0].double().numpy()
        unit = features / np.sqrt((features**2).sum(1, keepdims=True))
        cosines = unit @ unit.T
        edges = ((cosines - cosines.min()) / (cosines.max() - cosines.min())) ** alpha
        parts = cut_apart(edges, np.arange(len(unit)), tau)
        assert 2 < len(parts) < len(unit) and max(map(len, parts)) > 1
        means = [unit[part].mean(0) for part in parts]
        side = math.isqrt(len(unit))
        wide = interpolate(torch.tensor(unit.T).reshape(1, -1, side, side), size=(12, 12), mode="bilinear")[0].flatten(1)
        segment = np.array([np.argmax([position @ mean for mean in means]) for position in wide.T.numpy()])
        extractor = DiffCut(backbone, tau=tau, alpha=alpha, layer=None if layer == last else layer)
        got, words = read(extractor, task, view(extractor, "refined"), view(extractor, "words"))
        for word, map_ in zip(words, got, strict=True):
            wanted = torch.stack([word.flatten()[torch.tensor(segment == one)].mean() for one in segment]).view(12, 12)
            torch.testing.assert_close(map_, wanted, **CLOSE)
    with pytest.raises(ViewError, match="ends before it"):
        read(DiffCut(backbone), task, View("refined", (first,), (LEVEL,)))
    with pytest.raises(ConfigError, match="layers 0 to"):
        read(extractor := DiffCut(backbone, layer=99), task, view(extractor, "refined"))
