"""The concept stream against the three-stream block of the spec, written out pair by pair in float64.

The oracle below knows nothing of diffusers' modules: it takes weights by name and follows the equations of the reference
(spec §1.2-1.10; Helbling et al. 2025, arXiv:2502.04320, section 4). Text, image and concepts are kept apart throughout,
softmax is a quotient of sums, rotation turns one pair of features at a time.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FluxTransformer2DModel

from conceptseg.backbones.concept_stream import SPACES, ConceptStream, ConceptTokens
from conceptseg.backbones.flux import FluxBackbone
from conceptseg.backbones.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Axes, Fold, Normalize, Softmax, View, expand_views

HEADS, WIDTH, LAYERS, GRID, ROPE = 2, 8, 3, (3, 2), (2, 4, 2)
LEVEL = 0.5
BOTH, CROSS_ONLY, SELF_ONLY, NEITHER = (True, True), (True, False), (False, True), (False, False)

# The host is float64, but diffusers computes angles, rotations, the variance of QK-norms and (here) dot products in float32:
# relative errors of 1e-7 that three blocks with modulations of order 1 raise to some 1e-6 of scores of magnitude 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def random_flux(guidance=False, seed=0):
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=LAYERS, num_single_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=guidance, axes_dims_rope=ROPE,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        spread = 1.3 / math.sqrt(weight.shape[-1]) if weight.ndim == 2 else 0.3
        torch.nn.init.normal_(weight, 1.0 if "norm_" in name and weight.ndim == 1 and "linear" not in name else 0.0, spread)
    return model.double().eval()


def wrapped(model):
    backbone = FluxBackbone("lab:none", dtype="float64")
    backbone.transformer, backbone.config = model, dict(model.config)
    return backbone


def inputs(rows=2, concepts=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, 4, 2 * GRID[0], 2 * GRID[1], generator=g, dtype=torch.float64),
        "captions": torch.randn(rows, 5, 12, generator=g, dtype=torch.float64),
        "concepts": torch.randn(rows, concepts, 12, generator=g, dtype=torch.float64),
    }


# ---------------------------------------------------------------- the oracle


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def sinus(value):
    """[cos, sin] of 1000·t at 128 frequencies, in float32 as the spec says: at phase 500 float64 differs by 1e-5."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    phases = torch.tensor(1000 * value, dtype=torch.float32) * frequencies
    return torch.cat([torch.cos(phases), torch.sin(phases)]).double()


