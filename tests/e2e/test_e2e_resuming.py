"""A run that is stopped, killed, shared out or widened ends with the rows of one that was not."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
from commands import FAST, lines_of, rows_of, table_of, until
from composing import plainly

from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import assemble, shard_of

LAB = ("backbone@extractor.backbone=lab_flux", "dataset.count=4", "runtime.batch_size=2", "runtime.keep_maps=false")
LONG = ("extractor=random", "dataset.count=40", "runtime.batch_size=1", "runtime.keep_maps=false")
SMALL = ("extractor=random", "dataset.count=11", "runtime.batch_size=2", "runtime.keep_maps=false")
CONTROL = ("extractor=centre_prior", "dataset.count=6")
SLOWLY = """
import time
from conceptseg.extractors.controls import RandomMap
sound = RandomMap.saliency
RandomMap.saliency = lambda self, batch: (time.sleep({seconds}), sound(self, batch))[1]
"""
"""For a command to be met in the midst of its images, on a slow and busy machine too: it waits before each."""


# ------------------------------------------------------------ again


@pytest.fixture(scope="module")
def cold(shared, refused_sockets):
    """A first run, from `python -m` in a fresh process; there the loaders are not even told to stay offline."""
    refused_sockets.unlink(missing_ok=True)
    online = {name: "0" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    return shared.run_cold("-m", "conceptseg", *FAST, *LAB, "runtime.runs=cold", env=online)


def test_a_lab_run_opens_no_connection(cold, refused_sockets):
    assert not refused_sockets.exists(), refused_sockets.read_text()


def test_a_second_run_computes_nothing_and_prints_the_same_table(shared, cold):
    before = {p: p.read_bytes() for p in shared.the_run("cold").glob("rows-*")}
    again = shared.run(*LAB, "runtime.runs=cold")
    assert "4 samples computed, 0 held" in cold.said and "0 samples computed, 4 held" in again.said
    assert table_of(cold) == table_of(again)
    assert before == {p: p.read_bytes() for p in shared.the_run("cold").glob("rows-*")}


def test_two_processes_from_nothing_and_from_a_warm_parent_write_the_same_rows(shared, cold):
    shared.run(*LAB, "runtime.runs=forked")
    assert shared.rows("cold") == shared.rows("forked")


def test_more_scenes_are_added_to_the_same_run_and_fewer_are_summed_up_from_its_rows(commands):
    commands.run("extractor=random", "dataset.count=4")
    before = lines_of(commands.the_run())
    more = commands.run("extractor=random", "dataset.count=6", "runtime.batch_size=2")
    assert "2 samples computed" in more.said and lines_of(commands.the_run())[:4] == before
    fewer = commands.run("extractor=random", "dataset.count=4")
    assert "0 samples computed" in fewer.said
    (reading,) = json.loads((commands.the_run() / "readings.json").read_text())["readings"]
    assert reading["n"] == 4


def run_of(tmp_path, *overrides):
    """Return the folder that a command with these settings writes to."""
    one = ("extractor=centre_prior", "dataset.count=2", "protocol=scenes_single", "dataset.objects=[1,1]")
    return assemble(plainly(*one, f"runtime.runs={tmp_path}", *overrides)).store.folder


def test_settings_of_how_a_run_is_done_do_not_name_another_run(tmp_path):
    how = ("runtime.batch_size=3", "runtime.threads=1", "report.level=0.9", "dataset.count=1")
    assert run_of(tmp_path, *how) == run_of(tmp_path)


@pytest.mark.parametrize("change", ["dataset.seed=1", "extractor.sigma=0.3", "protocol=scenes_multi", "dataset.split=unseen"])
def test_settings_of_what_is_run_name_another_run(tmp_path, change):
    assert run_of(tmp_path, change) != run_of(tmp_path)


# ------------------------------------------------------------ killed


@pytest.fixture(scope="module")
def uninterrupted(shared):
    shared.run(*LONG)
    return rows_of(shared.the_run())


def test_a_run_that_is_killed_again_and_again_ends_with_the_rows_of_one_that_was_not(commands, uninterrupted):
    rng = random.Random(0)
    for goal in sorted(rng.sample(range(1, 34), 4)):
        started = commands.start(*LONG, before=SLOWLY.format(seconds=0.06))
        until(lambda goal=goal: bool(commands.runs()) and len(lines_of(commands.the_run())) >= goal, started)
        time.sleep(rng.uniform(0, 0.03))
        started.kill()
        assert started.wait().code == -9
    held = len(lines_of(commands.the_run()))
    assert 0 < held < 40
    said = commands.run(*LONG)
    assert f"{40 - held} samples computed, {held} held" in said.said
    assert commands.rows() == uninterrupted


def test_a_run_that_is_killed_inside_a_line_ends_with_the_same_rows(commands):
    """A store's own tests cut its file at any byte; here what is lost is computed again."""
    args = ("extractor=random", "dataset.count=3", "runtime.batch_size=1")
    commands.run(*args)
    whole = commands.rows()
    (file,) = commands.the_run().glob("rows-*")
    text = file.read_bytes()
    file.write_bytes(text[: text.index(b"\n") + 9])
    assert "2 samples computed, 1 held" in commands.run(*args).said
    assert commands.rows() == whole


