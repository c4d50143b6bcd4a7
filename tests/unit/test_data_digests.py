"""Digests of contents: any change is seen, and nothing that has not changed is read twice."""

import os
import time

import pytest

from conceptseg.data import digests
from conceptseg.data.digests import Extent, content_digests, kept_digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, which keeps small files too, and takes a change for settled after 20 ms."""
    monkeypatch.setenv("CONCEPTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH_KEEPING", 0)
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 0.02)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read."""
    names, plain = [], digests._digest
    monkeypatch.setattr(digests, "_digest", lambda extent: (names.append(extent.path.name), plain(extent))[1])
    return names


def write(path, content):
    path.write_bytes(content)
    time.sleep(0.05)
    return path


def test_contents_are_read_once_and_again_when_they_have_changed(tmp_path, read):
    files = [write(tmp_path / name, name.encode()) for name in "abc"]
    extents = [Extent(path) for path in files]
    first = content_digests(extents, tmp_path)
    assert content_digests(extents, tmp_path) == first and sorted(read) == ["a", "b", "c"] and len(set(first)) == 3
    write(files[1], b"B")
    second = content_digests(extents, tmp_path)
    assert read[3:] == ["b"] and second[1] != first[1] and second[::2] == first[::2]


@pytest.mark.parametrize(
    "how", ["in place", "in place, old times set again", "another file, old times", "a link to another file"]
)
def test_a_change_of_the_same_size_is_seen_however_it_is_made(tmp_path, how):
    path = write(tmp_path / "a", b"old")
    (before,) = content_digests([Extent(path)], tmp_path)
    old = path.stat()
    if how.startswith("in place"):
        with path.open("r+b") as file:
            file.write(b"new")
    elif how.startswith("another"):
        write(tmp_path / "b", b"new")
        (tmp_path / "b").replace(path)
    else:
        path.unlink()
        path.symlink_to(write(tmp_path / "b", b"new"))
    if "old times" in how:
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
        assert path.stat().st_mtime_ns == old.st_mtime_ns
    (after,) = content_digests([Extent(path)], tmp_path)
    assert after != before and path.stat().st_size == old.st_size


def test_what_was_written_just_now_is_not_kept(tmp_path, monkeypatch, read):
    """A clock that is too coarse gives a second change the same time."""
    monkeypatch.setattr(digests, "SETTLED_SECONDS", 60)
    path = write(tmp_path / "a", b"a")
    assert content_digests([Extent(path)], tmp_path) == content_digests([Extent(path)], tmp_path) and read == ["a", "a"]


def test_a_damaged_cache_is_read_past_and_one_that_cant_be_written_costs_time_alone(tmp_path, cache, read):
    path = write(tmp_path / "a", b"a")
    first = content_digests([Extent(path)], tmp_path)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes().replace(first[0][:8].encode(), b"00000000"))
    assert content_digests([Extent(path)], tmp_path) == first and read == ["a", "a"]
    kept.unlink()
    kept.mkdir()
    assert content_digests([Extent(path)], tmp_path) == first


def test_parts_of_a_file_are_what_the_same_bytes_are_in_files_of_their_own(tmp_path):
    whole = write(tmp_path / "a", b"0123456789")
    alone = write(tmp_path / "b", b"345")
    assert content_digests([Extent(whole, 3, 3)], tmp_path) == content_digests([Extent(alone)], tmp_path)


def test_what_is_no_file_has_a_mark_and_stops_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    names = ("none", "pipe", ".", "pipe/below")
    assert content_digests([Extent(tmp_path / name) for name in names], tmp_path) == [
        "absent",
        "unreadable",
        "unreadable",
        "absent",
    ]


def test_a_digest_of_several_files_is_computed_again_when_one_has_changed(tmp_path):
    files, calls = [write(tmp_path / name, b"x") for name in "ab"], []
    for _ in range(2):
        assert kept_digest("rows", files, lambda: calls.append(1) or "d", tmp_path) == "d"
    assert len(calls) == 1
    assert kept_digest("columns", files, lambda: "other", tmp_path) == "other"
    write(files[1], b"y")
    assert kept_digest("rows", files, lambda: "new", tmp_path) == "new"
    assert kept_digest("rows", [], lambda: "of memory", tmp_path) == "of memory"


def test_small_sets_leave_no_file_behind(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(digests, "WORTH_KEEPING", 1 << 26)
    content_digests([Extent(write(tmp_path / "a", b"a"))], tmp_path)
    assert not cache.exists()