def rotate(vector, position):
    """Each pair of features (2i, 2i+1) turned by its angle; position is (0, row, column), one axis after the other."""
    turned, at = vector.clone(), 0
    for axis, size in enumerate(ROPE):
        for i in range(size // 2):
            angle = position[axis] / 10000 ** (2 * i / size)
            a, b = vector[at].item(), vector[at + 1].item()
            turned[at] = a * math.cos(angle) - b * math.sin(angle)
            turned[at + 1] = a * math.sin(angle) + b * math.cos(angle)
            at += 2
    return turned


def attend(queries, keys, values):
    """One head: every query's mean of the values, weighted by exp(q·k / sqrt(d))."""
    outputs = []
    for q in queries:
        logits = [(q @ k).item() / math.sqrt(WIDTH) for k in keys]
        weights = [math.exp(x - max(logits)) for x in logits]
        outputs.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return torch.stack(outputs)


class Oracle:
    """One image: text p, image x and concepts c through the double blocks, everything that can be scored kept by layer."""

    def __init__(self, model, switches=BOTH, guidance=0.0):
        self.weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
        self.guided, self.guidance = model.config.guidance_embeds, guidance
        self.cross, self.own = switches

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name, x):
        return self.linear(f"{name}.linear_2", silu(self.linear(f"{name}.linear_1", x)))

    def conditioning(self, level, pooled):
        vector = self.mlp("time_text_embed.timestep_embedder", sinus(level)) + self.mlp("time_text_embed.text_embedder", pooled)
        return vector + self.mlp("time_text_embed.guidance_embedder", sinus(self.guidance)) if self.guided else vector

    def heads(self, x, norm=None):
        """[tokens, A·d] -> [A, tokens, d], each vector divided by its root mean square and scaled where a norm is named."""
        split = x.reshape(len(x), HEADS, WIDTH).transpose(0, 1)
        if norm is None:
            return split
        return split / torch.sqrt((split**2).mean(-1, keepdim=True) + 1e-6) * self.weights[f"{norm}.weight"]

    def projected(self, at, stream, normed):
        q, k, v = {
            "image": ("to_q", "to_k", "to_v"), "text": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }[stream]  # fmt: skip
        norm = "norm" if stream == "image" else "norm_added"
        return (
            self.heads(self.linear(f"{at}.attn.{q}", normed), f"{at}.attn.{norm}_q"),
            self.heads(self.linear(f"{at}.attn.{k}", normed), f"{at}.attn.{norm}_k"),
            self.heads(self.linear(f"{at}.attn.{v}", normed)),
        )

    def __call__(self, noisy, caption, concepts, level, pooled=None):
        """Per layer, what the blocks hold for scoring. noisy: latents [c 2h 2w]; pooled: the caption's vector, zeros if None."""
        positions = [(0, row, column) for row in range(GRID[0]) for column in range(GRID[1])]
        tokens = torch.stack([noisy[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1) for _, r, c in positions])
        x, p, c = (
            self.linear("x_embedder", tokens), self.linear("context_embedder", caption), self.linear("context_embedder", concepts)
        )  # fmt: skip
        zeros = torch.zeros(10, dtype=torch.float64)
        vector, concept_vector = self.conditioning(level, zeros if pooled is None else pooled), self.conditioning(level, zeros)
        found = []
        for layer in range(LAYERS):
            at = f"transformer_blocks.{layer}"
            modulation = {
                "image": self.linear(f"{at}.norm1.linear", silu(vector)).chunk(6),
                "text": self.linear(f"{at}.norm1_context.linear", silu(vector)).chunk(6),
                "concepts": self.linear(f"{at}.norm1_context.linear", silu(concept_vector)).chunk(6),
            }
            normed = {
                name: (1 + modulation[stream][1]) * layer_norm(value) + modulation[stream][0]
                for name, stream, value in (("x", "image", x), ("p", "text", p), ("c", "concepts", c))
            }
            qx, kx, vx = self.projected(at, "image", normed["x"])
            qp, kp, vp = self.projected(at, "text", normed["p"])
            qc, kc, vc = self.projected(at, "text", normed["c"])
            ox, oxc, op, oc, turned_keys = [], [], [], [], []
            for a in range(HEADS):
                turned_q = torch.stack([rotate(q, at_) for q, at_ in zip(qx[a], positions, strict=True)])
                turned_k = torch.stack([rotate(k, at_) for k, at_ in zip(kx[a], positions, strict=True)])
                turned_keys.append(turned_k)
                keys, values = torch.cat([kp[a], turned_k]), torch.cat([vp[a], vx[a]])
                ox.append(attend(turned_q, keys, values))
                oxc.append(attend(turned_q, torch.cat([turned_k, kc[a]]), torch.cat([vx[a], vc[a]])))
                op.append(attend(qp[a], keys, values))
                seen = [(kc[a], vc[a])] * self.own + [(turned_k, vx[a])] * self.cross
                keys, values = (torch.cat([pair[i] for pair in seen]) for i in (0, 1)) if seen else (None, None)
                oc.append(attend(qc[a], keys, values) if seen else vc[a])
            found.append(
                {
                    "qc": qc, "kc": kc, "vc": vc, "oc": torch.stack(oc), "qx": qx, "kx": torch.stack(turned_keys), "vx": vx,
                    "ox": torch.stack(ox), "oxc": torch.stack(oxc), "at": at,
                }
            )  # fmt: skip
            x = self.updated(x, found[-1]["ox"], modulation["image"], f"{at}.attn.to_out.0", f"{at}.ff")
            p = self.updated(p, torch.stack(op), modulation["text"], f"{at}.attn.to_add_out", f"{at}.ff_context")
            c = self.updated(c, found[-1]["oc"], modulation["concepts"], f"{at}.attn.to_add_out", f"{at}.ff_context")
        return found

    def joined(self, x):
        return x.transpose(0, 1).reshape(x.shape[1], -1)

    def updated(self, residual, outputs, modulation, projection, feed_forward):
        _, _, gate1, shift2, scale2, gate2 = modulation
        residual = residual + gate1 * self.linear(projection, self.joined(outputs))
        inner = gelu_tanh(self.linear(f"{feed_forward}.net.0.proj", (1 + scale2) * layer_norm(residual) + shift2))
        return residual + gate2 * self.linear(f"{feed_forward}.net.2", inner)

    def vectors(self, space, found):
        """Concept and image vectors of a space, [A C d] and [A L d] with A = 1 where heads are joined."""
        f, whole = found, lambda x: self.joined(x)[None]
        return {
            "output": lambda: (whole(f["oc"]), whole(f["ox"])),
            "output_per_head": lambda: (f["oc"], f["ox"]),
            "output_beside_concepts": lambda: (whole(f["oc"]), whole(f["oxc"])),
            "output_projected": lambda: (
                self.linear(f"{f['at']}.attn.to_add_out", self.joined(f["oc"]))[None],
                self.linear(f"{f['at']}.attn.to_out.0", self.joined(f["ox"]))[None],
            ),
            "cross": lambda: (f["kc"], f["qx"]),
            "cross_query_query": lambda: (whole(f["qc"]), whole(f["qx"])),
            "cross_query_key": lambda: (f["qc"] / math.sqrt(WIDTH), f["kx"]),
            "cross_mixed": lambda: (f["qc"].mean(0, keepdim=True), f["qx"].sum(0, keepdim=True)),
            "value": lambda: (f["vc"], f["vx"]),
        }[space]()

    def cell(self, view, found):
        """Scores [C L] of one layer: normalise concepts, multiply, softmax, and fold heads, one number at a time."""
        concept_vectors, image_vectors = self.vectors(view.space, found)
        heads = []
        for c, x in zip(concept_vectors, image_vectors, strict=True):
            c = c.clone()
            if view.normalize is Normalize.LINEAR:
                for j in range(c.shape[1]):
                    raised = [v - min(c[:, j].tolist()) for v in c[:, j].tolist()]
                    c[:, j] = torch.tensor([v / (sum(raised) or 1) for v in raised])
            elif view.normalize is Normalize.UNIT:
                c = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist())) for row in c])
            scores = torch.tensor([[float(row @ token) for token in x] for row in c], dtype=torch.float64)
            if view.softmax is Softmax.PER_CELL:
                scores = torch.exp(scores) / torch.exp(scores).sum(0, keepdim=True)
            elif view.softmax is Softmax.TOKENS:
                scores = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
            heads.append(scores)
        return sum(heads) / (1 if view.fold is Fold.SUM else len(heads))

    def map(self, view, runs):
        """runs[draw][layer]. Cells added up, divided, and softmaxed in the order the view says."""
        cells = [self.cell(view, found[layer]) for found in runs for layer in view.layers]
        folded = sum(cells) / (1 if view.fold is Fold.SUM else len(cells))
        if view.softmax is Softmax.OF_MEAN:
            folded = torch.exp(view.temperature * folded)
            folded = folded / folded.sum(0, keepdim=True)
        return folded.reshape(-1, *GRID)


