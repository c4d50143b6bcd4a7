"""conceptseg/store/run.py: a run folder that survives kills, full disks, and any number of processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptseg.errors import ResumeError, StoreError
from conceptseg.keys import run_id
from conceptseg.store.lines import line_of, sealed
from conceptseg.store.run import RunStore
from conceptseg.store.schema import SCHEMA, SOURCE_FORM, RowKey


def row(sample: str = "a", view: str = "map", segmenter: str = "mean", status: str = "ok", **more: Any) -> dict[str, Any]:
    known = {"sample": sample, "view": view, "segmenter": segmenter, "status": status, "seconds": 0.5}
    if status != "ok":
        return known | {"error": "why"} | more
    counts = {"classes": [0, 1], "inter": [4, 3], "pred": [5, 5], "label": [6, 4], "pred_void": [1, 0], "ap": {"foreground": 0.5}}
    return known | counts | {"words": ["dot"], "valid": 10, "correct": 7, "void": 1} | more


def other(sample: str = "a") -> dict[str, Any]:
    """Another row of that sample, which is as good as `row`'s."""
    return row(sample, inter=[5, 3], correct=8)


RUN = run_id({"what": "dots"})


@pytest.fixture
def tmp_path(tmp_path):
    """A folder that is named after its run, as a store asks for."""
    folder = tmp_path / RUN
    folder.mkdir()
    return folder


def manifest(**source: str) -> dict[str, Any]:
    return {
        "schema": SCHEMA, "run_id": RUN, "identity": {"what": "dots"}, "config": {}, "provenance": "control",
        "source": source or {"x.py": "1"}, "versions": {}, "machine": {}, "git": {},
    }  # fmt: skip


def store_in(folder: Path, shard: int = 0, count: int = 1) -> RunStore:
    store = RunStore(folder, shard, count)
    store.open(manifest())
    return store


def written(folder: Path, *rows: dict[str, Any], shard: int = 0, count: int = 1) -> Path:
    """Rows appended one by one; returns the shard's file."""
    with store_in(folder, shard, count) as store:
        for one in rows:
            store.append([one])
    return store.shard_file


def samples(folder: Path) -> list[str]:
    return sorted(key.sample for key in RunStore(folder).rows())


# ------------------------------------------------------------ appending and opening again


def test_rows_are_read_back_as_they_were_written(tmp_path):
    written(tmp_path, row("a"), row("b", status="failed"))
    found = RunStore(tmp_path).rows()
    assert found == {RowKey("a", "map", "mean"): row("a"), RowKey("b", "map", "mean"): row("b", status="failed")}


def test_opening_again_appends_and_leaves_old_bytes_alone(tmp_path):
    file = written(tmp_path, row("a"))
    before = file.read_bytes()
    written(tmp_path, row("b"))
    assert file.read_bytes().startswith(before) and samples(tmp_path) == ["a", "b"]


def test_a_row_that_is_held_is_not_written_twice(tmp_path):
    file = written(tmp_path, row("a"))
    before = file.read_bytes()
    written(tmp_path, row("a", seconds=9.0))
    assert file.read_bytes() == before


def test_a_row_is_seen_by_the_store_that_wrote_it(tmp_path):
    with store_in(tmp_path) as store:
        store.append([row("a")])
        assert store.missing("a", ["map"], ["mean"]) == []


def test_every_line_of_a_shard_is_one_json_object(tmp_path):
    lines = written(tmp_path, row("a"), row("naïve\nname")).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["sample"] for line in lines] == ["a", "naïve\nname"]


def test_appending_needs_the_store_to_be_entered(tmp_path):
    with pytest.raises(StoreError, match="entered"):
        store_in(tmp_path).append([row()])


def test_a_value_that_json_lacks_is_refused_and_nothing_is_written(tmp_path):
    with store_in(tmp_path) as store, pytest.raises(ValueError):
        store.append([row("a"), row("b", correct=float("nan"))])
    assert store.shard_file.read_bytes() == b""


# ------------------------------------------------------------ torn lines


def test_a_torn_last_line_is_ignored_by_readers(tmp_path):
    file = written(tmp_path, row("a"), row("b"))
    file.write_bytes(file.read_bytes()[:-5])
    before = file.read_bytes()
    assert samples(tmp_path) == ["a"] and file.read_bytes() == before


