"""Every option of every group, alone and together, gives a configuration whose parts can be built."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import pytest
import yaml
from composing import CONF, GROUPS, OPTIONS, chosen, composed, hydra, plainly, sheet
from hydra import compose
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from conceptseg.backbones.repositories import repository_of
from conceptseg.cli.composing import read_sheets_once
from conceptseg.config import MOVED_VIEWS, Root
from conceptseg.errors import ConfigError, ViewError
from conceptseg.saliency.views import Axes, expand_views
from conceptseg.targets import check_targets, instantiate, targets


def side_by_side(*groups: str) -> list[tuple[str, ...]]:
    """Overrides that choose an option of every one of the groups at once, as many lists as the largest group has options."""
    most = max(len(GROUPS[group]) for group in groups)
    return [tuple(chosen(group, GROUPS[group][i % len(GROUPS[group])]) for group in groups) for i in range(most)]


# Composing takes a tenth of a second, so that options are chosen several at a time and every configuration is looked at by all
# tests that it concerns (composing.py keeps it). An experiment chooses options itself.
METHODS = side_by_side("extractor", "dataset", "protocol", "launcher", "table")
MODELS = side_by_side("views", "backbone")
EXPERIMENTS = [(chosen("experiment", option), "protocol.version=77") for option in GROUPS["experiment"]]
TOGETHER = [*METHODS, *MODELS, *EXPERIMENTS]
WITH = {override: overrides for overrides in reversed(TOGETHER) for override in overrides}
"""An option as it is chosen -> the first list that chooses it."""


def with_option(group: str, option: str) -> dict[str, Any]:
    return plainly(*WITH[chosen(group, option)])


def parts(config: Any, path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """Every (key, mapping) of a plain config that has a _target_, nested ones included."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    if isinstance(config, Mapping):
        found += [(path, config)] if "_target_" in config else []
        for key, value in config.items():
            found += parts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            found += parts(value, f"{path}[{number}]")
    return found


def assert_whole(*overrides: str) -> None:
    """Nothing left to fill in, resolvable, and every _target_ is allowed, importable and takes what it is given."""
    config = composed(*overrides)
    assert not OmegaConf.missing_keys(config)
    whole = plainly(*overrides)
    check_targets(whole, whole["runtime"]["allow_targets"])
    for path, part in parts({k: v for k, v in whole.items() if k != "table"}):
        module, _, name = part["_target_"].rpartition(".")
        signature = inspect.signature(getattr(import_module(module), name))
        given = {key: value for key, value in part.items() if key != "_target_"}
        try:
            signature.bind(**given)
        except TypeError as error:
            pytest.fail(f"{path}: {part['_target_']}: {error}")


# ------------------------------------------------------------ the tree


def test_hydra_offers_exactly_the_sheets_that_lie_in_the_tree():
    with hydra() as loader:
        offered = {
            group: sorted(
                [*loader.get_group_options(group, ObjectType.CONFIG)]
                + [f"{folder}/{o}" for folder in loader.list_groups(group) for o in loader.get_group_options(f"{group}/{folder}")]
            )
            for group in GROUPS
        }
    assert {*MOVED_VIEWS} <= {*offered["views"]}  # former names lead to options that are there
    assert {*MOVED_VIEWS.values()} <= {*GROUPS["views"]} and not {*MOVED_VIEWS} & {*GROUPS["views"]}
    offered["views"] = sorted({*offered["views"]} - {*MOVED_VIEWS})
    assert {
        group: [o for o in options if not o.rpartition("/")[2].startswith("_")] for group, options in offered.items()
    } == GROUPS


def test_families_of_views_and_the_tables_of_a_paper_are_folders_and_nothing_lies_deeper():
    assert {p.relative_to(CONF).parts[0] for p in CONF.glob("*/*/*.yaml")} == {"table", "views"}
    assert not list(CONF.glob("*/*/*/*.yaml"))


@pytest.mark.parametrize("old", [*MOVED_VIEWS][::6])
def test_views_go_by_their_former_name_too(old):
    """On the command line and in the defaults list of somebody's own sheet, which Hydra resolves alike."""
    assert old not in GROUPS["views"]
    assert plainly(f"views={old}")["views"] == with_option("views", MOVED_VIEWS[old])["views"]


def test_no_sheet_has_the_suffix_that_hydra_will_refuse():
    assert not list(CONF.rglob("*.yml"))


