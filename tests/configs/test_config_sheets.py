"""Every YAML under conf/ says what its reader needs, and each can be reached."""

from __future__ import annotations

import pytest
import yaml
from composing import CONF, GROUPS, RECIPES

from conceptseg.errors import ConfigError
from conceptseg.lab.recipes import load_recipe

SHEETS = sorted(CONF.rglob("*.yaml"))
RECIPE_NAMES = sorted(p.stem for p in (CONF / RECIPES).glob("*.yaml"))


def named(path):
    return path.relative_to(CONF).as_posix()


def offenders(is_wrong):
    """Names of the sheets that a rule finds fault with, given their path and text."""
    return [named(path) for path in SHEETS if is_wrong(path, path.read_text(encoding="utf-8"))]


def test_every_sheet_begins_with_a_comment_that_says_what_it_is():
    def wordless(path, text):
        lines = text.splitlines()
        said = lines[1] if lines[0].startswith("# @package") else lines[0]
        return not said.startswith("# ") or len(said) <= 20

    assert not offenders(wordless)


def test_a_package_line_is_the_first_or_absent():
    """After any other comment line Hydra ignores it."""
    assert not offenders(lambda path, text: "@package" in text.partition("\n")[2])


def test_every_sheet_can_be_reached():
    def unreachable(path, text):
        group, _, option = path.relative_to(CONF).with_suffix("").as_posix().partition("/")
        if path.stem.startswith("_"):  # a part of the sheets beside it
            beside = [other.read_text(encoding="utf-8") for other in path.parent.glob("*.yaml")]
            return not any(f"/{group}/{option}@_here_" in other or f"defaults: [{option}," in other for other in beside)
        return group not in (RECIPES, "evaluate") and option not in GROUPS[group]

    assert not offenders(unreachable)


class Strict(yaml.SafeLoader):
    """Plain YAML takes the last of two equal keys without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise ValueError(f"line {node.start_mark.line + 1}: a key twice in {keys}")
        return super().construct_mapping(node, deep)


def test_no_sheet_names_a_key_twice():
    def repeats(path, text):
        try:
            Strict(text).get_single_data()
        except ValueError:
            return True
        return False

    assert not offenders(repeats)
    assert repeats(None, "a: 1\na: 2\n")


def test_a_defaults_list_says_where_the_sheet_itself_stands():
    """An experiment of overrides alone is the exception: it has no place to state."""

    def silent(path, text):
        listed = (yaml.safe_load(text) or {}).get("defaults") if "defaults:" in text else None
        return bool(listed) and "_self_" not in listed and not all(str(next(iter(e))).startswith("override ") for e in listed)

    assert not offenders(silent)


def test_no_sheet_uses_what_hydra_1_4_drops():
    assert not offenders(lambda path, text: any(word in text for word in ("override_dirname", "${now:", "${eval:")))


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
