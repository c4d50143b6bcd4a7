"""conceptseg-compare on run folders written by hand: what is compared, what is refused, what is printed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from conceptseg import keys
from conceptseg.cli import compare as command
from conceptseg.errors import ConfigError
from conceptseg.metrics.definitions import DEFINITIONS
from conceptseg.store.cost import measured, read_cost
from conceptseg.store.run import RunStore
from conceptseg.tables.compared import check_comparable, cuts, read, same_but_for_seeds


def manifest(run_id, seed, protocol="single"):
    identity = {
        "method": {"class": "X", "version": 1, "settings": {"sigma": 1.0, "seed": seed}},
        "dataset": {"name": "scenes", "fingerprint": "f"}, "protocol": {"name": protocol, "version": 1},
    }  # fmt: skip
    return {
        "schema": 1, "run_id": run_id, "identity": identity, "config": {}, "provenance": "lab", "source": {}, "versions": {},
        "machine": {}, "git": {},
    }  # fmt: skip


def rows(view, segmenter, right, n=12):
    generator = np.random.default_rng(int(100 * right))
    for i in range(n):
        hits, rejections = int(generator.binomial(30, right)), int(generator.binomial(70, right))
        yield {
            "sample": f"s/{i:02d}", "view": view, "segmenter": segmenter, "status": "ok", "words": ["cat" if i % 2 else "dog"],
            "classes": [0, 1], "inter": [rejections, hits], "label": [70, 30],
            "pred": [rejections + 30 - hits, hits + 70 - rejections], "pred_void": [0, 0], "valid": 100, "void": 0,
            "correct": hits + rejections, "ap": {"foreground": hits / 30}, "seconds": 0.5,
        }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """a and b differ in method, b and c only in the seed; d has another protocol; a has two views and three cuts."""
    for name, seed, right, protocol in (
        ("a", 0, 0.6, "single"),
        ("b", 0, 0.8, "single"),
        ("c", 1, 0.81, "single"),
        ("d", 0, 0.5, "multi"),
    ):
        whole = manifest(name, seed, protocol)
        whole["identity"]["method"]["class"] = "Weak" if name == "a" else "Strong"
        whole["run_id"] = keys.run_id(whole["identity"])
        store = RunStore(tmp_path / "named by digest" / whole["run_id"])
        store.open(whole)
        (tmp_path / name).symlink_to(store.folder)
        with store:
            store.append(rows("v", "mean@mask/bilinear", right))
            if name == "a":
                store.append(rows("w", "mean@mask/bilinear", 0.7))
                store.append(rows("v", "quantile0.5@mask/bilinear", 0.65))
    return tmp_path


def test_one_of_several_views_has_to_be_named_and_its_other_cuts_are_told(runs):
    with pytest.raises(ConfigError, match=r"2 views(.|\n)*--view(.|\n)*a::v\n  a::w"):
        read("a", runs)
    assert (read("a", runs, "v").segmenter, read("a::v", runs).others) == ("mean@mask/bilinear", ("quantile0.5@mask/bilinear",))
    assert read("a::w", runs).view == "w" and read("a::w", runs).name == "a::w"
    assert list(cuts("a::v", runs)) == ["mean@mask/bilinear", "quantile0.5@mask/bilinear"]


@pytest.mark.parametrize(("spec", "said"), [("e", "no run"), ("a::x", "unknown view"), ("a::v::otsu", "unknown segmenter")])
def test_what_is_not_there_is_refused_with_the_choices(runs, spec, said):
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*Choices: "):
        read(spec, runs)


def test_runs_of_another_protocol_are_refused_with_what_differs(runs):
    with pytest.raises(ConfigError, match=r"protocol differs in name \('multi' and 'single'\)"):
        check_comparable([read("a::v", runs), read("d", runs)])


def test_runs_that_differ_only_in_the_seed_are_one_method(runs):
    groups = same_but_for_seeds([read(name, runs, "v") for name in "abc"])
    assert {name: [m.name for m in members] for name, members in groups.items()} == {"a": ["a"], "b": ["b", "c"]}


def test_manifests_of_earlier_versions_are_compared_too(tmp_path):
    for seed in (0, 1):
        whole = manifest("", seed)
        del whole["identity"]["method"]["settings"]
        whole["identity"]["extractor"] = {"_target_": "conceptseg.extractors.x.X", "seed": seed}
        whole["run_id"] = keys.run_id(whole["identity"])
        store = RunStore(tmp_path / whole["run_id"])
        store.open(whole)
        (tmp_path / f"seed {seed}").symlink_to(store.folder)
        with store:
            store.append(rows("v", "mean@mask/bilinear", 0.8))
    first, second = (read(f"seed {seed}", tmp_path) for seed in (0, 1))
    check_comparable([first, second])
    assert same_but_for_seeds([first, second]) == {"seed 0": [first, second]}


def test_the_command_prints_tests_spreads_parts_and_cuts_and_writes_them(runs, monkeypatch, capsys):
    argv = [
        "conceptseg-compare",
        *"abc",
        "--folder",
        str(runs),
        "--view",
        "v",
        "--by",
        "word",
        "--worst",
        "10",
        "--resamples=200",
        "--power",
        "5",
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(runs / "out.json")])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    for wanted in (
        "minus a, paired",
        "2 seeds of b",
        "parts of a",
        "worst images",
        "Holm",
        "win rate",
        "images needed",
    ):
        assert wanted in said
    written = json.loads((runs / "out.json").read_text())
    assert list(written["comparisons"]) == ["b"] and written["comparisons"]["b"][0]["p_sign_flip"] < 0.05
    assert written["seeds"]["b"]["accuracy"]["values"].keys() == {"b", "c"}


def test_a_threshold_study_of_one_cut_says_how_to_get_more(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conceptseg-compare", "b", "--folder", str(runs), "--thresholds", "--resamples", "20"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1 and "experiment=thresholds" in capsys.readouterr().err


def test_costs_add_up_over_shards_and_resumptions(tmp_path):
    extractor = SimpleNamespace(backbone=SimpleNamespace(forward_passes=3))
    for shard, images, passes in ((0, 8, 2), (1, 8, 2), (0, 4, 1), (1, 0, 0)):
        with measured(tmp_path, shard, 2, extractor) as cost:
            extractor.backbone.forward_passes += passes
            cost.images = images
    cost = read_cost(tmp_path)
    assert (cost.images, cost.forward_passes, cost.passes_per_image) == (20, 5, 0.25)
    assert cost.peak_bytes > 0 and cost.seconds > 0
    assert read_cost(tmp_path / "none") is None


def test_a_metric_that_is_no_share_is_printed_as_it_is(runs, monkeypatch, capsys):
    pixels = replace(DEFINITIONS["ap_image"], name="pixels", label="distance (px)", percent=False)
    monkeypatch.setitem(DEFINITIONS, "pixels", pixels)
    wanted = [f"{pixels.value(read(name, runs).rows):.3f} [" for name in ("a::v", "b::v")]
    asked = ["--metric", "pixels", "--metric", "ap_image", "--by", "word", "--worst", "10", "--resamples", "50"]
    monkeypatch.setattr(sys, "argv", ["conceptseg-compare", *"abc", "--view", "v", "--folder", str(runs), *asked])
    with pytest.raises(SystemExit):
        command.main()
    said = capsys.readouterr().out
    assert all(number in said for number in wanted)
    assert "distance (px) %" not in said and "mAP %" in said
