"""The fetch scripts against a small server on this machine that can break off."""

import hashlib
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from conceptseg.data.imagenet_segmentation import ImageNetSegmentation
from conceptseg.data.made import made_scenes, write_mat, write_voc_tar
from conceptseg.data.pascal_voc import PascalVOC

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from fetch_imagenet_segmentation import fetch_imagenet_segmentation  # noqa: E402
from fetch_resumable import FetchError, Interrupted, fetch  # noqa: E402
from fetch_voc import fetch_voc  # noqa: E402


class Server(ThreadingHTTPServer):
    """Hands out `content`; `cuts` are the bytes after which the coming answers break off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges, self.asked = b"", [], True, []
        self.url = f"http://127.0.0.1:{self.server_port}/file"

    def handle_error(self, request, client_address):  # a client that hangs up is no news
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, whole = self.server, self.server.content
        tag = f'"{hashlib.sha256(whole).hexdigest()[:8]}"'
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        server.asked.append(int(asked[1]) if asked else 0)
        if self.path != "/file":
            return self.send_error(404)
        start = int(asked[1]) if asked and server.ranges and self.headers.get("If-Range", tag) == tag else 0
        if start and start >= len(whole):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(whole)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(whole[start:][: server.cuts.pop(0) if server.cuts else None])


@pytest.fixture()
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def scenes():
    return made_scenes(2)


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def test_an_interrupted_transfer_goes_on_where_it_broke_off(server, tmp_path):
    server.content, server.cuts = bytes(range(256)) * 40, [3000]
    with pytest.raises(Interrupted, match=r"broke off at 3,000 .*Run the script again to go on"):
        fetch(server.url, tmp_path / "a", tries=1)
    assert not (tmp_path / "a").exists() and (tmp_path / "a.partial").stat().st_size == 3000
    fetch(server.url, tmp_path / "a", tries=1)
    assert (tmp_path / "a").read_bytes() == server.content and server.asked == [0, 3000]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_several_tries_are_made_in_one_call(server, tmp_path):
    server.content, server.cuts = bytes(range(256)) * 40, [100, 100, 100]
    fetch(server.url, tmp_path / "a", tries=4, pause_s=0)
    assert (tmp_path / "a").read_bytes() == server.content and server.asked == [0, 100, 200, 300]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.content, server.cuts, server.ranges = bytes(range(256)) * 40, [3000], False
    fetch(server.url, tmp_path / "a", tries=2, pause_s=0)
    assert (tmp_path / "a").read_bytes() == server.content


def test_a_file_that_changed_on_the_server_is_not_glued_to_the_old_part(server, tmp_path):
    server.content, server.cuts = b"old " * 1000, [1000]
    with pytest.raises(Interrupted):
        fetch(server.url, tmp_path / "a", tries=1)
    server.content = b"new " * 1000
    fetch(server.url, tmp_path / "a", tries=1)
    assert (tmp_path / "a").read_bytes() == server.content


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    server.content = b"x" * 1000
    (tmp_path / "a.partial").write_bytes(server.content)
    fetch(server.url, tmp_path / "a", tries=1)
    assert (tmp_path / "a").read_bytes() == server.content


def test_a_part_that_is_too_long_is_thrown_away(server, tmp_path):
    server.content = b"x" * 1000
    (tmp_path / "a.partial").write_bytes(b"y" * 2000)
    fetch(server.url, tmp_path / "a", tries=2, pause_s=0)
    assert (tmp_path / "a").read_bytes() == server.content


def test_an_address_without_a_file_is_named_at_once(server, tmp_path):
    with pytest.raises(FetchError, match=r"answered 404 .*\s+Give another address with --url"):
        fetch(server.url + "s", tmp_path / "a", tries=3, pause_s=0)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named(tmp_path):
    with pytest.raises(Interrupted, match="broke off at 0 bytes"):
        fetch("http://127.0.0.1:9/file", tmp_path / "a", tries=1)


def test_voc_is_fetched_checked_and_unpacked(server, tmp_path, scenes):
    server.content, server.cuts = write_voc_tar(tmp_path / "made.tar", scenes).read_bytes(), [5000]
    kit = fetch_voc(tmp_path / "data", server.url, md5(server.content), pause_s=0)
    assert PascalVOC(kit).problems() == [] and [path.name for path in (tmp_path / "data").iterdir()] == ["VOCdevkit"]
    assert fetch_voc(tmp_path / "data", server.url, md5(server.content)) == kit and server.asked == [0, 5000]


def test_voc_may_stay_in_its_tar(server, tmp_path, scenes):
    server.content = write_voc_tar(tmp_path / "made.tar", scenes).read_bytes()
    for _ in range(2):  # the second call finds it and checks it
        archive = fetch_voc(tmp_path, server.url, md5(server.content), keep_tar=True)
    assert archive.name == "VOCtrainval_11-May-2012.tar" and PascalVOC(archive).problems() == [] and len(server.asked) == 1


def test_voc_goes_beside_another_year(server, tmp_path, scenes):
    (tmp_path / "VOCdevkit" / "VOC2007").mkdir(parents=True)
    server.content = write_voc_tar(tmp_path / "made.tar", scenes).read_bytes()
    assert PascalVOC(fetch_voc(tmp_path, server.url, md5(server.content))).problems() == []


def test_a_wrong_checksum_keeps_the_file_under_another_name(server, tmp_path, scenes):
    server.content = write_voc_tar(tmp_path / "made.tar", scenes).read_bytes()
    with pytest.raises(FetchError, match=rf"has the MD5 {md5(server.content)}; 6cd6e144f989b92b3379bac3b3de84fd was wanted"):
        fetch_voc(tmp_path / "data", server.url)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["VOCtrainval_11-May-2012.tar.bad"]


def test_the_mat_file_is_fetched_and_its_checksum_recorded(server, tmp_path, scenes):
    server.content = write_mat(tmp_path / "made.mat", scenes).read_bytes()
    path = fetch_imagenet_segmentation(tmp_path / "data", server.url)
    record = tmp_path / "data" / "gtsegs_ijcv.mat.sha256"
    assert record.read_text() == f"{hashlib.sha256(server.content).hexdigest()}  gtsegs_ijcv.mat\n"
    assert ImageNetSegmentation(path).problems() == []
    assert fetch_imagenet_segmentation(tmp_path / "data", server.url) == path and len(server.asked) == 1


def test_a_mat_file_that_is_not_the_recorded_one_is_refused(server, tmp_path, scenes):
    server.content = write_mat(tmp_path / "made.mat", scenes).read_bytes()
    path = fetch_imagenet_segmentation(tmp_path / "data", server.url)
    write_mat(path, scenes[:1])
    with pytest.raises(FetchError, match=r"has the SHA-256 .*gtsegs_ijcv\.mat\.sha256\)\.\s+Delete it"):
        fetch_imagenet_segmentation(tmp_path / "data", server.url)
    with pytest.raises(FetchError, match=r"0000 was wanted \(--sha256\)"):
        fetch_imagenet_segmentation(tmp_path / "other", server.url, sha256="0000")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda whole: b"<html>moved</html>", "is not an HDF5 file"), (lambda whole: whole[:-900], "is cut short")],
)
def test_what_is_no_whole_hdf5_file_is_refused(server, tmp_path, scenes, spoil, said):
    server.content = spoil(write_mat(tmp_path / "made.mat", scenes).read_bytes())
    with pytest.raises(FetchError, match=said):
        fetch_imagenet_segmentation(tmp_path / "data", server.url)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["gtsegs_ijcv.mat.bad"]


@pytest.mark.parametrize("script", ["fetch_voc", "fetch_imagenet_segmentation"])
def test_a_script_ends_with_a_message_and_no_traceback(server, tmp_path, script):
    server.content = b"nothing of the kind"
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), "--to", str(tmp_path), "--url", server.url, "--tries", "1"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1 and f"{script}: " in ended.stderr and "Traceback" not in ended.stderr and ended.stdout == ""