def maps_of(extractor, given, views, keys=("a", "b")):
    cells = extractor.read_cells(
        given["latents"], Prompts(given["captions"]), ConceptTokens(given["concepts"]), keys[: len(given["latents"])], views
    )
    return [cells.read(view, GRID) for view in views]


def expected(model, extractor, given, view, switches, guidance=0.0, keys=("a", "b")):
    """The oracle's map of every image, from the very noise that the extractor draws."""
    noisy, level = extractor.noised(given["latents"], LEVEL, keys[: len(given["latents"])], view.draws)
    oracle, maps = Oracle(model, switches, guidance), []
    for image in range(len(given["latents"])):
        runs = [
            oracle(noisy[image * view.draws + draw], given["captions"][image], given["concepts"][image], level)
            for draw in range(view.draws)
        ]
        maps.append(oracle.map(view, runs))
    return torch.stack(maps)


@pytest.fixture(scope="module")
def model():
    return random_flux()


@pytest.fixture(scope="module")
def found_by_oracle(model):
    """The oracle's activations of two images, one draw, by switches: computed once, read by many tests."""
    held, given = {}, inputs()

    def get(switches):
        if switches not in held:
            noisy, level = ConceptAttention(wrapped(model), *switches).noised(given["latents"], LEVEL, ["a", "b"], 1)
            oracle = Oracle(model, switches)
            held[switches] = [oracle(noisy[i], given["captions"][i], given["concepts"][i], level) for i in range(2)]
        return held[switches]

    return get


