"""Numbers that travel: records in the schema of Every Eval Ever, and tables fetched from a server on this machine."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
from small_hub import COMMIT, Fault, SmallHub

from conceptseg.cli import compare
from conceptseg.cli.report import report
from conceptseg.downloads import read_address
from conceptseg.errors import ConfigError, DataError, ReportError
from conceptseg.report.every_eval_ever import write_records
from conceptseg.report.results import Results, save
from conceptseg.tables import shared_results
from conceptseg.tables.shared_results import hold, read_table

MADE = json.loads((Path(__file__).parent / "test_report_table.json").read_text())
TEXT, NUMBER, TEXTS = str, (int, float), {"": str}
# Required keys have no "?"; {"": type} is a map with values of that type; a set lists the texts that are allowed.
RECORD = {
    "schema_version": {"0.2.2"}, "evaluation_id": TEXT, "retrieved_timestamp": TEXT, "?evaluation_timestamp": TEXT,
    "source_metadata": {
        "?source_name": TEXT, "source_type": {"documentation", "evaluation_run"}, "source_organization_name": TEXT,
        "evaluator_relationship": {"first_party", "third_party", "collaborative", "other"}, "?additional_details": TEXTS,
    },
    "eval_library": {"name": TEXT, "version": TEXT, "?additional_details": TEXTS},
    "model_info": {"name": TEXT, "id": TEXT, "?developer": TEXT, "?additional_details": TEXTS},
    "evaluation_results": [{
        "?evaluation_result_id": TEXT, "evaluation_name": TEXT,
        "source_data": {"dataset_name": TEXT, "source_type": {"other"}, "?additional_details": TEXTS},
        "metric_config": {
            "lower_is_better": bool, "?evaluation_description": TEXT, "?metric_id": TEXT, "?metric_name": TEXT,
            "?metric_kind": TEXT, "?metric_unit": TEXT, "?score_type": {"continuous"}, "?min_score": NUMBER, "?max_score": NUMBER,
            "?additional_details": TEXTS,
        },
        "score_details": {
            "score": NUMBER, "?details": TEXTS,
            "?uncertainty": {
                "?confidence_interval": {"lower": NUMBER, "upper": NUMBER, "?confidence_level": NUMBER, "?method": TEXT},
                "?num_samples": int, "?num_bootstrap_samples": int,
            },
        },
        "?generation_config": {"?generation_args": {"?execution_command": TEXT}, "?additional_details": TEXTS},
    }],
}  # fmt: skip
"""Types that eval.schema.json 0.2.2 asks of the keys that are written."""


def faults(value, wanted, at="record"):
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{at} is {value!r}"]
    if isinstance(wanted, list):
        return [f for k, one in enumerate(value) for f in faults(one, wanted[0], f"{at}[{k}]")]
    if not isinstance(wanted, dict):
        of_kind = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
        return [] if of_kind else [f"{at} is {value!r}"]
    if not isinstance(value, dict):
        return [f"{at} is {value!r}"]
    if "" in wanted:
        return [f for key, one in value.items() for f in faults(one, wanted[""], f"{at}.{key}")]
    known = {key.lstrip("?"): one for key, one in wanted.items()}
    missing = [f"{at} lacks {key}" for key in wanted if not key.startswith("?") and key not in value]
    strange = [f"{at}.{key} is unknown" for key in value if key not in known]
    return [
        *missing,
        *strange,
        *(f for key, one in value.items() if key in known for f in faults(one, known[key], f"{at}.{key}")),
    ]


def table(**changes):
    return Results.from_json(
        {**copy.deepcopy(MADE), "interval": "95 % percentile bootstrap over images, 1,000 resamples", **changes}
    )


def test_records_fit_the_schema_and_hold_every_computed_number(tmp_path):
    files = write_records(table(), tmp_path, "made", 1_700_000_000)
    found = [json.loads(file.read_text()) for file in files]
    assert not [fault for record in found for fault in faults(record, RECORD)]
    computed = {
        (row["name"], name): value
        for row in MADE["blocks"][0]["rows"]
        for name, value in row["values"].items()
        if row["status"] == "ok" and not name.startswith("quoted/")
    }
    kept = {
        (record["model_info"]["additional_details"]["method"], one["metric_config"]["metric_id"].removeprefix("conceptseg.")): one
        for record in found
        for one in record["evaluation_results"]
    }
    assert computed and kept.keys() == computed.keys()
    for place, value in computed.items():
        said = kept[place]["score_details"]
        assert said["score"] == value["value"] and said["uncertainty"]["num_samples"] == value["n"]
        bounds = said["uncertainty"]["confidence_interval"]
        assert (bounds["lower"], bounds["upper"], bounds["confidence_level"]) == (value["low"], value["high"], 0.95)
        assert said["uncertainty"]["num_bootstrap_samples"] == 1000
        assert kept[place]["source_data"]["additional_details"]["protocol"] == MADE["blocks"][0]["protocol"]
    assert write_records(table(), tmp_path, "made", 1_700_000_000) == files  # the same names for the same record
    broken = {**found[0], "schema_version": "9"}
    del broken["eval_library"]["version"]
    assert len(faults(broken, RECORD)) == 2


def said_by(command, capsys, code=0):
    """Return stdout and stderr of a command, which must end with this code."""
    with pytest.raises(SystemExit) as ended:
        command()
    assert ended.value.code == code
    return "".join(capsys.readouterr())


def test_the_command_writes_records_and_wants_to_know_who_evaluated(tmp_path, monkeypatch, capsys):
    save(tmp_path / "results.json", table())
    command = ["conceptseg-report", "--table", str(tmp_path / "results.json"), "--every-eval-ever", str(tmp_path / "records")]
    monkeypatch.setattr(sys, "argv", command)
    assert "--organization is empty" in said_by(report, capsys, 1)
    monkeypatch.setattr(sys, "argv", [*command, "--organization", "made"])
    said = said_by(report, capsys)
    files = list((tmp_path / "records" / "lab").rglob("*.json"))
    assert f"lab: {len(files)} records" in said and files


def test_a_table_of_which_nothing_was_run_has_no_record(tmp_path):
    data = copy.deepcopy(MADE)
    data["blocks"][0]["rows"] = [row for row in data["blocks"][0]["rows"] if row["status"] == "not run"]
    with pytest.raises(ConfigError, match="no computed number"):
        write_records(Results.from_json(data), tmp_path, "made", 1)


# ---------------------------------------------------------------- tables from an address


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's library is imported before: it reads its endpoint once."""
    from huggingface_hub import constants

    served = SmallHub()
    monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    served.serve("some/results", {"lab/results.json": json.dumps(table().to_json()).encode(), "note.json": b"[1, 2"})
    yield served
    served.close()


