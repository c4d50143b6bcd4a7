"""Views: the span grammar, sweeps, keys, and errors that name the setting and the nearest choice."""

from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptseg.errors import ConfigError, ViewError
from conceptseg.saliency.views import Axes, Fold, Normalize, Softmax, View, expand_views, format_span, parse_span

FLUX = Axes(("output", "cross", "value"), tuple(range(19)), has_timesteps=True)
MAP = Axes(("map",))
layer_sets = st.sets(st.integers(0, 40), min_size=1)


@given(layer_sets)
def test_a_formatted_span_is_read_back(layers):
    layers = tuple(sorted(layers))
    assert parse_span(format_span(layers), range(41)) == layers


@given(layer_sets, layer_sets)
def test_a_formatted_span_is_the_shortest(one, other):
    """No run of neighbours is written as two parts, so no two parts touch."""
    parts = [tuple(map(int, part.split("-"))) for part in format_span(sorted(one | other)).split(",")]
    assert all(later[0] > earlier[-1] + 1 for earlier, later in pairwise(parts))


@given(st.lists(st.integers(0, 18), min_size=1))
def test_a_list_of_layers_is_sorted_and_each_is_named_once(layers):
    assert parse_span(layers, range(19)) == tuple(sorted(set(layers)))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("14-17", (14, 15, 16, 17)), ("0,2,5-7", (0, 2, 5, 6, 7)), (" 3 , 1 ", (1, 3)), ("4", (4,)), (4, (4,)),
        ("1-3,2-4", (1, 2, 3, 4)),
        ("all", tuple(range(19))), ("last 4", (15, 16, 17, 18)), ("last19", tuple(range(19))), ("last half", tuple(range(9, 19))),
    ],
)  # fmt: skip
def test_a_span_means(text, layers):
    assert parse_span(text, range(19)) == layers


def test_the_last_half_of_flux_is_ten_layers():
    assert len(parse_span("last half", range(19))) == 10


@given(st.text(alphabet="0123456789,- lasthf", max_size=5))
def test_an_unreadable_span_is_a_view_error_and_no_other(text):
    with suppress(ViewError):
        assert set(parse_span(text, range(19))) <= set(range(19))


def test_digits_that_are_no_numbers_are_a_view_error():
    with pytest.raises(ViewError, match="can't read"):
        parse_span("²", range(19))


@pytest.mark.parametrize("text", ["", "a", "1-2-3", "-1", "1;2", "last", "last 0", "last 20", "last few"])
def test_an_unreadable_span_is_quoted(text):
    with pytest.raises(ViewError, match=r"views\.layers") as raised:
        parse_span(text, range(19))
    assert f'"{text}"' in str(raised.value)


def test_a_layer_that_is_absent_is_named_beside_those_there_are():
    with pytest.raises(ViewError, match=r'"17-20" asks for 19, 20, but this backbone has layers 0-18\.'):
        parse_span("17-20", range(19))


# ---------------------------------------------------------------- keys


def test_the_key_of_the_released_rows_view():
    view = View("output", (14, 15, 16, 17), (0.5,), 5, Normalize.LINEAR, Softmax.PER_CELL, blur=1.0)
    assert view.key == "output/L14-17/t0.5/n5/linear/softmax/mean/blur1"


def test_the_key_of_a_method_without_axes_is_its_space():
    assert View("map").key == "map"


options = st.fixed_dictionaries(
    {
        "layers": layer_sets.map(sorted).map(tuple),
        "timesteps": st.sets(st.sampled_from([0.25, 0.5, 0.512844, 0.75]), min_size=1).map(sorted).map(tuple),
        "draws": st.integers(1, 9), "normalize": st.sampled_from(Normalize), "softmax": st.sampled_from(Softmax),
        "fold": st.sampled_from(Fold), "blur": st.sampled_from([0.0, 1.0, 1.5]), "space": st.sampled_from(["output", "value"]),
    }
)  # fmt: skip


@given(options, options)
def test_views_with_equal_keys_are_equal(one, other):
    assert (View(**one).key == View(**other).key) == (one == other)


def test_softmax_after_the_fold_reads_raw_cells():
    raw, after = View("output", (1,), (0.5,)), View("output", (2,), (0.3,), softmax=Softmax.OF_MEAN, blur=1.0)
    assert after.cell == raw.cell
    assert View("output", softmax=Softmax.PER_CELL).cell != raw.cell != View("output", softmax=Softmax.TOKENS).cell


# ---------------------------------------------------------------- expansion


