"""The concept stream against the three-stream block of the paper, written out in flux_oracle.py."""

from itertools import pairwise

import pytest
import torch
from flux_oracle import BOTH, CLOSE, CROSS_ONLY, GRID, LAYERS, LEVEL, NEITHER, SELF_ONLY, Oracle, inputs, random_flux, wrapped

from conceptseg.backbones.transformers.concept_stream import SPACES, STANDARDIZED, ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.saliency.views import Axes, Fold, Normalize, Softmax, View, expand_views


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


@pytest.fixture(scope="module")
def read_together(model):
    """A view's maps of two images from one pass that reads many views, by switches and views: one pass for many tests."""
    held = {}

    def get(view, switches, among):
        key = (switches, tuple(view.key for view in among))
        if key not in held:
            extractor = ConceptAttention(wrapped(model), *switches)
            held[key] = dict(zip(key[1], maps_of(extractor, inputs(), among), strict=True))
        return held[key][view.key]

    return get


def agrees(model, found_by_oracle, view, switches=BOTH, got=None):
    """got: the view's maps; read by themselves where they are not given."""
    if got is None:
        (got,) = maps_of(ConceptAttention(wrapped(model), *switches), inputs(), [view])
    wanted = torch.stack([Oracle(model, switches).map(view, [found]) for found in found_by_oracle(switches)])
    # A score that is divided by the spread over concepts, here down to 0.1, has its rounding divided by it too.
    close = {key: 10 * value for key, value in CLOSE.items()} if view.space in STANDARDIZED else CLOSE
    torch.testing.assert_close(got.double(), wanted, **close)


def view_of(space="output", layers=(0, 1, 2), **options):
    return View(space, layers, (LEVEL,), **options)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("space", SPACES)
def test_every_space_at_every_layer_is_the_written_out_formula(model, found_by_oracle, space, layer):
    agrees(model, found_by_oracle, view_of(space, (layer,)))


PAIRS = [
    (space, [*Normalize][(number + place) % len(Normalize)], softmax)
    for number, space in enumerate(SPACES)
    for place, softmax in enumerate(Softmax)
]
"""Every space with every normalisation, and each of both with every softmax: a space is read before either is applied."""


def test_the_pairs_are_all_pairs():
    for one, other, options in ((0, 1, Normalize), (0, 2, Softmax), (1, 2, Softmax)):
        firsts = {pair[one] for pair in PAIRS}
        assert {(pair[one], pair[other]) for pair in PAIRS} == {(first, option) for first in firsts for option in options}


@pytest.mark.parametrize(("space", "normalize", "softmax"), PAIRS)
def test_every_normalisation_and_softmax_is_the_written_out_formula(
    model, found_by_oracle, read_together, space, normalize, softmax
):
    view, among = (
        view_of(space, normalize=normalize, softmax=softmax),
        [view_of(s, normalize=n, softmax=m) for s, n, m in PAIRS],
    )
    agrees(model, found_by_oracle, view, got=read_together(view, BOTH, among))


@pytest.mark.parametrize("space", SPACES)
def test_a_sum_over_layers_and_heads_is_the_written_out_formula(model, found_by_oracle, space):
    agrees(model, found_by_oracle, view_of(space, normalize=Normalize.LINEAR, fold=Fold.SUM))


@pytest.mark.parametrize("switches", [CROSS_ONLY, SELF_ONLY, NEITHER])
@pytest.mark.parametrize("space", SPACES)
def test_every_ablation_is_the_written_out_formula(model, found_by_oracle, read_together, space, switches):
    view = view_of(space, softmax=Softmax.PER_CELL)
    among = [view_of(one, softmax=Softmax.PER_CELL) for one in SPACES]
    agrees(model, found_by_oracle, view, switches, read_together(view, switches, among))


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
    """Changing the words of one concept then leaves the outputs of the others unchanged."""
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


def test_permuted_concepts_give_permuted_maps(model):
    given, order = inputs(), [2, 0, 3, 1]
    views = [view_of(space, normalize=one, softmax=Softmax.PER_CELL) for space in SPACES for one in Normalize]
    extractor = ConceptAttention(wrapped(model))
    found = maps_of(extractor, given, views)
    permuted = maps_of(extractor, {**given, "concepts": given["concepts"][:, order]}, views)
    for view, maps, others in zip(views, found, permuted, strict=True):
        # Softmax and attention add the concepts up in another order: a last-bit difference, in float32 at the score.
        torch.testing.assert_close(
            others, maps[:, order], atol=1e-6, rtol=1e-5, msg=lambda said, view=view: f"{view.key}: {said}"
        )


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