# ------------------------------------------------------------ composing


def test_the_default_configuration_is_whole():
    assert_whole()


def test_sheets_that_are_read_once_compose_as_those_that_are_read_again_each_time(tmp_path):
    """Also after a composition has changed what it was given, and where one of them adds a folder with sheets of its own."""
    (tmp_path / "protocol").mkdir()
    (tmp_path / "protocol" / "mine.yaml").write_text("defaults: [scenes_multi]\nversion: 5\n")
    added = f"hydra.searchpath=[file://{tmp_path}]"
    lists = [["dataset.count=3", "views=daam"], ["views=daam"], [added, "protocol=mine"], ["protocol=scenes_multi"]]
    with hydra() as loader:
        plainly_read = [compose("evaluate", overrides=overrides) for overrides in lists]
        read_sheets_once()
        held = loader.repository.held
        assert [compose("evaluate", overrides=overrides) for overrides in lists] == plainly_read
        assert loader.repository.held is held and "protocol/mine" not in held and "views/daam" in held
        with pytest.raises(ConfigCompositionException, match="Could not find 'protocol/mine'"):
            compose("evaluate", overrides=["protocol=mine"])
    assert [config.protocol.version for config in plainly_read[2:]] == [5, plainly_read[3].protocol.version]


def test_the_lists_choose_every_option():
    assert {override for override in WITH if "version" not in override} == {chosen(*one) for one in OPTIONS}


@pytest.mark.parametrize("overrides", TOGETHER, ids=" ".join)
def test_options_compose_whole_and_add_no_key_to_the_root(overrides):
    assert_whole(*overrides)
    assert set(composed(*overrides)) == set(Root.__annotations__)


@pytest.mark.parametrize("dataset", GROUPS["dataset"])
def test_a_data_set_brings_a_protocol_and_the_command_line_may_change_it(dataset):
    assert plainly(f"dataset={dataset}")["protocol"]["name"]
    (protocol,) = (one.partition("=")[2] for one in WITH[f"dataset={dataset}"] if one.startswith("protocol="))
    assert with_option("dataset", dataset)["protocol"]["name"] == protocol


@pytest.mark.parametrize("extractor", GROUPS["extractor"])
def test_an_extractor_brings_views(extractor):
    assert with_option("extractor", extractor)["views"]


@pytest.mark.parametrize("protocol", GROUPS["protocol"])
def test_a_protocol_is_named_as_its_sheet(protocol):
    found = with_option("protocol", protocol)["protocol"]
    assert found["name"] == protocol
    assert found | sheet("protocol", protocol) == found  # as tests read it at collection


@pytest.mark.parametrize("sheet", GROUPS["experiment"])
def test_an_experiment_gives_way_to_the_command_line(sheet):
    assert with_option("experiment", sheet)["protocol"]["version"] == 77


# ------------------------------------------------------------ building


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] in ("dataset", "protocol", "extractor")], ids="/".join)
def test_an_option_builds_its_part(group, option):
    assert instantiate(with_option(group, option)[group], group) is not None


@pytest.mark.parametrize("sheet", GROUPS["views"])
def test_a_views_sheet_fits_flux_or_a_unet_or_a_method_of_one_map(sheet):
    from conceptseg.backbones.transformers.concept_stream import SPACES
    from conceptseg.extractors import anchordiff, attention_chains, cross_attention, daam, goca, ovam

    settings = with_option("views", sheet)["views"]
    fitting = []
    unet = Axes((*daam.SPACES, *ovam.SPACES, "refined"), tuple(range(60)), has_timesteps=True, has_vectors=False)
    prompt = Axes(tuple(cross_attention.SPACES), tuple(range(19)), has_timesteps=True, has_vectors=False)
    bounces = tuple(f"bounce_{count + 1}" for count in range(attention_chains.MOST_BOUNCES))
    joint = Axes((*bounces, *anchordiff.SPACES, *goca.SPACES), tuple(range(19)), has_timesteps=True, has_vectors=False)
    for axes in (Axes(tuple(SPACES), tuple(range(19)), has_timesteps=True), unet, prompt, joint, Axes(("map",))):
        try:
            fitting.append(expand_views(settings, axes))
        except ViewError:
            continue
    assert len(fitting) == 1


