"""Tables of papers: what can't be run is quoted and says what it needs; the lab fills rows under both protocols."""

from __future__ import annotations

import json
from functools import cache

import pytest
import yaml
from commands import TESTS
from omegaconf import OmegaConf

from conceptseg.tables.paper import overrides_of
from conceptseg.tables.sheet import read_sheet

SHEETS = TESTS.parent / "conf" / "table"
PAPER = sorted(
    path.relative_to(SHEETS).with_suffix("").as_posix()
    for path in SHEETS.glob("*/[!_]*.yaml")
    if "\nclaim: " in path.read_text(encoding="utf-8")
)
LAB_MODELS = TESTS.parent / "conceptseg" / "lab" / "weights"
WHOLE = ("conceptattention/ablation_attention", "conceptattention/layers")
"""Tables that tests of their own run whole."""
FEW = 3
"""Rows that are computed under both protocols rather than by a command of their own under one."""
ALIKE = {"lab_sdxl": "lab_sd", "lab_sd3": "lab_flux"}
"""Models of the lab that read texts and images as another one does."""
REPLACED = ("DINO", "iBOT", "LOST", "TokenCut")
"""Beginnings of the names of rows whose self-supervised model the lab lacks."""
NEVER = (
    "COCO-Gen", "a dependency parser", "no model of the lab does this", "computes this row", "METAGAME's 3,535 images",
    "METAGAME's choice of images and names", "which are not described", "which are not stated",
    "a method or set-up that is not here",
)  # fmt: skip
"""Needs that the lab never meets: their data are gone, another table has it, or nothing of it is run here."""


def results_of(folder):
    (path,) = folder.glob("results.json")
    table = json.loads(path.read_text())
    return table, [row for block in table["blocks"] for row in block["rows"]]


def latest(shared, name):
    """The folder that the last command on a table wrote, on the lab."""
    folders = (shared.folder / "runs" / "tables").glob(f"{name.replace('/', '-')}-lab-*")
    return max(folders, key=lambda folder: (folder / "results.json").stat().st_mtime_ns)


@cache
def read_yaml(path):
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def sheet_on_the_lab(name):
    """The sheet of a paper's table and the one that it extends, read without Hydra, whose composition takes long."""
    read = [read_yaml(SHEETS / f"{name}.yaml")]
    extended = [one.partition("@")[0] for one in read[0].get("defaults", []) if one != "_self_"]
    read[:0] = [read_yaml(SHEETS.parent / f"{one.lstrip('/')}.yaml") for one in extended]
    whole = OmegaConf.create({"table": OmegaConf.merge(*read, {"backbones": "lab"})})
    settings = OmegaConf.to_container(whole, resolve=True)["table"]
    settings.pop("defaults", None)
    return read_sheet(settings)


def with_models(overrides):
    """The overrides of a method, and the models of its sheet that they leave as they are."""
    found = {one.partition("=")[0]: one for one in overrides}
    if "extractor" in found:
        path = SHEETS.parent / "extractor" / f"{found['extractor'].partition('=')[2]}.yaml"
        for part in read_yaml(path)["defaults"]:
            for place, option in part.items() if isinstance(part, dict) else ():
                if place.startswith("/backbone@"):
                    key = place.lstrip("/").replace("@", "@extractor.")
                    found.setdefault(key, f"{key}={option}")
    return frozenset(found.values())


def methods_of_the_lab_table():
    """Settings of every method of its first block."""
    block = read_yaml(SHEETS / "lab.yaml")["blocks"][0]
    return {with_models(row["overrides"]) for row in block["rows"]}


def rows_on_the_lab(name):
    """(name in `table.only`, settings) of each row: protocol of the table -> method, task, kind of model, none for a row without.

    Method and task are sets of overrides; those of the data are in neither, since the lab replaces them.
    """
    sheet = sheet_on_the_lab(name)
    for block in sheet.blocks:
        for row in block.rows:
            found = {}
            for kind in sheet.parts if row.overrides is not None and row.lab is not None else ():
                if kind in row.kinds:
                    listed = [one for one in overrides_of(row, block, sheet, kind) if not one.startswith("dataset")]
                    task = frozenset(one for one in listed if one.startswith("protocol"))
                    method = with_models({*listed} - task)
                    model = next((one for one in method if one.startswith("backbone@extractor.backbone=")), "no model")
                    found[kind] = method, task, ALIKE.get(model.partition("=")[2], model)
            yield f"{block.name}: {row.name}", found


