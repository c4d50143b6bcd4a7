"""Check the progress lines of commands: the run, the slow steps, no messages of libraries, and one line on Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from conceptseg.announcing import announced
from conceptseg.backbones import base
from conceptseg.cli.evaluate import evaluate
from conceptseg.evaluation import loop
from conceptseg.evaluation.carry_out import Series
from conceptseg.extractors.controls import CentrePrior
from conceptseg.logs import NOISY, show_logs

SMALL = ("dataset.count=2", "dataset=scenes", "report.resamples=20", "report.pictures=0", "runtime.threads=1")


@pytest.fixture
def logging_restored():
    """Handlers and levels of the process, as they were."""
    loggers = [logging.getLogger(name) for name in (None, "conceptseg")]
    before = [(list(one.handlers), one.level) for one in loggers]
    yield
    for one, (handlers, level) in zip(loggers, before, strict=True):
        one.handlers, _ = handlers, one.setLevel(level)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, logging_restored):
    """A command in an empty folder: how it ended, its output and what it said."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["conceptseg", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate()
        printed = capsys.readouterr()
        assert end.value.code == code, printed.err
        return printed.out, printed.err

    return command


@pytest.mark.parametrize("verbosity", ["quiet", "normal", "verbose"])
def test_libraries_are_heard_only_where_they_fail_or_are_asked_for(verbosity, capsys, logging_restored):
    show_logs(verbosity)
    for name in {*NOISY} - {"torch"}:  # which has a handler of its own, silenced by TORCH_LOGS
        logging.getLogger(f"{name}.part").warning("noise")
    logging.getLogger("httpx2").info("HTTP Request")
    logging.getLogger("accelerate").error("broken")
    logging.getLogger("conceptseg.store").warning("mind this")
    logging.getLogger("conceptseg.store").info("by the way")
    said = capsys.readouterr().err
    assert "error: broken\nwarning: mind this\n" in said, said
    assert (verbosity == "verbose") == ("noise" in said) == ("HTTP Request" in said)
    assert ("\nby the way\n" in said) == (verbosity != "quiet")


def test_bars_of_libraries_are_off():
    """Of tqdm, which transformers ("Loading weights"), diffusers and datasets use."""
    code = "from conceptseg.logs import quiet_libraries; quiet_libraries(); import tqdm.auto as t; list(t.tqdm([1, 2]))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stderr == ""


def test_a_torchao_that_diffusers_can_not_import_is_not_mentioned(caplog, monkeypatch):
    """It says so where it is imported, by whatever command or program; `base` is imported first by all that read weights."""
    assert base
    import diffusers.utils.logging as diffusers_logging
    from diffusers.quantizers.torchao import torchao_quantizer

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_warning()
    monkeypatch.setitem(sys.modules, "torchao.dtypes", None)
    monkeypatch.setattr(torchao_quantizer.logger, "handlers", [caplog.handler])
    torchao_quantizer._update_torch_safe_globals()
    diffusers_logging.set_verbosity(before)
    assert not caplog.messages


def test_a_long_step_is_said_before_it_starts_and_its_seconds_after(caplog):
    caplog.set_level(logging.INFO, "conceptseg")
    with announced("encoding 12 texts with T5"):
        assert caplog.messages == ["encoding 12 texts with T5 ..."]
    assert caplog.messages[1].startswith("encoding 12 texts with T5: 0.") and caplog.messages[1].endswith(" s")
    with announced("reading the lab's", usually_short=True):
        pass
    assert len(caplog.messages) == 2


def test_the_rest_of_a_table_is_estimated_from_the_runs_that_computed_something():
    series = Series(67, begun=12, computing=[2.0, 4.0])
    assert (series.place, series.seconds_left) == ("run 12 of 67", 165.0)
    assert Series(67, begun=12).seconds_left is None and Series(3, begun=3, computing=[1.0]).seconds_left is None


def test_an_evaluation_prints_its_row_under_the_methods_name_and_keeps_a_log(run, tmp_path, monkeypatch):
    """Of a method whose maps of words can't be compared: it has no row for argmax, not a failed one."""
    monkeypatch.setattr(CentrePrior, "comparable", False)
    command = ("extractor=centre_prior", *SMALL, "protocol=scenes_single", "dataset.objects=[1,1]")
    out, err = run(*command)
    assert len(out.splitlines()) == 7 and out.startswith("CentrePrior on scenes, 2 samples\n")
    assert out.splitlines()[3].startswith("CentrePrior  ") and "failed" not in out and "argmax" not in out
    (log,) = tmp_path.glob("runs/*/log-0of1.txt")
    assert "CentrePrior (runs/" in err and "2 samples computed, 0 held already" in err and "2 samples computed" in log.read_text()
    again, err = run(*command, "-q")
    assert err == "" and again.splitlines()[:6] == out.splitlines()[:6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_how_many_rows_are_kept(run, monkeypatch, number):
    def interrupted(self, tasks, views):
        if self.seen:
            os.kill(os.getpid(), number)
            time.sleep(10)
        self.seen = True
        return answers(self, tasks, views)

    answers = loop.Model.answers
    monkeypatch.setattr(loop, "Model", type("Model", (loop.Model,), {"answers": interrupted, "seen": False}))
    command = ("table=lab", "table.only=[constant]", *SMALL[0:1], *SMALL[2:], "dataset.count=3", "runtime.batch_size=1")
    out, err = run(*command, code=128 + number)
    assert out == "" and err.splitlines()[-1] == "2 rows kept; run the same command again to go on" and "Traceback" not in err