def agrees(model, found_by_oracle, view, switches=BOTH):
    (got,) = maps_of(ConceptAttention(wrapped(model), *switches), inputs(), [view])
    wanted = torch.stack([Oracle(model, switches).map(view, [found]) for found in found_by_oracle(switches)])
    torch.testing.assert_close(got.double(), wanted, **CLOSE)


def view_of(space="output", layers=(0, 1, 2), **options):
    return View(space, layers, (LEVEL,), **options)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("space", SPACES)
def test_every_space_at_every_layer_is_the_written_out_formula(model, found_by_oracle, space, layer):
    agrees(model, found_by_oracle, view_of(space, (layer,)))


@pytest.mark.parametrize("softmax", Softmax)
@pytest.mark.parametrize("normalize", Normalize)
@pytest.mark.parametrize("space", SPACES)
def test_every_normalisation_and_softmax_is_the_written_out_formula(model, found_by_oracle, space, normalize, softmax):
    agrees(model, found_by_oracle, view_of(space, normalize=normalize, softmax=softmax))


@pytest.mark.parametrize("space", SPACES)
def test_a_sum_over_layers_and_heads_is_the_written_out_formula(model, found_by_oracle, space):
    agrees(model, found_by_oracle, view_of(space, normalize=Normalize.LINEAR, fold=Fold.SUM))


@pytest.mark.parametrize("switches", [CROSS_ONLY, SELF_ONLY, NEITHER])
@pytest.mark.parametrize("space", SPACES)
def test_every_ablation_is_the_written_out_formula(model, found_by_oracle, space, switches):
    agrees(model, found_by_oracle, view_of(space, softmax=Softmax.PER_CELL), switches)


def test_noise_draws_are_runs_of_their_own(model):
    given, extractor = inputs(rows=2), ConceptAttention(wrapped(model))
    view = view_of(draws=2, softmax=Softmax.PER_CELL)
    (got,) = maps_of(extractor, given, [view])
    torch.testing.assert_close(got.double(), expected(model, extractor, given, view, BOTH), **CLOSE)


@pytest.mark.parametrize("guidance", [0.0, 3.5])
def test_a_model_with_embedded_guidance_is_the_written_out_formula(guidance):
    model, given = random_flux(guidance=True), inputs(rows=1)
    extractor = ConceptAttention(wrapped(model), guidance=guidance)
    (got,) = maps_of(extractor, given, [view_of()])
    torch.testing.assert_close(got.double(), expected(model, extractor, given, view_of(), BOTH, guidance), **CLOSE)


