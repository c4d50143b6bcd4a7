"""Sweeps: which views make one, what is drawn, the best view on held-out samples, and the one table of a multirun."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image

from conceptseg.cli.evaluate import evaluate
from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import Rows
from conceptseg.report.results import load
from conceptseg.tables.compared import read
from conceptseg.tables.sweeps import choose_views, in_development, sweeps_of

SWEPT = ["extractor=daam", "dataset.count=8", "dataset.objects=[1,1]", "protocol=scenes_single", "report.resamples=50", "-q"]
FIRST = ["views=lab/unet", "views.words.layers='2,3'", "+views.words.each=layer_timestep", "views.words.timesteps=[0.3,0.5]"]
FIRST += ["views.words.draws=1", "~views.words_standardized"]
LATER = [word.replace("'2,3'", "1") for word in FIRST]


def ran(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr(sys, "argv", ["conceptseg", *arguments])
        evaluate()
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a run that was swept by one command, then by another over a further layer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path_factory.mktemp("swept"))
        ran(*SWEPT, *FIRST)
        ran(*SWEPT, *LATER)
        (manifest,) = Path("runs").resolve().glob("*/manifest.json")
    return manifest.parent


def test_a_later_command_adds_its_views_to_readings_table_and_pictures(swept):
    readings = json.loads((swept / "readings.json").read_text())["readings"]
    table = load(swept / "table.json")
    assert len(readings) == len({(r["view"], r["segmenter"]) for r in readings}) == len(table.blocks[0].rows) == 6 * 2
    (sweep,) = sweeps_of(table, table.blocks[0])
    assert (sweep.layers, sweep.timesteps, sweep.kinds) == (("1", "2", "3"), ("0.3", "0.5"), ("words",))
    (grid,) = sweep.grids("ap_image")
    assert len(grid.numbers) == 3 and all(0 <= value <= 1 for row in grid.numbers for value in row)
    (curves,) = sweep.curves("ap_image")
    assert {name: [x for x, _ in line] for name, line in curves.lines.items()} == {"t = 0.3": [1, 2, 3], "t = 0.5": [1, 2, 3]}


def test_heat_map_curves_and_best_view_lie_beside_the_table_and_on_its_page(swept):
    for name in ("heat_map.png", "curves.png"):
        with Image.open(swept / name) as picture:
            assert min(picture.size) > 200
    page = (swept / "evaluation.html").read_text()
    assert page.count('<table class="heat">') == 2 and page.count("<polygon") == 4
    remarks = load(swept / "table.json").blocks[0].remarks
    found = json.loads((swept / "sweep.json").read_text())["choices"]
    assert len(remarks) == len(found) == 2 and all(remark in page.replace("&#39;", "'") for remark in remarks)
    assert all(choice["n_development"] + choice["rest"]["n"] == 8 for choice in found)


def test_the_best_view_is_chosen_on_development_samples_and_reported_on_the_others():
    samples = [f"s/{i:02d}" for i in range(40)]
    development = {sample for sample in samples if in_development(sample, 0.5, 3)}
    assert 10 < len(development) < 30

    def rows(right_in_development: int, right_elsewhere: int) -> Rows:
        records = []
        for sample in samples:
            hit = right_in_development if sample in development else right_elsewhere
            records.append(
                {
                    "sample": sample, "view": "v", "segmenter": "mean", "status": "ok", "words": ["cat"],
                    "classes": [0, 1], "inter": [70, hit], "label": [70, 30],
                    "pred": [100 - hit, hit], "pred_void": [0, 0], "valid": 100, "void": 0, "correct": 70 + hit,
                    "ap": {"foreground": hit / 30}, "seconds": 0.1,
                }
            )  # fmt: skip
        return Rows.from_records(records)

    offered = {"flattered": rows(30, 3), "better elsewhere": rows(15, 30)}
    (choice,) = choose_views(offered, ["ap_image"], 0.5, 3, 50, 0.95)
    assert choice.view == "flattered" and choice.development == 1 and choice.rest.value == pytest.approx(0.1)
    assert (choice.n_development, choice.rest.n) == (len(development), 40 - len(development))
    assert choose_views(offered, ["ap_image"], 0.0, 3, 50, 0.95) == [], "without development samples none is named"


def test_compare_refuses_a_run_of_several_views_with_their_list_and_takes_the_named_one(swept):
    with pytest.raises(ConfigError, match=rf"6 views(.|\n)*--view(.|\n)*{swept.name}::words/L3/t0.5"):
        read(swept.name, swept.parent)
    with pytest.raises(ConfigError, match='2 views begin with "words/L3"'):
        read(f"{swept.name}::words/L3", swept.parent)
    assert read(f"{swept.name}::words/L3/t0.5", swept.parent).view == "words/L3/t0.5/n1/mean", "a beginning that one view has"
    assert read(swept.name, swept.parent, "words L1 t0.3").view == read(f"{swept.name}::words/L1/t0.3/n1/mean", swept.parent).view


def test_a_multirun_ends_in_one_table_and_the_command_that_compares_its_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran("-m", "extractor=centre_prior,constant", "dataset.count=3", "report.resamples=50", "-q")
    (path,) = (tmp_path / "runs" / "tables").glob("multirun-*/results.json")
    (block,) = load(path).blocks
    assert {row.name.partition(" (")[2] for row in block.rows} == {"extractor=centre_prior)", "extractor=constant)"}
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Compare: ")]
    assert set(shlex.split(said)[2:]) == {row.run_id for row in block.rows}
    index = (tmp_path / "runs" / "index.html").read_text()
    assert index.count("<li>") == 3 and f"tables/{path.parent.name}/{path.parent.name}.html" in index
