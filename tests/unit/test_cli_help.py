"""conceptseg --help: two screens, every group that can be chosen, and the options of each on demand."""

from __future__ import annotations

import sys
import tomllib
from contextlib import suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import conceptseg
from conceptseg.cli.evaluate import evaluate
from conceptseg.cli.report import _paths
from conceptseg.config import Report, Runtime
from conceptseg.errors import ConfigError

CONF = Path(conceptseg.__file__).parents[1] / "conf"
GROUPS = ("backbone", "dataset", "experiment", "extractor", "launcher", "protocol", "table", "views")


@pytest.fixture
def said(monkeypatch, capsys):
    def run(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["conceptseg", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate()
        assert end.value.code == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return run


def options(group: str) -> list[str]:
    return [p.relative_to(CONF / group).with_suffix("").as_posix() for p in (CONF / group).rglob("[!_]*.yaml")]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_two_screens(said, flag):
    lines = said(flag).splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100


def test_help_counts_the_options_of_every_group_that_can_be_chosen_and_says_how_to_list_them(said):
    text = said("--help")
    listed = [line for line in text.splitlines() if "conceptseg --help " in line and " options  " in line]
    assert [line.split()[-1] for line in listed] == [*GROUPS]
    assert [int(line.split()[1]) for line in listed] == [len(options(group)) for group in GROUPS]
    for schema, key in ((Runtime, "runtime"), (Report, "report")):
        assert all(f"  {key}.{field.name}=" in text for field in fields(schema))


def test_the_settings_of_reports_are_listed_alone(said):
    text = said("--help", "report")
    assert "report.top=null " in text and all(f"report.{field.name}=" in text for field in fields(Report))
    assert "  runtime." not in text


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_each_option_with_the_beginning_of_its_comment(said, group):
    head, _, *lines = said("--help", group).splitlines()
    assert head.startswith(f"{group}: {len(options(group))} options") and max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines] == sorted(options(group))
    assert all(len(line.split()) > 3 and "@package" not in line for line in lines)


def test_a_family_of_views_is_listed_alone(said):
    names = [line.split()[0] for line in said("--help", "views/lab").splitlines()[2:]]
    assert "lab/unet" in names and all(name.startswith("lab/") for name in names)


def test_the_sheets_of_a_folder_of_ones_own_are_listed(said, tmp_path):
    (tmp_path / "extractor").mkdir()
    (tmp_path / "extractor" / "mine.yaml").write_text("# A method of mine.\n")
    assert "mine" in said("--config-dir", str(tmp_path), "--help", "extractor")


def test_an_unknown_group_is_refused_with_the_nearest_and_recipes_are_no_group(said):
    assert 'no group "extracter". Did you mean "extractor"?' in said("--help", "extracter", code=1)
    assert 'no group "lab"' in said("--help", "lab", code=1)
    assert "lab: there is no such key" in said("lab=flux", code=1)


def test_help_with_settings_shows_their_configuration(said):
    assert "conceptseg.extractors.lrp.LRP" in said("--help", "extractor=lrp")


def test_every_command_says_its_version(monkeypatch, capsys):
    scripts = tomllib.loads((CONF.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        monkeypatch.setattr(sys, "argv", [name, "--version"])
        with suppress(SystemExit):
            getattr(import_module(module), function)()
        assert capsys.readouterr().out == f"{name} {conceptseg.__version__}\n"


def test_reports_find_tables_that_are_published_else_those_computed_here(tmp_path):
    benchmarks, computed = tmp_path / "benchmarks", tmp_path / "runs" / "tables"
    with pytest.raises(ConfigError, match=r"there is no table in .*benchmarks or .*tables"):
        _paths((), benchmarks, computed)
    held = {}
    for folder, name in ((computed, "mine"), (computed, "lab"), (benchmarks, "lab")):
        held[folder, name] = folder / name / "results.json"
        held[folder, name].parent.mkdir(parents=True)
        held[folder, name].touch()
    assert _paths(("lab", "mine"), benchmarks, computed) == [held[benchmarks, "lab"], held[computed, "mine"]]
    assert _paths((), benchmarks, computed) == [held[benchmarks, "lab"]]
    with pytest.raises(ConfigError, match=r"neither .* has it\. Did you mean \"mine\""):
        _paths(("mien",), benchmarks, computed)
    held[benchmarks, "lab"].unlink()
    assert sorted(_paths((), benchmarks, computed)) == sorted([held[computed, "lab"], held[computed, "mine"]])