@pytest.mark.parametrize("sheet", [
    sheet for sheet in GROUPS["experiment"]
    if "override /extractor: concept_attention" in (CONF / "experiment" / f"{sheet}.yaml").read_text(encoding="utf-8")
])  # fmt: skip
def test_the_views_of_a_released_experiment_fit_its_backbone(sheet):
    from conceptseg.backbones.transformers.concept_stream import SPACES

    whole = with_option("experiment", sheet)
    path = whole["extractor"]["backbone"]["path"]
    known = {"black-forest-labs/FLUX.1": 19, "stabilityai/stable-diffusion-3.5-large": 38}
    (layers,) = [count for start, count in known.items() if path.startswith(start)]
    assert expand_views(whole["views"], Axes(tuple(SPACES), tuple(range(layers)), has_timesteps=True))


def of_the_hub(option):
    """Read from the sheet, or from the one it extends: nothing is composed at collection."""
    sheet = yaml.safe_load((CONF / "backbone" / f"{option}.yaml").read_text(encoding="utf-8"))
    if "path" not in sheet:
        return of_the_hub(sheet["defaults"][0])
    return not sheet["path"].startswith(("lab:", "./"))


def test_most_backbones_are_of_the_hub():
    assert len(list(filter(of_the_hub, GROUPS["backbone"]))) > 20


@pytest.mark.parametrize("option", filter(of_the_hub, GROUPS["backbone"]))
def test_a_backbone_from_the_hub_is_pinned_to_a_commit(option):
    backbone = with_option("backbone", option)["extractor"]["backbone"]
    if backbone["revision"] == "main":  # its commit could not be looked up: the sheet says so
        said = (CONF / "backbone" / f"{option}.yaml").read_text(encoding="utf-8").replace("\n# ", " ")
        assert "Its branch main is resolved to a commit" in said and "by nobody" in backbone["hub"]["pinned"]
    else:
        assert len(backbone["revision"]) == 40


def test_a_backbone_from_the_hub_says_what_it_takes_to_have_it():
    offenders = {}
    for option in filter(of_the_hub, GROUPS["backbone"]):
        backbone = with_option("backbone", option)["extractor"]["backbone"]
        known = repository_of(backbone)
        weights = {"float16": 2, "bfloat16": 2, "float32": 4}[backbone["dtype"]] * sum(known.parameters.values())
        offenders[option] = [
            *(name for name in ("size_from", "pinned", "files") if not getattr(known, name)),
            *("gated" for _ in [0] if known.gated is None),
            *("licence" for _ in [0] if "licence" not in backbone),
            *(
                "download" for _ in [0] if not 0.8 * weights <= (known.download or 0) <= 2.1 * weights
            ),  # two are stored in float32
        ]
    assert {option: found for option, found in offenders.items() if found} == {}
    with pytest.raises(ConfigError, match=r'hub\.gatd of a/b: no such key\. Did you mean "gated"'):
        repository_of({"path": "a/b", "hub": {"gatd": True}})


# ------------------------------------------------------------ code in configurations


def test_a_target_outside_the_allowed_prefixes_is_refused_with_its_key():
    whole = plainly("extractor._target_=os.system")
    with pytest.raises(ConfigError, match=r'extractor\._target_ is "os\.system"(.|\n)*runtime\.allow_targets'):
        check_targets(whole, whole["runtime"]["allow_targets"])


def test_a_target_in_a_list_is_seen():
    assert ("protocol.segmenters[0]", "conceptseg.segment.segmenter.Segmenter") in targets(plainly())


def test_a_prefix_that_is_added_lets_a_target_pass():
    whole = plainly("extractor._target_=mylab.Method", "runtime.allow_targets=[conceptseg.,mylab.]")
    check_targets(whole, whole["runtime"]["allow_targets"])


def test_a_keyword_that_a_class_does_not_take_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r'extractor\.sigmaa(.|\n)*Did you mean "sigma"'):
        instantiate(plainly("extractor=centre_prior", "+extractor.sigmaa=1")["extractor"], "extractor")


def test_a_target_that_cannot_be_imported_is_named():
    with pytest.raises(ConfigError, match=r"extractor\._target_(.|\n)*NoSuch"):
        instantiate({"_target_": "conceptseg.extractors.controls.NoSuch"}, "extractor")


def test_a_part_without_a_target_is_refused():
    with pytest.raises(ConfigError, match="dataset"):
        instantiate({}, "dataset")
