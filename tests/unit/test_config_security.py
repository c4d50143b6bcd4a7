"""No code from configuration: a _target_ names a subclass of its part's base, from a package that was allowed."""

import json
import sys
import time
from importlib import metadata

import pytest
from composing import plainly
from omegaconf import OmegaConf

from conceptseg import targets
from conceptseg.cli.evaluate import evaluate
from conceptseg.cli.explain import parse
from conceptseg.config import plain
from conceptseg.entry_points import PACKAGES
from conceptseg.errors import ConfigError, DataError
from conceptseg.evaluation.assemble import assemble
from conceptseg.reading import read_yaml

RUNS_A_PROGRAM = "conceptseg.evaluation.launchers._carried_out"


@pytest.mark.parametrize(("part", "choice"), [("extractor", "oracle"), ("dataset", "scenes"), ("protocol", "scenes_single")])
@pytest.mark.parametrize(
    "target",
    [
        RUNS_A_PROGRAM,  # a function of ours that runs a program
        "conceptseg.evaluation.launchers.SubmititLauncher",  # a class of ours, of another kind
        "conceptseg.evaluation.launchers.ShardCommand",
        "conceptseg.files.Path",  # a class that one of our modules imported
    ],
)
def test_a_part_is_built_from_a_subclass_of_its_own_base_only(part, choice, target):
    settings = {**plainly(f"{part}={choice}")[part], "_target_": target}
    with pytest.raises(ConfigError, match=rf"{part}._target_ (is )?\"{target}\"; wanted a subclass"):
        targets.instantiate(settings, part)


def test_a_launcher_is_a_launcher(tmp_path):
    with pytest.raises(ConfigError, match=r"wanted a subclass of conceptseg.evaluation.launchers.Launcher"):
        targets.instantiate({"_target_": RUNS_A_PROGRAM, "command": ["true"], "folder": "."}, "launcher")


@pytest.mark.parametrize(
    ("part", "overrides"),
    [
        ("extractor", ["extractor=naclip", f"extractor.backbone._target_={RUNS_A_PROGRAM}"]),
        ("extractor", ["extractor=oracle", "+extractor.grid._target_=conceptseg.extractors.controls.Oracle"]),
        ("protocol", ["protocol=scenes_single", f"protocol.segmenters=[{{_target_: {RUNS_A_PROGRAM}}}]"]),
        ("dataset", ["dataset=scenes", "+dataset.size._target_=conceptseg.data.drawn.Scenes"]),
    ],
)
def test_a_nested_part_is_held_to_its_base_too(part, overrides):
    with pytest.raises(ConfigError, match=r"wanted a subclass|plain settings only"):
        found = plainly(*[o for o in overrides if "+" not in o])[part]
        for override in [o for o in overrides if "+" in o]:
            key, _, target = override.lstrip("+").partition("=")
            found[key.split(".")[1]] = {"_target_": target}
        targets.instantiate(found, part)


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_recursive_", "_convert_"])
def test_hydras_own_keys_are_refused(key):
    with pytest.raises(ConfigError, match=rf"extractor\.{key}"):
        targets.instantiate({"_target_": "conceptseg.extractors.controls.Constant", key: True}, "extractor")


def test_a_prefix_is_a_package_and_not_the_beginning_of_a_name():
    whole = plainly("extractor._target_=mylab_evil.Method")
    with pytest.raises(ConfigError, match=r"outside runtime.allow_targets"):
        targets.check_targets(whole, ["mylab"])


def test_nothing_of_a_package_that_is_not_allowed_is_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_package.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"outside runtime.allow_targets"):
        targets.instantiate({"_target_": "evil_package.Method"}, "extractor")
    assert "evil_package" not in sys.modules


