"""What every YAML under conf/ owes its reader, and that each can be reached."""

from __future__ import annotations

import pytest
import yaml
from composing import CONF, GROUPS, RECIPES, hydra

from conceptseg.errors import ConfigError
from conceptseg.lab.recipes import load_recipe

SHEETS = sorted(CONF.rglob("*.yaml"))
RECIPE_NAMES = sorted(p.stem for p in (CONF / RECIPES).glob("*.yaml"))


def named(path):
    return path.relative_to(CONF).as_posix()


@pytest.mark.parametrize("path", SHEETS, ids=named)
def test_a_sheet_begins_with_a_comment_that_says_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    said = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert said.startswith("# ") and len(said) > 20


@pytest.mark.parametrize("path", SHEETS, ids=named)
def test_a_package_line_is_the_first_or_absent(path):
    """After any other comment line Hydra ignores it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if "@package" in line and number > 1]


@pytest.mark.parametrize("path", SHEETS, ids=named)
def test_a_sheet_can_be_reached(path):
    folder, option = path.parent.relative_to(CONF).as_posix(), path.stem
    if folder.startswith("table/"):
        with hydra() as loader:
            assert option in loader.get_group_options(folder)
    else:
        assert (folder == "." and option == "evaluate") or folder == RECIPES or option in GROUPS.get(folder, ())


@pytest.mark.parametrize("path", SHEETS, ids=named)
def test_a_sheet_names_no_key_twice(path):
    """YAML takes the last one without a word."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [self.construct_object(key) for key, _ in node.value]
            assert len(keys) == len(set(keys)), f"{named(path)}, line {node.start_mark.line + 1}: a key twice in {keys}"
            return super().construct_mapping(node, deep)

    Strict(path.read_text(encoding="utf-8")).get_single_data()


@pytest.mark.parametrize("path", [p for p in SHEETS if "defaults:" in p.read_text(encoding="utf-8")], ids=named)
def test_a_defaults_list_says_where_the_sheet_itself_stands(path):
    """An experiment of overrides alone is the exception: it has no place to state."""
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
    assert "_self_" in listed or all(str(next(iter(entry))).startswith("override ") for entry in listed)


@pytest.mark.parametrize("path", SHEETS, ids=named)
def test_no_sheet_uses_what_hydra_1_4_drops(path):
    text = path.read_text(encoding="utf-8")
    assert "override_dirname" not in text and "${now:" not in text and "eval:" not in text


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_lab_recipe_loads_and_is_named_as_its_file(name):
    assert load_recipe(name)["name"] == name


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "flux"'):
        load_recipe("flx")


def test_an_unknown_recipe_setting_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "steps"'):
        load_recipe("flux", ["stps=10"])


def test_a_recipe_setting_can_be_changed():
    assert load_recipe("flux", ["steps=7", "sizes.heads=2"])["steps"] == 7