def expand(axes=FLUX, **setting):
    return expand_views({"a": {"timesteps": [0.5], **setting} if axes is FLUX else setting}, axes)


def test_a_view_without_layers_reads_all_of_them():
    assert expand()["a"].layers == FLUX.layers


def test_a_view_without_a_space_reads_the_first_on_offer():
    assert expand()["a"].space == "output"


def test_every_option_reaches_the_view():
    view = expand(
        space="cross", layers="2-3", draws=4, normalize="linear", softmax="of_mean", temperature=10, fold="sum", blur=2
    )["a"]  # fmt: skip
    assert view == View("cross", (2, 3), (0.5,), 4, Normalize.LINEAR, Softmax.OF_MEAN, 10.0, Fold.SUM, 2.0)


def test_each_layer_makes_a_view_of_every_layer():
    views = expand(layers="3,5", each="layer")
    assert {name: view.layers for name, view in views.items()} == {"a L3": (3,), "a L5": (5,)}


def test_each_timestep_makes_a_view_of_every_level():
    views = expand(timesteps=[0.25, 0.5], each="timestep", layers="0-1")
    assert {name: (view.layers, view.timesteps) for name, view in views.items()} == {
        "a t0.25": ((0, 1), (0.25,)), "a t0.5": ((0, 1), (0.5,)),
    }  # fmt: skip


def test_each_layer_and_timestep_makes_their_product():
    views = expand(timesteps=[0.25, 0.5], each="layer_timestep", layers="0-1")
    assert list(views) == ["a L0 t0.25", "a L0 t0.5", "a L1 t0.25", "a L1 t0.5"]


def test_several_spaces_are_named_in_the_tail():
    views = expand(space=["output", "value"], each="layer", layers="1")
    assert [(name, view.space) for name, view in views.items()] == [("a output L1", "output"), ("a value L1", "value")]


def test_a_method_without_axes_takes_no_layers_or_timesteps():
    view = expand_views({"map": {"space": "map", "layers": "3", "timesteps": [0.5], "draws": 2}}, MAP)["map"]
    assert (view.layers, view.timesteps, view.draws) == ((), (), 1)


def test_settings_are_not_changed_by_reading_them():
    settings = {"a": {"space": "output", "timesteps": [0.5]}}
    expand_views(settings, FLUX)
    assert settings == {"a": {"space": "output", "timesteps": [0.5]}}


@pytest.mark.parametrize(
    ("setting", "kind", "key", "said"),
    [
        ({"space": "outptu"}, ViewError, "views.a.space", 'Did you mean "output"?'),
        ({"space": ["output", "crosss"]}, ViewError, "views.a.space", 'Did you mean "cross"?'),
        ({"normalize": "liner"}, ConfigError, "views.a.normalize", 'Did you mean "linear"?'),
        ({"softmax": "percell"}, ConfigError, "views.a.softmax", 'Did you mean "per_cell"?'),
        ({"fold": "summ"}, ConfigError, "views.a.fold", 'Did you mean "sum"?'),
        ({"lyers": "all"}, ConfigError, "views.a.lyers", 'Did you mean "layers"?'),
        ({"eech": "layer"}, ConfigError, "views.a.eech", 'Did you mean "each"?'),
        ({"each": "lair"}, ConfigError, "views.a.each", "Choices: layer, layer_timestep, timestep"),
        ({"timesteps": []}, ViewError, "views.a.timesteps", "give noise levels"),
        ({"timesteps": [0.5, 0]}, ViewError, "views.a.timesteps", "0 is out of range"),
        ({"timesteps": [500]}, ViewError, "views.a.timesteps", "500 is out of range"),
        ({"layers": []}, ViewError, "views.a.layers", "at least one layer"),
        ({"layers": "5-3"}, ViewError, "views.a.layers", "at least one layer"),
        ({"draws": 0}, ViewError, "views.a.draws", "at least one noise draw"),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_write(setting, kind, key, said):
    with pytest.raises(kind) as raised:
        expand(**setting)
    assert key in str(raised.value) and said in str(raised.value)


@pytest.mark.parametrize("setting", ["constant", 3, None, ["space"]])
def test_a_view_that_is_no_mapping_is_an_error(setting):
    with pytest.raises(ConfigError, match=r"views\.a is .*; wanted the settings of a view"):
        expand_views({"a": setting}, FLUX)


def test_no_views_at_all_is_an_error():
    with pytest.raises(ViewError, match="views is empty"):
        expand_views({}, FLUX)