def test_an_installed_package_of_the_entry_point_group_is_allowed(monkeypatch):
    points = [metadata.EntryPoint("mine", "mylab", PACKAGES)]
    monkeypatch.setattr(targets, "entry_points", lambda group: points if group == PACKAGES else [])
    targets.check_targets(plainly("extractor._target_=mylab.Method"), [])


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["conceptseg", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        evaluate()
    return end.value.code, capsys.readouterr().err


PROGRAM = f"{{_target_: {RUNS_A_PROGRAM}, command: [touch, PATH], folder: .}}"
FOREIGN = {
    "widens.yaml": "# @package _global_\nruntime: {allow_targets: [conceptseg., os.]}\n",
    "launches.yaml": f"# @package _global_\nlauncher: {PROGRAM}\n",
    "calls_back.yaml": f"# @package _global_\nhydra: {{callbacks: {{a: {PROGRAM}}}}}\n",
}


@pytest.mark.parametrize(
    ("name", "by", "message"),
    [
        ("widens", "searchpath", "runtime.allow_targets on the command line"),
        ("launches", "flag", "wanted a subclass of conceptseg.evaluation.launchers.Launcher"),
        ("calls_back", "searchpath", "hydra.callbacks is set by a configuration file from elsewhere"),
        ("calls_back", "flag", "hydra.callbacks is set by a configuration file from elsewhere"),
    ],
)
def test_a_foreign_experiment_file_runs_nothing(tmp_path, monkeypatch, capsys, name, by, message):
    """The first two are refused by what was composed, wherever it came from; the last before Hydra composes, by the folder."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    for file, text in FOREIGN.items():
        (folder / file).write_text(text.replace("PATH", str(tmp_path / "ran")))
    monkeypatch.chdir(tmp_path)
    where = f"hydra.searchpath=[file://{tmp_path}/conf]" if by == "searchpath" else f"--config-dir={tmp_path}/conf"
    code, said = command(monkeypatch, capsys, where, f"experiment={name}", "extractor=constant", "dataset.count=1")
    assert code == 1 and message in said
    assert not (tmp_path / "ran").exists() and not (tmp_path / "runs").exists()


def test_another_primary_configuration_is_refused(tmp_path, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, f"--config-path={tmp_path}")
    assert code == 1 and "--config-dir" in said


def test_a_table_row_does_not_widen_what_is_allowed(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "conf" / "table"
    folder.mkdir(parents=True)
    (folder / "theirs.yaml").write_text(
        "# A table from elsewhere.\ntitle: t\ncolumns: [accuracy]\nblocks:\n  - {name: b, data: d, text: t, segmenter: "
        'mean@mask/bilinear, rows: [{name: r, overrides: [extractor=constant, "runtime.allow_targets=[conceptseg.,os.]"]}]}\n'
    )
    monkeypatch.chdir(tmp_path)
    code, said = command(monkeypatch, capsys, f"hydra.searchpath=[file://{tmp_path}/conf]", "table=theirs", "report.publish=no")
    assert code == 1 and "runtime.allow_targets" in said and not list(tmp_path.glob("runs/*/manifest.json"))


SECRET = "hunter2-of-the-environment"


def manifest_of(tmp_path, *overrides, allowed=False):
    whole = plainly("extractor=constant", "protocol=scenes_single", "dataset.count=1", *overrides)
    whole["runtime"] |= {"runs": str(tmp_path), "record_environment": allowed}
    return (assemble(whole).store.folder / "manifest.json").read_text()


@pytest.mark.parametrize(
    "override",
    [
        "report.results_md=${oc.env:CONCEPTSEG_TEST}/RESULTS.md",
        "report.results_md=${report.benchmarks}/RESULTS.md",  # through another setting
        "report.trackers=[${oc.env:CONCEPTSEG_TEST}]",
        "report.benchmarks='${oc.decode:${oc.env:CONCEPTSEG_TEST}}'",
    ],
)
def test_what_is_read_from_the_environment_is_listed_and_not_kept(tmp_path, monkeypatch, override):
    monkeypatch.setenv("CONCEPTSEG_TEST", SECRET)
    through = ("report.benchmarks=${oc.env:CONCEPTSEG_TEST}",) if "${report" in override else ()
    kept = manifest_of(tmp_path, override, *through)
    key, _, text = override.partition("=")
    assert SECRET not in kept and text.strip("[]'") in kept
    assert key.split(".") in [keys[:2] for keys, _ in json.loads(kept)["config"]["environment"]]
    assert SECRET in manifest_of(tmp_path / "allowed", override, *through, allowed=True)


def test_a_number_of_the_environment_that_names_the_run_is_refused_unless_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPTSEG_TEST", "77123")
    own = ("extractor=random", "extractor.seed='${oc.decode:${oc.env:CONCEPTSEG_TEST}}'")
    with pytest.raises(ConfigError, match=r"extractor\.seed reads the environment(.|\n)*runtime\.record_environment=true"):
        manifest_of(tmp_path, *own)
    assert not list(tmp_path.iterdir())
    assert "77123" in manifest_of(tmp_path, *own, allowed=True)


def test_only_the_command_line_allows_to_keep_the_environment():
    whole = plainly("runtime.record_environment=true")
    targets.check_allowance(whole, ["runtime.record_environment=true"])
    with pytest.raises(ConfigError, match="on the command line"):
        targets.check_allowance(whole, [])


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_yaml_that_stands_for_billions_of_values_is_refused_at_once(tmp_path, monkeypatch, capsys):
    started = time.process_time()
    merged = laughs(9).replace("a0: &a0 [x, x, x, x, x, x, x, x, x, x]", "a0: &a0 {k: x}")
    for text in (laughs(9), merged, "a: &a [1, *a]\n", "a: &a {b: *a}\n"):
        (tmp_path / "file.yaml").write_text(text)
        with pytest.raises(DataError, match=r"alias"):
            read_yaml(tmp_path / "file.yaml")
        with pytest.raises(DataError, match=r"alias"):
            parse(["concepts=" + "{" + text.replace("\n", ", ") + "}", "image=a.png"])
    (tmp_path / "file.yaml").write_text(laughs(2))
    assert read_yaml(tmp_path / "file.yaml")["a1"][9] == ["x"] * 10
    for group in ("experiment", "table", "dataset", "extractor"):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "bomb.yaml").write_text("# A bomb.\n" + laughs(9))
        for where in (f"hydra.searchpath=[file://{tmp_path}/conf]", f"--config-dir={tmp_path}/conf"):
            code, said = command(monkeypatch, capsys, where, f"{group}=bomb")
            assert code == 1 and "aliases stand for" in said and "bomb.yaml" in said
        (tmp_path / "conf" / group / "bomb.yaml").unlink()
    assert time.process_time() - started < 20


def doubling(levels, twice):
    return {"bomb": {**{f"a{n}": twice(f"bomb.a{n + 1}") for n in range(levels)}, f"a{levels}": "x"}}


TWICE = {
    "text": lambda key: f"${{{key}}}${{{key}}}",
    "list": lambda key: [f"${{{key}}}", f"${{{key}}}"],
    "mapping": lambda key: {"x": f"${{{key}}}", "y": f"${{{key}}}"},
    "resolver": lambda key: f"${{oc.create:[${{{key}}},${{{key}}}]}}",
    "key of a resolver": lambda key: f"${{oc.select:{key}}}${{oc.env:NOWHERE,${{{key}}}}}",
    "computed key": lambda key: f"${{bomb.${{oc.decode:{key[5:]}}}}}${{{key}}}",
}


@pytest.mark.parametrize("how", TWICE)
def test_interpolations_that_double_with_every_line_are_refused_at_once(how):
    started = time.process_time()
    for levels in (40, 700):
        with pytest.raises(ConfigError, match="interpolations"):
            plain(OmegaConf.create(doubling(levels, TWICE[how])))
    assert "x" in str(plain(OmegaConf.create(doubling(4, TWICE[how])))["bomb"]["a0"])
    assert time.process_time() - started < 10


def test_commands_refuse_interpolations_that_double(tmp_path, monkeypatch, capsys):
    started = time.process_time()
    uses = {"runtime": {"runs": "${bomb.a0}"}, "hydra": {"run": {"dir": "${bomb.a0}"}}, "table": {"title": "${bomb.a0}"}}
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    for part, use in uses.items():
        whole = json.dumps({**doubling(60, TWICE["text"]), part: use}, indent=1).replace("bomb", "views")
        (tmp_path / "conf" / "experiment" / "bomb.yaml").write_text(f"# @package _global_\n{whole}\n")
        code, said = command(monkeypatch, capsys, f"--config-dir={tmp_path}/conf", "experiment=bomb")
        assert code == 1 and "its interpolations" in said, said
    typed = [f"+b.a{n}=${{b.a{n + 1}}}${{b.a{n + 1}}}" for n in range(60)]
    code, said = command(monkeypatch, capsys, "extractor=constant", *typed, "+b.a60=x")
    assert code == 1 and "its interpolations" in said and not list(tmp_path.glob("runs"))
    assert time.process_time() - started < 20