def test_a_run_whose_manifest_was_never_written_starts_anew(commands):
    """Killed between making the folder and writing the manifest."""
    commands.run("extractor=random", "dataset.count=2")
    whole, run = commands.rows(), commands.the_run()
    for path in run.iterdir():
        if path.is_file():
            path.unlink()
    (run / ".manifest-1234").write_text("{")
    commands.run("extractor=random", "dataset.count=2")
    assert commands.rows() == whole


# ------------------------------------------------------------ shared out


@pytest.fixture(scope="module")
def alone(shared):
    shared.run(*SMALL, "runtime.runs=alone")
    return rows_of(shared.the_run("alone"))


def shards(commands, indices, count):
    started = [commands.start(*SMALL, f"runtime.shard_index={i}", f"runtime.shard_count={count}") for i in indices]
    for one in started:
        assert one.wait().code == 0, one.wait().err


def test_three_shards_at_the_same_time_give_the_rows_of_one(commands, alone):
    shards(commands, range(3), 3)
    assert commands.rows() == alone
    assert sorted(p.name for p in commands.the_run().glob("rows-*")) == [f"rows-{i}of3.jsonl" for i in range(3)]


def test_the_ranks_of_torchrun_share_the_work(commands, alone):
    started = [commands.start(*SMALL, env={"RANK": str(i), "WORLD_SIZE": "2", "LOCAL_RANK": str(i)}) for i in range(2)]
    for one in started:
        assert one.wait().code == 0, one.wait().err
    assert commands.rows() == alone
    assert {p.name for p in commands.the_run().glob("rows-*")} == {"rows-0of2.jsonl", "rows-1of2.jsonl"}


@pytest.fixture(scope="module")
def in_turn(shared):
    """Three shards that ran one after the other, and their words; there are two batches, so that the last shard is idle."""
    args = ("extractor=centre_prior", "dataset.count=4", "runtime.batch_size=2", "runtime.shard_count=3", "runtime.runs=turns")
    return {index: shared.run(*args, f"runtime.shard_index={index}") for index in (0, 2, 1)}


def test_only_the_first_shard_prints_a_table(in_turn):
    assert "centre" in " ".join(table_of(in_turn[0])).lower()
    assert table_of(in_turn[1]) == table_of(in_turn[2]) == []


def test_a_first_shard_that_is_done_first_says_what_is_not_computed_yet(in_turn):
    assert "2 samples are not computed yet" in in_turn[0].said


def test_more_shards_than_batches_is_no_error_for_the_idle_one(shared, in_turn):
    assert "0 samples computed" in in_turn[2].said and len(shared.rows("turns")) == 4


@pytest.mark.parametrize(("index", "count"), [(3, 3), (0, 0)])
def test_a_shard_outside_the_count_is_refused_by_its_key(index, count):
    with pytest.raises(ConfigError, match=r"runtime\.shard_"):
        shard_of({"shard_index": index, "shard_count": count, "batch_size": 1})


