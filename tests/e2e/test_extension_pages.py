"""docs/add_a_*.md as a stranger follows them: files written as given, commands run as given, in an empty folder.

Packages are installed by pip into a folder beside the libraries. No PYTHONPATH leads to the checkout, and only `python` has the
current folder on its path. pip gets flags that keep it offline. Commands are forked from the warm parent of this folder's tests.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from commands import TESTS, Commands, as_python

DOCS = TESTS.parent / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
BEFORE = """
import os, site, sys
os.environ.pop("PYTHONPATH", None)
sys.path[:] = [place for place in sys.path if place not in ({tests!r}, {cwd!r})]
site.addsitedir({site!r})
"""
WITH_FOLDER = "sys.path.insert(0, {cwd!r})\n"


class Follower:
    """Carries out a page in a folder of its own; `said` is what each command printed."""

    def __init__(self, page, shared: Commands, tmp_path_factory):
        self.folder, self.said = tmp_path_factory.mktemp(page), {}
        self.site = tmp_path_factory.mktemp("site")
        self.commands = Commands(shared.warm, self.folder, shared.environment)
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8").partition("\n## In the repository")[0]
        for kind, title, body in BLOCK.findall(text):
            if title and "/" not in title.partition(" ")[2]:
                path = self.folder / title
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body, encoding="utf-8")
            elif kind == "sh":
                for line in body.splitlines():
                    self.said[line] = self.carry_out(line)

    def carry_out(self, line, code=0):
        words = shlex.split(line)
        if words[0] == "pip":
            assert words[:2] == ["pip", "install"]
            command = [sys.executable, "-m", *words, *OFFLINE, "--target", str(self.site)]
            ended = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=120)
            assert ended.returncode == 0, ended.stderr
            return ended.stdout
        here = {"cwd": str(self.folder), "site": str(self.site), "tests": str(TESTS / "e2e")}
        before = BEFORE.format(**here)
        name = words[0]
        if name == "python":
            before += WITH_FOLDER.format(**here)
            if words[1] == "-m":
                name, words = words[2], words[2:]
            else:
                before += as_python(words[1])
        ended = self.commands.start(*words[1:], name=name, before=before).wait()
        assert ended.code == code, f"{line}\n{ended.out}\n{ended.err}"
        return ended.said

    def answer(self, start):
        """Return the output of the one command that starts so."""
        (found,) = [said for line, said in self.said.items() if line.startswith(start)]
        return found


@pytest.fixture(scope="module")
def follow(shared, tmp_path_factory):
    return lambda page: Follower(page, shared, tmp_path_factory)


def test_methods_with_and_without_a_network(follow):
    page = follow("add_a_method")
    assert "Bright" in page.answer("conceptseg extractor=bright")
    assert "ValueText" in page.answer("conceptseg extractor=value_text")


def test_a_backbone(follow):
    page = follow("add_a_backbone")
    said = page.answer("conceptseg extractor=feature_energy")
    assert "FeatureEnergy" in said and "random" in said


def test_a_data_set(follow):
    page = follow("add_a_dataset")
    assert "pets: 6 samples, nothing missing" in page.answer("conceptseg-doctor")
    assert "pets, 6 samples" in page.answer("conceptseg dataset=pets")
    (page.folder / "data/pets/images/Abyssinian_3.jpg").unlink()
    said = page.carry_out("conceptseg-doctor dataset=pets", code=1)
    assert "1 of the 6 files" in said and "(Abyssinian_3.jpg): unpack images.tar.gz" in said


def test_a_protocol(follow):
    page = follow("add_a_protocol")
    assert "scenes_otsu v1" in page.answer("conceptseg protocol=scenes_otsu")
    rule = page.answer("python -m conceptseg")
    assert "scenes_large v1" in rule
    rows = [line for file in page.folder.glob("runs/*/rows-*.jsonl") for line in file.read_text().splitlines()]
    assert any("its object covers" in line for line in rows)


def test_metrics_from_counts_and_from_maps(follow):
    page = follow("add_a_metric")
    counts, maps = (said for line, said in page.said.items() if line.startswith("conceptseg"))
    assert "Dice" in counts and "Dice" in maps and "peak distance" in maps
    assert re.search(r"dice 0\.\d+ over [1-9]\d* images", page.answer("python"))
    refused = page.carry_out("conceptseg extractor=constant dataset=scenes 'report.columns=[peak_distance]'", code=1)
    assert "Set protocol.measures=[peak_distance]" in refused
