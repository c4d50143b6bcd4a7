"""Settings that can't be are refused in one message before anything is computed, whichever command they are given to."""

import sys

import pytest

from conceptseg.cli.evaluate import evaluate
from conceptseg.cli.report import report
from conceptseg.errors import ConfigError
from conceptseg.lab.recipes import load_recipe

ONE = ("extractor=constant", "dataset=scenes", "dataset.count=1")
TABLE = ("table=lab", "dataset.count=1", "report.publish=true")
COMMANDS = [
    (evaluate, (*ONE, "runtime.threads=???"), "runtime.threads is ???, which stands for a value that is not set yet"),
    (evaluate, (*ONE, "report.columns=[???]"), "report.columns"),
    (evaluate, (*ONE, "views.map=???"), "views.map is ???"),
    (evaluate, (*ONE, "protocol.caption='a {word} and {other}'"), "wanted no field but {word}"),
    (evaluate, (*ONE, "protocol.caption='{word.__class__}'"), "wanted no field but {word}"),
    (evaluate, (*ONE, "protocol.caption='a {word} {'"), "Write {word} for the class"),
    (evaluate, (*TABLE, "report.results_md=/proc/x.md"), "no file can be written to /proc"),
    (evaluate, (*TABLE, "report.benchmarks=/proc/benchmarks"), "no file can be written to /proc/benchmarks"),
    (evaluate, (*ONE, "launcher=local", "launcher.shards=1", "launcher.parameters.timeout_min=abc"), "expected type"),
    (evaluate, (*ONE, "launcher=local", "launcher.shards=1", "+launcher.parameters.nothing=1"), "took none of 1 shards"),
    (evaluate, ("-m", *ONE, "extractor=constant,nobody"), 'extractor: unknown option "nobody"'),
    (report, ("report.rows=lab",), "report.rows"),
]


def test_commands_refuse_what_can_not_be_in_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for command, words, said in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["conceptseg", *words])
        with pytest.raises(SystemExit) as end:
            command()
        heard = capsys.readouterr()
        if end.value.code != 1 or said not in heard.err or "Error" not in heard.err.splitlines()[0] or heard.out:
            wrong.append(f"{' '.join(words)}: {end.value.code} {heard.err[:300]} {heard.out[:300]}")
    assert not wrong, "\n".join(wrong)
    assert not list(tmp_path.glob("**/manifest.json"))


WRONG = (
    "steps=-1", "steps=nan", "steps=abc", "steps=1.5", "steps=true", "batch=0", "learning_rate=abc", "learning_rate=-1",
    "learning_rate=inf", "ema=[]", "single_share=1.5", "seed=-1", "compile=maybe", "sizes=3", "sizes.width=0", "sizes.heads=null",
    "phases=[{from:-1}]", "phases=[{from:3,batch:0}]", "time_logit=[nan,1]", "kind=3", "steps=${batch}x",
)  # fmt: skip


def test_recipes_of_the_lab_refuse_values_of_another_kind():
    taken = []
    for name in ("vit", "flux"):
        for word in WRONG:
            if (word.startswith("compile") or word.startswith("time_logit")) and name == "vit":
                continue
            try:
                load_recipe(name, [word])
            except ConfigError as error:
                assert word.partition("=")[0].partition(".")[0] in str(error)
            else:
                taken.append(f"{name} {word}")
    assert not taken
    assert load_recipe("vit", ["learning_rate=1.5e-3", "phases=[]"])["learning_rate"] == 0.0015
