"""Trackers are off by default, refuse what is not there before anything runs, and log what was computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conceptseg.errors import ConfigError
from conceptseg.report import trackers
from conceptseg.report.results import Results
from conceptseg.report.trackers import check_trackers, track

TABLE = Results.from_json(json.loads(Path(__file__).with_name("test_report_table.json").read_text()))


def test_nothing_is_written_unless_asked_for(tmp_path):
    track(TABLE, [], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "said"), [("tensorbord", 'Did you mean "tensorboard"'), ("wandb", "needs the package wandb")])
def test_a_tracker_that_is_unknown_or_missing_is_refused_first(monkeypatch, name, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package == "wandb" else object())
    with pytest.raises(ConfigError, match=said):
        check_trackers([name])


def test_tensorboard_gets_every_computed_number_and_no_quoted_one(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    track(TABLE, ["tensorboard"], tmp_path)
    events = EventAccumulator(str(tmp_path / TABLE.table))
    events.Reload()
    wanted = {
        f"{block.name}/{row.name}/{column.name}": row.values[column.name].value
        for block in TABLE.blocks
        for row in block.rows
        for column in TABLE.columns
        if column.name in row.values and column.kind != "quoted"
    }
    logged = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert {tag: logged.get(tag) for tag in wanted} == pytest.approx(wanted)
    assert not any("quoted" in tag for tag in logged)
    assert trackers.os.environ["WORLD_SIZE"] == "4"