def test_a_table_is_read_from_an_address_and_from_the_hub(hub):
    address = f"{hub.endpoint}/some/results/resolve/main/lab/results.json"
    assert read_table(address) == read_table(f"hf://some/results@{COMMIT}/lab/results.json") == table()
    assert read_table("hf://some/results/lab/results.json") == table()


def test_what_is_no_table_is_refused_with_its_address(hub, monkeypatch):
    with pytest.raises(ReportError, match=r"note\.json is not JSON"):
        read_table(f"{hub.endpoint}/some/results/resolve/main/note.json")
    for wrong in ("hf://some/results/absent.json", "hf://no/such/results.json", f"hf://some/results@{'b' * 40}/lab/results.json"):
        with pytest.raises(DataError, match=f"{re.escape(wrong)} can't be downloaded"):
            read_table(wrong)
    with pytest.raises(DataError, match="wanted hf://owner/name/path"):
        read_table("hf://results.json")
    hub.faults.append(Fault("results.json", status=503, times=9))
    with pytest.raises(DataError, match="can't be downloaded: HTTP Error 503"):
        read_table(f"{hub.endpoint}/some/results/resolve/main/lab/results.json")
    hub.faults.clear()
    monkeypatch.setattr(shared_results, "LARGEST", 100)
    for large in (f"{hub.endpoint}/some/results/resolve/main/lab/results.json", "hf://some/results/lab/results.json"):
        with pytest.raises(DataError, match="more than 100 bytes"):
            read_table(large)
    with pytest.raises(DataError, match="can't be downloaded"):
        read_address("http://127.0.0.1:1/results.json", 10)


def shifted(by):
    data = table().to_json()
    for row in data["blocks"][0]["rows"]:
        for value in row["values"].values():
            if value["low"] is not None:
                value |= {key: value[key] + by for key in ("value", "low", "high")}
    return data


def test_two_tables_are_held_against_each_other_and_printed(hub, tmp_path, monkeypatch, capsys):
    save(tmp_path / "results.json", Results.from_json(shifted(0.02)))
    address = f"{hub.endpoint}/some/results/resolve/main/lab/results.json"
    held = hold(Results.from_json(shifted(0.02)), table())
    assert held and all(one.difference == pytest.approx(0.02) for one in held)
    one = held[0]
    assert one.spread == pytest.approx(2**0.5 * (one.theirs.high - one.theirs.low) / 2)
    command = ["conceptseg-compare", str(tmp_path / "results.json"), address]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "said.json")])
    said = said_by(compare.main, capsys)
    assert "not paired" in said and "+2.0" in said
    assert len(json.loads((tmp_path / "said.json").read_text())["numbers"]) == len(held)
    for more, wanted in ((["--by", "word"], "--by needs the rows of runs"), (["--metric", "auroc"], "share no number of auroc")):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert wanted in said_by(compare.main, capsys, 1)
    monkeypatch.setattr(sys, "argv", ["conceptseg-compare", "runs/abc", address])
    assert "A run and a table can't be compared" in said_by(compare.main, capsys, 1)


@pytest.mark.parametrize("what", ["protocol", "dataset"])
def test_tables_of_another_task_or_definition_are_refused(what):
    data = table().to_json()
    data["blocks"][0][what] = "another"
    with pytest.raises(ConfigError, match=r'block "one object".*"another"'):
        hold(table(), Results.from_json(data))
    other = table().to_json()
    other["columns"][0]["text"] = "Another definition."
    with pytest.raises(ConfigError, match="two versions of conceptseg"):
        hold(table(), Results.from_json(other))
    renamed = table().to_json()
    renamed["blocks"][0]["name"] = "elsewhere"
    with pytest.raises(ConfigError, match="no computed number in common"):
        hold(table(), Results.from_json(renamed))