@cache
def chosen():
    """Table -> protocols to compute -> rows.

    A method runs with all of its settings once over all tables, and so does a task on every kind of model: the two meet in what a
    kind of model reads of texts and images, whichever of its methods asks. Methods of the lab table run in test_lab_table.py.
    Rows that read another view or cut of a row that is run join it, and rows that are not run cost nothing: all of them are
    there.
    """
    every_row = [(name, row, settings) for name in PAPER for row, settings in rows_on_the_lab(name)]
    methods, tasks, wanted, found = methods_of_the_lab_table(), set(), set(), {name: {} for name in PAPER}
    for name, row, settings in every_row:
        for kind, (method, task, model) in settings.items():
            if name in WHOLE or method not in methods:
                methods.add(method)
                tasks.add((task, model))
                wanted.add((name, row, kind))
    for name, row, settings in every_row:
        for kind, (_, task, model) in settings.items():
            if (task, model) not in tasks:
                tasks.add((task, model))
                wanted.add((name, row, kind))
    some = {name for name, _, _ in wanted}
    run = {name: {} for name in PAPER}
    for name, row, settings in every_row:
        every, same = tuple(sheet_on_the_lab(name).parts), str(sorted(settings.items(), key=str))
        new = tuple(kind for kind in settings if (name, row, kind) in wanted)
        if settings and (protocols := run[name].get(same) or new or (() if name in some or run[name] else every)):
            run[name][same] = protocols
            found[name].setdefault(protocols, []).append(row)
    for name, groups in found.items():
        every = tuple(sheet_on_the_lab(name).parts)
        for few in [protocols for protocols, rows in groups.items() if protocols != every and len(rows) < FEW]:
            groups.setdefault(every, []).extend(groups.pop(few))  # a command more would cost as much
        largest = max(groups, key=lambda protocols: len(groups[protocols]), default=every)
        groups.setdefault(largest, []).extend(row for row, settings in rows_on_the_lab(name) if not settings)
    return found


@pytest.fixture(scope="module")
def quoted(shared):
    """A table of which nothing can be run on this machine."""
    said = shared.run("table=conceptattention/ablation_attention", "report.publish=yes")
    return said, *results_of(shared.folder / "benchmarks" / "conceptattention-ablation_attention")


def test_rows_without_weights_are_not_run_and_say_what_they_need_and_how(quoted):
    said, _, rows = quoted
    assert [row["status"] for row in rows] == ["not run"] * 4
    needs, command = rows[0]["needs"], rows[0]["command"]
    assert needs == ["FLUX.1-schnell, 34 GB in bf16", "gtsegs_ijcv.mat (scripts/fetch_imagenet_segmentation.py)"]
    assert command.startswith("conceptseg dataset=imagenet_segmentation ") and "protocol=imagenet_released" in command
    assert said.said.count(needs[0]) == 1 and command.split()[-1] in said.said
    assert rows[0]["extractor"] == "ConceptAttention"
    assert "not run" in said.out and not any(row["run_id"] for row in rows)


def test_quoted_numbers_stand_in_their_own_columns_with_their_mark(quoted):
    _, table, rows = quoted
    kinds = {column["name"]: column["kind"] for column in table["columns"]}
    assert rows[3]["values"]["quoted/miou"] == {"value": 0.7104, "low": None, "high": None, "n": None, "mark": "\u2020"}
    assert all(kinds[name] == "quoted" for row in rows for name in row["values"])
    assert {kind for kind in kinds.values()} == {"quoted", "released", "standard"}
    assert any("\u2020 is acc/(2-acc)" in note for note in table["notes"])


def test_a_quoted_table_is_published_and_checks(quoted, shared):
    page = shared.folder / "benchmarks" / "conceptattention-ablation_attention" / "README.md"
    assert (
        "71.04\u2020" in page.read_text() and f"({page.relative_to(shared.folder)})" in (shared.folder / "RESULTS.md").read_text()
    )
    assert shared.run("--check", name="conceptseg-report").code == 0


def test_the_lab_fills_both_protocols_beside_the_quoted_numbers(shared):
    shared.run("table=conceptattention/ablation_attention", "table.backbones=lab", "dataset.count=2", "report.costs=true")
    table, rows = results_of(latest(shared, "conceptattention/ablation_attention"))
    assert [(row["status"], row["provenance"], row["n"], row["failed"]) for row in rows] == [("ok", "lab", 2, 0)] * 4
    for row in rows:
        groups = {name.partition("/")[0] for name in row["values"]}
        assert groups == {"quoted", "released", "standard", "cost_seconds", "cost_memory", "cost_passes"}
        (other,) = row["also"]
        assert other["kind"] == "standard" and other["run_id"] != row["run_id"] and other["n"] == 2
        accuracy = row["values"]["released/accuracy"]["value"]
        assert row["values"]["released/released_miou_from_accuracy"]["value"] == pytest.approx(accuracy / (2 - accuracy))
    assert "do not compare them with quoted ones" in table["notes"][0]


