"""Composed configurations outlive a command, and only as long as nothing that they were composed of changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra import initialize_config_dir, initialize_config_module

from conceptseg import config
from conceptseg.tables.composed_cache import Compositions

CONF = Path(config.__file__).parents[1] / "conf"


@pytest.fixture
def composed(tmp_path):
    """Compositions of one command, and what it had to compose."""

    def command(*asked, source="a", answer=lambda overrides: {"list": [*overrides], "number": 1.0}):
        anew = []

        def compose_anew(overrides):
            anew.append(overrides)
            return answer(overrides)

        compositions = Compositions(tmp_path / "t" / "lab.configs.json", source, compose_anew)
        found = [compositions(*overrides) for overrides in asked]
        compositions.keep()
        return found, anew

    return command


def test_what_was_composed_once_is_composed_no_more(composed):
    first, anew = composed(("a=1", "b=2"), ("a=1", "b=2"), ("b=2", "a=1"))
    assert anew == [("a=1", "b=2"), ("b=2", "a=1")] and first[0] is first[1]
    again, anew = composed(("b=2", "a=1"), ("a=1", "b=2"))
    assert again == [first[2], first[0]] and not anew


def test_another_source_forgets_everything(composed):
    composed(("a=1",))
    assert composed(("a=1",), source="b")[1] == [("a=1",)]
    assert composed(("a=1",), source="a")[1] == [("a=1",)]


@pytest.mark.parametrize("source", ["a", None])
def test_values_of_the_environment_and_unknown_places_are_composed_anew(composed, source, tmp_path):
    overrides = ("a=${oc.env:HOME}",) if source else ("a=1",)
    for _ in range(2):
        assert composed(overrides, source=source)[1] == [overrides]
    assert "HOME" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_configuration_that_json_would_change_is_not_kept(composed):
    for _ in range(2):
        (found,), anew = composed(("a=1",), answer=lambda overrides: {"by": {1: "one"}})
        assert found == {"by": {1: "one"}} and anew


@pytest.mark.parametrize("text", ["", "[]", '{"source": "a"}', '{"source": "a", "configs"'])
def test_a_damaged_file_is_composed_anew(composed, tmp_path, text):
    composed(("a=1",))
    (tmp_path / "t" / "lab.configs.json").write_text(text)
    assert composed(("a=1",))[1] == [("a=1",)]


def test_a_changed_yaml_file_changes_the_source_and_a_place_of_the_users_own_has_none(tmp_path, monkeypatch):
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    monkeypatch.setattr(config.resources, "files", lambda package: copy)
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        before = config.composing_source()
        assert before == config.composing_source()
        with (copy / "dataset" / "scenes.yaml").open("a") as file:
            file.write("# a remark\n")
        changed = config.composing_source()
        assert changed not in (None, before)
        (copy / "dataset" / "scenes.yaml").write_text("seed: ${oc.env:SEED}\n")
        assert config.composing_source() is None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert config.composing_source() is None