def test_the_captions_pooled_vector_modulates_image_and_text_and_never_the_concepts(model):
    given, extractor = inputs(rows=1), ConceptAttention(wrapped(model))
    pooled = torch.randn(1, 10, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noisy, level = extractor.noised(given["latents"], LEVEL, ["a"], 1)
    found = Oracle(model)(noisy[0], given["captions"][0], given["concepts"][0], level, pooled[0])
    cells = extractor.read_cells(
        given["latents"], Prompts(given["captions"], pooled), ConceptTokens(given["concepts"]), ["a"], [view_of()]
    )
    got = cells.read(view_of(), GRID)[0]
    torch.testing.assert_close(got.double(), Oracle(model).map(view_of(), [found]), **CLOSE)
    (zeros,) = maps_of(extractor, given, [view_of()])
    assert (got - zeros[0]).abs().max() > 0.1


def test_without_attention_a_concepts_output_is_its_value(model):
    output, value = maps_of(ConceptAttention(wrapped(model), *NEITHER), inputs(), [view_of("output_per_head"), view_of("value")])
    assert not torch.equal(output, value)  # the image vectors differ
    blocks = activations(model, inputs(), NEITHER)
    assert all(torch.equal(b.concept_outputs, b.concept_values.flatten(2)) for b in blocks)


def activations(model, given, switches=BOTH, last_layer=LAYERS - 1):
    blocks = []
    backbone = wrapped(model)
    stream = ConceptStream(
        given["concepts"], backbone.zero_pooled(2), lambda layer, found: blocks.append(found), last_layer, *switches
    )
    assert backbone.denoise(given["latents"], LEVEL, Prompts(given["captions"]), stream) is None
    return blocks


def test_cross_attention_alone_leaves_out_the_other_concepts(model):
    """What one concept's words are then changes no other concept's output."""
    given = inputs()
    other = {**given, "concepts": torch.cat([given["concepts"][:, :1], torch.randn(2, 3, 12, dtype=torch.float64)], 1)}
    for one, two in zip(activations(model, given, CROSS_ONLY), activations(model, other, CROSS_ONLY), strict=True):
        # Other rows stand in the same matrix products, so the kernels may round the first one otherwise.
        torch.testing.assert_close(one.concept_outputs[:, 0], two.concept_outputs[:, 0], atol=1e-12, rtol=1e-12)
    first, second = activations(model, given)[2], activations(model, other)[2]
    assert not torch.allclose(first.concept_outputs[:, 0], second.concept_outputs[:, 0])


def test_self_attention_alone_leaves_out_the_image(model):
    given = inputs()
    other = {**given, "latents": given["latents"] + 1}
    for one, two in zip(activations(model, given, SELF_ONLY), activations(model, other, SELF_ONLY), strict=True):
        assert torch.equal(one.concept_outputs, two.concept_outputs)
    assert not torch.allclose(activations(model, given)[2].concept_outputs, activations(model, other)[2].concept_outputs)


def test_concepts_never_see_the_text_of_their_own_block(model):
    """Text reaches concepts through the image alone, so not in the first block."""
    given = inputs()
    other = {**given, "captions": given["captions"] + 1}
    first, second = activations(model, given), activations(model, other)
    assert torch.equal(first[0].concept_outputs, second[0].concept_outputs)
    assert not torch.allclose(first[1].concept_outputs, second[1].concept_outputs)


def test_two_concept_sets_leave_the_same_velocity_bit_for_bit(model):
    given, backbone, velocities = inputs(), wrapped(model), []
    for seed, count in ((1, 4), (2, 7)):
        stream = ConceptStream(
            inputs(concepts=count, seed=seed)["concepts"], torch.zeros(2, 10), lambda layer, found: None, LAYERS - 1, stop=False
        )
        velocities.append(backbone.denoise(given["latents"], LEVEL, Prompts(given["captions"]), stream))
    plain = backbone.denoise(given["latents"], LEVEL, Prompts(given["captions"]))
    assert torch.equal(velocities[0], velocities[1]) and torch.equal(velocities[0], plain)


@pytest.mark.parametrize("normalize", Normalize)
@pytest.mark.parametrize("space", SPACES)
def test_permuted_concepts_give_permuted_maps(model, space, normalize):
    given, order = inputs(), [2, 0, 3, 1]
    view = view_of(space, normalize=normalize, softmax=Softmax.PER_CELL)
    extractor = ConceptAttention(wrapped(model))
    (maps,) = maps_of(extractor, given, [view])
    (permuted,) = maps_of(extractor, {**given, "concepts": given["concepts"][:, order]}, [view])
    # Softmax and attention add the concepts up in another order: a last-bit difference, in float32 at the score.
    torch.testing.assert_close(permuted, maps[:, order], atol=1e-6, rtol=1e-5)


def test_linear_normalisation_of_a_single_concept_leaves_nothing(model):
    (maps,) = maps_of(ConceptAttention(wrapped(model)), inputs(concepts=1), [view_of(normalize=Normalize.LINEAR)])
    assert not maps.any()


@pytest.mark.parametrize("last", range(LAYERS))
def test_cells_up_to_a_layer_are_the_same_when_later_blocks_are_absent(model, last):
    cut = random_flux()
    cut.load_state_dict(model.state_dict())
    cut.transformer_blocks = cut.transformer_blocks[: last + 1]
    cut.single_transformer_blocks = torch.nn.ModuleList()
    views = [view_of(space, (layer,)) for space in SPACES for layer in range(last + 1)]
    for whole, short in zip(
        maps_of(ConceptAttention(wrapped(model)), inputs(), [*views, view_of()]),
        maps_of(ConceptAttention(wrapped(cut)), inputs(), views), strict=False,
    ):  # fmt: skip
        assert torch.equal(whole, short)


@pytest.mark.parametrize("last", range(LAYERS))
def test_nothing_runs_after_the_last_layer_that_is_asked_for(last):
    model, ran = random_flux(), []
    last_block = model.transformer_blocks[last]
    watched = {
        **{f"double {i}": block for i, block in enumerate(model.transformer_blocks)},
        **{f"single {i}": block for i, block in enumerate(model.single_transformer_blocks)},
        "last projections": last_block.attn.to_add_out, "last feed-forward": last_block.ff,
        "last context feed-forward": last_block.ff_context, "output": model.proj_out,
    }  # fmt: skip
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    model.transformer_blocks[last].attn.to_out[0].register_forward_hook(lambda *args: ran.append("image projection"))
    maps_of(ConceptAttention(wrapped(model)), inputs(), [view_of(layers=(last,)), view_of(layers=(0,))])
    assert ran == [f"double {i}" for i in range(last + 1)]


def test_the_last_layer_is_the_greatest_of_each_timestep(model):
    depth = []

    class Watched(FluxBackbone):
        def denoise(self, noisy, level, prompts, stream=None, guidance=0.0):
            depth.append((level, stream.last_layer, len(noisy)))
            return super().denoise(noisy, level, prompts, stream, guidance)

    backbone = Watched("lab:none", dtype="float64")
    backbone.transformer, backbone.config = model, dict(model.config)
    views = [View("output", (0,), (0.5, 0.25)), View("output", (1, 2), (0.5,), draws=3)]
    maps_of(ConceptAttention(backbone), inputs(), views)
    assert depth == [(0.25, 0, 2), (0.5, 2, 6)]


def test_a_sweep_over_everything_is_one_forward_pass_per_timestep(model):
    backbone = wrapped(model)
    axes = Axes(tuple(SPACES), tuple(range(LAYERS)), has_timesteps=True)
    sweep = {"space": list(SPACES), "each": "layer_timestep", "timesteps": [0.2, 0.4, 0.6], "draws": 2}
    views = expand_views({"all": sweep}, axes)
    assert len(views) == len(SPACES) * LAYERS * 3
    maps_of(ConceptAttention(backbone), inputs(), list(views.values()))
    assert backbone.forward_passes == 3


def test_layers_differ(model, found_by_oracle):
    """The oracle would not notice a wrong layer if all layers were alike."""
    maps = [Oracle(model).map(view_of(layers=(k,)), [found_by_oracle(BOTH)[0]]) for k in range(LAYERS)]
    assert all((one - two).abs().max() > 0.1 for one, two in pairwise(maps))