def test_a_torn_last_line_is_cut_when_its_shard_opens_the_file(tmp_path):
    file = written(tmp_path, row("a"), row("b"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    written(tmp_path, row("b"))
    assert file.read_bytes() == whole


def test_a_torn_line_longer_than_a_block_is_cut_whole(tmp_path):
    file = written(tmp_path, row("a"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"sample": "' + b"x" * 200_000)
    written(tmp_path)
    assert file.read_bytes() == whole


def test_another_shard_does_not_cut_a_torn_line(tmp_path):
    file = written(tmp_path, row("a"), shard=0, count=2)
    file.write_bytes(file.read_bytes() + b'{"sam')
    written(tmp_path, row("b"), shard=1, count=2)
    assert file.read_bytes().endswith(b'{"sam') and samples(tmp_path) == ["a", "b"]


NAMES = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True)


@settings(max_examples=60, deadline=None)
@given(NAMES, st.data())
def test_cutting_the_file_anywhere_in_its_last_row_loses_at_most_that_row(names, data):
    with tempfile.TemporaryDirectory() as outside:
        folder = f"{outside}/{RUN}"
        file = written(Path(folder), *map(row, names))
        whole = file.read_bytes()
        start = whole.rfind(b"\n", 0, -1) + 1
        file.write_bytes(whole[: data.draw(st.integers(start, len(whole)))])
        kept = names if file.read_bytes() == whole else names[:-1]
        assert samples(Path(folder)) == sorted(kept)
        written(Path(folder), *map(row, names))
        assert file.read_bytes() == whole


@settings(max_examples=60, deadline=None)
@given(NAMES, st.data())
def test_cutting_the_file_at_any_byte_keeps_every_row_before_the_cut(names, data):
    with tempfile.TemporaryDirectory() as outside:
        folder = f"{outside}/{RUN}"
        file = written(Path(folder), *map(row, names))
        whole = file.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        file.write_bytes(whole[:cut])
        assert samples(Path(folder)) == sorted(names[: whole[:cut].count(b"\n")])


# ------------------------------------------------------------ several processes

HOLD = """
import sys
from pathlib import Path
from conceptseg.store.run import RunStore
with RunStore(Path(sys.argv[1]), 0, 1):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_share_a_shard(tmp_path):
    store = store_in(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreError, match=r"runtime\.shard_index"), store:
            pass
        other.stdin.close()
    with store:
        store.append([row()])
    assert samples(tmp_path) == ["a"]


def test_a_killed_process_leaves_no_lock(tmp_path):
    store = store_in(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "held\n"
        other.kill()
    with store:
        store.append([row()])
    assert samples(tmp_path) == ["a"]


def test_two_shards_can_be_written_at_the_same_time(tmp_path):
    with store_in(tmp_path, 0, 2) as one, store_in(tmp_path, 1, 2) as other:
        one.append([row("a")])
        other.append([row("b")])
    assert samples(tmp_path) == ["a", "b"]


def test_rows_are_the_union_over_shards_of_any_count(tmp_path):
    written(tmp_path, row("a"))
    written(tmp_path, row("b"), shard=2, count=3)
    written(tmp_path, row("c"), shard=0, count=2)
    assert samples(tmp_path) == ["a", "b", "c"]


def test_a_row_of_another_shard_is_not_computed_again(tmp_path):
    written(tmp_path, row("a"), shard=1, count=2)
    assert RunStore(tmp_path, 0, 3).missing("a", ["map"], ["mean"]) == []


def test_rows_of_other_processes_are_seen_after_a_refresh(tmp_path):
    reader = store_in(tmp_path)
    assert not reader.rows()
    written(tmp_path, row("a"), shard=1, count=2)
    reader.refresh()
    assert len(reader.rows()) == 1


def test_the_same_row_from_two_shards_is_no_contradiction_whatever_its_time(tmp_path):
    written(tmp_path, row("a", seconds=1.0), shard=0, count=2)
    (tmp_path / "rows-1of2.jsonl").write_bytes(line_of(sealed(row("a", seconds=2.0), RUN)))
    assert samples(tmp_path) == ["a"]


def test_rows_that_contradict_each_other_are_refused_with_file_and_sample(tmp_path):
    written(tmp_path, row("scene-7"), shard=0, count=2)
    (tmp_path / "rows-1of2.jsonl").write_bytes(line_of(sealed(other("scene-7"), RUN)))
    with pytest.raises(StoreError, match=r"rows-1of2\.jsonl(.|\n)*scene-7(.|\n)*contradicts"):
        RunStore(tmp_path).rows()


# ------------------------------------------------------------ what is missing


def test_missing_names_the_views_that_lack_a_segmenter(tmp_path):
    written(tmp_path, row(view="v1", segmenter="s1"), row(view="v1", segmenter="s2"), row(view="v2", segmenter="s1"))
    assert RunStore(tmp_path).missing("a", ["v1", "v2", "v3"], ["s1", "s2"]) == ["v2", "v3"]


def test_nothing_is_missing_of_an_excluded_sample(tmp_path):
    written(tmp_path, row(view="*", segmenter="*", status="excluded"))
    store = RunStore(tmp_path)
    assert store.missing("a", ["v"], ["s"]) == store.missing("a", ["v"], ["s"], retry_failed=True) == []


@pytest.mark.parametrize("place", ["*", "map"])
def test_a_failed_sample_is_missing_only_when_it_is_to_be_tried_again(tmp_path, place):
    written(tmp_path, row(view=place, segmenter="*" if place == "*" else "mean", status="failed"))
    store = RunStore(tmp_path)
    assert store.missing("a", ["map"], ["mean"]) == []
    assert store.missing("a", ["map"], ["mean"], retry_failed=True) == ["map"]


def test_a_good_row_supersedes_a_failed_one_and_both_stay_in_the_file(tmp_path):
    file = written(tmp_path, row("a", status="failed"), row("a"))
    assert RunStore(tmp_path).rows()[RowKey("a", "map", "mean")]["status"] == "ok"
    assert file.read_bytes().count(b"\n") == 2


def test_a_failed_row_never_supersedes_a_good_one(tmp_path):
    file = written(tmp_path, row("a"), row("a", status="failed"))
    assert RunStore(tmp_path).rows()[RowKey("a", "map", "mean")]["status"] == "ok"
    assert file.read_bytes().count(b"\n") == 1


def test_a_sample_that_succeeds_on_retry_is_settled_for_good(tmp_path):
    """It failed as a whole ("*"), then each view went well: retrying again finds nothing to do."""
    written(tmp_path, row(view="*", segmenter="*", status="failed"), row())
    assert RunStore(tmp_path).missing("a", ["map"], ["mean"], retry_failed=True) == []


def test_a_sample_that_succeeded_on_retry_lacks_a_view_that_is_asked_for_later(tmp_path):
    """Its old failure as a whole must not hide that the new view was never computed."""
    written(tmp_path, row(view="*", segmenter="*", status="failed"), row())
    assert RunStore(tmp_path).missing("a", ["map", "new"], ["mean"]) == ["new"]


# ------------------------------------------------------------ disks


def half_a_write(monkeypatch, code: int, after: int = 10) -> None:
    """os.write puts `after` bytes into the file once, then fails, as a disk does that fills up."""
    real, calls = os.write, []

    def write(file: int, block: bytes) -> int:
        calls.append(file)
        if len(calls) == 1:
            return real(file, block[:after])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", write)


def test_a_full_disk_leaves_no_half_written_row(tmp_path, monkeypatch):
    file = written(tmp_path, row("a"))
    before = file.read_bytes()
    with store_in(tmp_path) as store:
        half_a_write(monkeypatch, errno.ENOSPC)
        with pytest.raises(StoreError):
            store.append([row("b"), row("c")])
    assert file.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_is_safe_and_what_to_do(tmp_path, monkeypatch, code):
    with store_in(tmp_path) as store:
        half_a_write(monkeypatch, code)
        with pytest.raises(StoreError, match=r"disk is full(.|\n)*kept(.|\n)*runtime\.runs(.|\n)*goes on from here"):
            store.append([row("b")])


def test_the_store_goes_on_when_space_is_freed(tmp_path, monkeypatch):
    with store_in(tmp_path) as store:
        with monkeypatch.context() as patch:
            half_a_write(patch, errno.ENOSPC)
            with pytest.raises(StoreError):
                store.append([row("a")])
        assert store.missing("a", ["map"], ["mean"]) == ["map"]
        store.append([row("a")])
    assert samples(tmp_path) == ["a"]


def test_a_failing_fsync_is_a_failed_append(tmp_path, monkeypatch):
    with store_in(tmp_path) as store:
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(StoreError, match="Input/output error"):
            store.append([row("a")])
    assert store.shard_file.read_bytes() == b""


def test_a_run_folder_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"runtime\.runs"):
        store_in(tmp_path / "file" / "run")


# ------------------------------------------------------------ manifest


def test_the_same_source_is_accepted_without_a_word(tmp_path):
    store_in(tmp_path).open(manifest())


def test_changed_source_is_refused_with_the_file_and_the_ways_on(tmp_path):
    store = store_in(tmp_path)
    with pytest.raises(ResumeError, match=r"x\.py changed(.|\n)*on_code_change=accept(.|\n)*=fork"):
        store.open(manifest(**{"x.py": "2"}))


@pytest.mark.parametrize("source", [{"x.py": "1", "y.py": "1"}, {"y.py": "1"}])
def test_a_new_or_removed_source_file_is_a_change(tmp_path, source):
    with pytest.raises(ResumeError, match=r"y\.py"):
        store_in(tmp_path).open(manifest(**source))


def test_a_folder_of_an_earlier_form_is_read_and_not_gone_on_with(tmp_path):
    store = store_in(tmp_path)
    with pytest.raises(ResumeError, match=r"recorded its code in another form(.|\n)*=accept(.|\n)*=fork"):
        store.open({**manifest(), "source_form": SOURCE_FORM})
    assert store.manifest()["source"] == {"x.py": "1"} and store.rows() == {}
    store.open({**manifest(), "source_form": SOURCE_FORM}, "accept")
    store.open({**manifest(), "source_form": SOURCE_FORM})


def test_a_refused_change_leaves_the_manifest_alone(tmp_path):
    store = store_in(tmp_path)
    with pytest.raises(ResumeError):
        store.open(manifest(**{"x.py": "2"}))
    assert store.manifest()["source"] == {"x.py": "1"}


def test_an_accepted_change_is_written_down(tmp_path):
    store = store_in(tmp_path)
    store.open(manifest(**{"x.py": "2"}), "accept")
    assert store.manifest()["source"] == {"x.py": "2"}


def test_another_schema_is_refused(tmp_path):
    store = store_in(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest() | {"schema": SCHEMA + 1}))
    with pytest.raises(ResumeError, match="schema"):
        store.open(manifest())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_a_resume_error(tmp_path, text):
    store = store_in(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ResumeError):
        store.open(manifest())


def test_no_partial_manifest_is_left_behind(tmp_path):
    store_in(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


# ------------------------------------------------------------ compacting


def test_compacting_sorts_by_key_and_keeps_the_shards(tmp_path):
    import pyarrow.parquet as pq

    file = written(tmp_path, row("b"), row("a"))
    before = file.read_bytes()
    path = RunStore(tmp_path).compact()
    assert [r["sample"] for r in pq.read_table(path).to_pylist()] == ["a", "b"]
    assert file.read_bytes() == before


def test_compacting_twice_changes_nothing(tmp_path):
    written(tmp_path, row("b"), row("a", status="failed"))
    store = RunStore(tmp_path)
    first = store.compact().read_bytes()
    assert store.compact().read_bytes() == first


def test_compacting_holds_a_failed_row_beside_good_ones(tmp_path):
    """The first row lacks the counts; they must not be dropped from the others."""
    import pyarrow.parquet as pq

    written(tmp_path, row("a", status="failed"), row("b"))
    rows = pq.read_table(RunStore(tmp_path).compact()).to_pylist()
    assert [r["error"] for r in rows] == ["why", None] and rows[1].get("correct") == 7


def test_compacting_leaves_no_partial_file(tmp_path):
    written(tmp_path, row("a"))
    RunStore(tmp_path).compact()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "rows-0of1.jsonl", "rows.parquet"]
