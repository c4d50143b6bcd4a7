"""scripts/gpu_check.sh and the steps that it runs into one file, which a second run continues. On a toy and on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "speed"))

from gpu_check import RELEVANCE, main
from throughput import BACKENDS

from conceptseg.backbones.base import stack_images

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.sh"
STAGES = {"autoencoder", "text, eight strings", "transformer", "maps", "metrics"}
TOY = ("--device", "cpu", "--geometry", "tiny", "--batches", "1", "2", "--pairs", "1", "--repeats", "1")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Blocks are wrapped for compiling but not compiled, which takes minutes."""
    made = tmp_path_factory.mktemp("gpu_check") / "gpu_check.json"
    with torch.compiler.set_stance("force_eager"):
        main([str(made), *TOY])
    return made


def test_every_step_stands_in_one_file(file):
    held = json.loads(file.read_text())
    steps = held["steps"]
    wanted = ["device", "ratio", "batch 1", "batch 2", *(f"attention: {name}" for name in BACKENDS), "compiled block by block"]
    assert list(steps) == [*wanted, *(f"transinterp {dtype}, batch {n}" for dtype in ("float64", "float32") for n in RELEVANCE)]
    assert {name: entry for name, entry in steps.items() if entry["status"] != "done"} == {}
    assert steps["ratio"]["found"]["ratios"]["ours, known words"]["median"] > 1
    for name in ("batch 1", "batch 2"):
        found = steps[name]["found"]
        assert found.keys() == STAGES | {"transformer TFLOP", "share of peak", "images a second"}
        assert all(found[stage] > 0 for stage in found if stage != "maps"), found  # the difference of two times
    one, two = (steps[name]["found"]["transformer TFLOP"] for name in ("batch 1", "batch 2"))
    assert two == pytest.approx(2 * one, rel=1e-3)


def test_every_variant_is_tried_and_one_that_is_there_gives_the_same_maps(file):
    steps = json.loads(file.read_text())["steps"]
    tried = {name: entry["found"] for name, entry in steps.items() if name.startswith(("attention", "compiled"))}
    assert tried["compiled block by block"].keys() == {"1", "2"}
    assert tried["attention: native"].keys() == tried["attention: _native_math"].keys() == {"1"}
    others = [found for found in tried.values() if not isinstance(found, dict)]
    assert all(found.startswith("not there: ") for found in others), others


def test_a_run_that_was_cut_goes_on_with_the_steps_that_are_not_done(file, tmp_path, capsys):
    held = json.loads(file.read_text())
    held["steps"]["batch 1"] = {"status": "cut", "times": 1}
    held["steps"]["batch 2"] = {"status": "cut", "times": 2}
    del held["steps"]["transinterp float32, batch 1"]
    held["steps"]["ratio"]["found"] = "kept"
    again = tmp_path / "again.json"
    again.write_text(json.dumps(held))
    steps = main([str(again), *TOY])["steps"]
    assert json.loads(again.read_text())["steps"] == steps
    assert steps["batch 1"]["status"] == "done" and steps["transinterp float32, batch 1"]["status"] == "done"
    assert steps["batch 2"] == {"status": "cut", "times": 2} and steps["ratio"]["found"] == "kept"
    assert capsys.readouterr().out.strip().endswith("not done: batch 2")
    with pytest.raises(SystemExit, match="begun with another batches, repeats"):
        main([str(again), *TOY[:-4], "--pairs", "1", "--repeats", "2", "--batches", "1"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.json")])
    assert "no GPU that torch can use" in capsys.readouterr().err and not (tmp_path / "none.json").exists()


def test_the_script_runs_it_until_the_device_is_usable_or_time_is_up(tmp_path):
    """An interpreter of the test's stands in: it leaves the device unusable once, then takes longer than there is time."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$0.said"\n[ "$(wc -l < "$0.said")" -gt 1 ] || exit 75\nexec sleep 60\n')
    python.chmod(0o755)
    found = subprocess.run(
        [SCRIPT], env={**os.environ, "PYTHON": str(python), "SECONDS_LIMIT": "2"}, capture_output=True, text=True
    )  # fmt: skip
    assert (tmp_path / "python.said").read_text().splitlines() == ["benchmarks/speed/gpu_check.py gpu_check.json"] * 2
    assert found.returncode == 124 and "goes on where it was cut" in found.stderr


@pytest.mark.parametrize("resize", ["nearest", "bicubic"])
def test_images_are_resized_on_the_device_that_they_are_for(resize):
    """A device without values stands for an accelerator: nothing of it comes back."""
    image = np.random.default_rng(0).random((3, 4, 3), np.float32)
    found = stack_images([image, image], (6, 8), resize, "meta")
    assert found.device.type == "meta" and found.shape == (2, 3, 6, 8)