def test_two_processes_with_the_same_shard_are_told_so(commands):
    first = commands.start(*LONG, before=SLOWLY.format(seconds=1))
    until(lambda: bool(commands.runs()) and bool(lines_of(commands.the_run())), first)
    said = commands.run(*LONG, code=1)
    assert "another process" in said.err and "runtime.shard_index" in said.err
    first.kill()


# ------------------------------------------------------------ widened


def test_a_wider_list_of_layers_adds_only_the_rows_that_are_missing(commands):
    """And those that are added are what one wide run writes."""
    sweep = ("backbone@extractor.backbone=lab_flux", "views=sweep/layers", "dataset.count=2", "report.columns=[accuracy]")
    commands.run(*sweep, "views.layer.layers=1-2")
    (file,) = commands.the_run().glob("rows-*")
    before = file.read_bytes()
    assert before.count(b"\n") == 2 * 2 * 3  # scenes, layers, spaces
    commands.run(*sweep, "views.layer.layers=0-3")
    after = file.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 2 * 4 * 3
    assert commands.run(*sweep, "views.layer.layers=0-1").said.count("2 held already") == 1
    assert file.read_bytes() == after
    commands.run(*sweep, "views.layer.layers=all", "runtime.runs=wide")
    assert commands.rows() == commands.rows("wide")


def test_another_segmenter_adds_rows_to_the_same_run(commands):
    commands.run("extractor=colour_contrast", "dataset.count=4")
    more = "{_target_: conceptseg.segment.segmenter.Segmenter, decision: argmax, cut: grid, enlarge: nearest}"
    before = lines_of(commands.the_run())
    one = "{_target_: conceptseg.segment.segmenter.Segmenter, decision: argmax, cut: mask, enlarge: bilinear}"
    commands.run("extractor=colour_contrast", "dataset.count=4", f"protocol.segmenters=[{one},{more}]")
    assert lines_of(commands.the_run())[:4] == before and len(commands.rows()) == 8


# ------------------------------------------------------------ changed source


@pytest.fixture(scope="module")
def finished(shared):
    shared.run(*CONTROL, "runtime.runs=finished")
    return shared.folder / "finished"


@pytest.fixture
def written_by_other_code(commands, finished):
    """A finished run whose manifest says that protocols.py was another file then."""
    shutil.copytree(finished, commands.folder / "runs")
    path = commands.the_run() / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["protocols.py"] = "0" * 12
    path.write_text(json.dumps(manifest))
    return commands


def test_a_run_of_other_code_is_refused_with_the_file_and_the_ways_on(written_by_other_code):
    said = written_by_other_code.run(*CONTROL, "dataset.count=8", code=1)
    assert said.err.startswith("ResumeError: ") and "protocols.py changed" in said.err
    assert "runtime.on_code_change=accept" in said.err and "fork" in said.err and "Traceback" not in said.err
    assert len(written_by_other_code.rows()) == 6


def test_a_run_of_other_code_goes_on_where_that_is_accepted_and_is_not_asked_about_again(written_by_other_code):
    before = lines_of(written_by_other_code.the_run())
    written_by_other_code.run(*CONTROL, "dataset.count=8", "runtime.on_code_change=accept")
    after = lines_of(written_by_other_code.the_run())
    assert after[:6] == before and len(after) == 8
    written_by_other_code.run(*CONTROL, "dataset.count=8")


def test_a_run_of_other_code_is_forked_into_a_folder_beside_it(written_by_other_code):
    old = written_by_other_code.the_run()
    before = {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    written_by_other_code.run(*CONTROL, "runtime.on_code_change=fork")
    assert before == {p: p.read_bytes() for p in old.rglob("*") if p.is_file()}
    (new,) = set(written_by_other_code.runs()) - {old}
    assert rows_of(new) == rows_of(old) and new.name.startswith(old.name)


def test_an_unknown_answer_to_changed_code_is_refused_with_the_nearest(commands):
    said = commands.run(*CONTROL, "runtime.on_code_change=acept", code=1)
    assert 'Did you mean "accept"?' in said.err