def test_one_row_of_a_table_runs_alone(shared):
    name = "conceptattention/imagenet_segmentation"
    shared.run(f"table={name}", "table.only=[DINOv2]", "table.backbones=lab", "dataset.count=2")
    table, rows = results_of(latest(shared, name))
    assert [(row["name"], row["status"], row["provenance"], row["n"]) for row in rows] == [("DINOv2", "ok", "lab", 2)]
    assert "'table.only=[DINOv2]'" in table["command"]
    assert not list((shared.folder / "benchmarks").glob("conceptattention-imagenet_segmentation*"))


def test_the_layers_of_a_model_are_points_of_a_curve(shared):
    shared.run("table=conceptattention/layers", "table.backbones=lab", "dataset.count=2")
    table, rows = results_of(latest(shared, "conceptattention/layers"))
    assert table["blocks"][0]["axis"] == "layer"
    assert [row["x"] for row in rows] == [float(i) for i in range(len(rows))] and len(rows) > 1
    assert {(row["status"], row["n"], row["failed"]) for row in rows} == {("ok", 2, 0)}
    assert {other["n"] for row in rows for other in row["also"]} == {2}
    assert {row["series"] for row in rows} == {"ConceptAttention Flux"}


# ---------------------------------------------------------------- the lab in place of weights and data


def test_no_settings_of_a_method_and_no_task_of_a_model_is_left_out():
    """Of all rows of all tables: what `chosen` leaves out is run by another row or by the lab table."""
    every, run = set(), methods_of_the_lab_table()
    for name in PAPER:
        protocols_of = {row: protocols for protocols, rows in chosen()[name].items() for row in rows}
        for row, settings in rows_on_the_lab(name):
            for kind, (method, task, model) in settings.items():
                every |= {method, (task, model)}
                run |= {method, (task, model)} if kind in protocols_of.get(row, ()) else set()
        filled = {row for row, settings in rows_on_the_lab(name) if settings}
        assert {row for row, _ in rows_on_the_lab(name)} - filled <= protocols_of.keys(), name
        assert not filled or filled & protocols_of.keys(), name
    assert every <= run and len(every) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAPER if name not in WHOLE])
def test_the_lab_fills_every_row_that_its_models_can(shared, name):
    """One row of each kind, see `chosen`."""
    parts = sheet_on_the_lab(name).parts
    for protocols, chosen_rows in chosen()[name].items():
        only = ",".join("'" + row.replace("'", "\\'") + "'" for row in chosen_rows)
        without = [f"table.{kind}=null" for kind in parts if kind not in protocols]
        shared.run(f"table={name}", "backbone=lab/*", "dataset.count=1", f"table.only=[{only}]", *without)
        check_filled(name, *results_of(latest(shared, name)))


def check_filled(name, table, rows):
    absent = {one for one in ("sd3", "dino") if not (LAB_MODELS / one / "card.json").exists()}
    for row in rows:
        if row["status"] == "not run":
            wanted = [*row.get("needs", ()), row["note"]]
            assert any(f"lab weights of {one}" in wanted for one in absent) or any(n in one for n in NEVER for one in wanted)
        else:
            assert (row["status"], row["n"], row["failed"]) == ("ok", 1, 0), row["note"]
            assert ("supervised ViT replaces it" in row["note"]) == row["name"].startswith(REPLACED), row["name"]
            for other in row.get("also", ()):  # the released VOC prompt of DAAM is longer than the lab's encoder reads: refused
                too_long = name == "conceptattention/voc_multi" and row["name"].startswith("DAAM")
                assert other["n"] == 1 or (too_long and other["failed"] == 1), row["name"]
    assert "table.backbones=lab" in table["command"]


def test_a_row_of_the_lab_without_weights_is_not_run_and_says_which(shared):
    model = "extractor.backbone.path=lab:mamba"
    table = ("table=conceptattention/ablation_attention", "table.only=[neither]")
    shared.run(*table, "table.backbones=lab", "dataset.count=1", model)
    tables = (json.loads(path.read_text()) for path in (shared.folder / "runs" / "tables").glob("*/results.json"))
    (table,) = [table for table in tables if model in table["command"]]
    for row in table["blocks"][0]["rows"]:
        assert row["status"] == "not run" and row["values"]["quoted/miou"]
        assert row["needs"] == ["lab weights of mamba"] and row["command"] == "conceptseg-lab train mamba --ship"
