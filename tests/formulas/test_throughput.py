"""benchmarks/speed/throughput.py reaches every stage, batch, back-end and the compiled model, on a toy and on the processor."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "speed"))

from throughput import BACKENDS, main

from conceptseg.backbones.base import stack_images

STAGES = {"autoencoder", "text, eight strings", "transformer", "maps", "metrics"}


@pytest.fixture(scope="module")
def found():
    """Blocks are wrapped for compiling but not compiled, which takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        return main(["--geometry", "tiny", "--batches", "1", "2", "--repeats", "1"])


def test_every_stage_of_every_batch_is_timed(found):
    assert list(found["batches"]) == [1, 2]
    for rows, batch in found["batches"].items():
        assert batch.keys() == STAGES | {"transformer TFLOP", "share of peak", "images a second"}
        assert all(batch[name] > 0 for name in batch if name != "maps"), rows  # the difference of two times
    one, two = (found["batches"][rows]["transformer TFLOP"] for rows in (1, 2))
    assert two == pytest.approx(2 * one)


def test_every_variant_is_tried_and_what_is_there_gives_the_same_maps(found):
    assert found["variants"].keys() == {*(f"attention: {name}" for name in BACKENDS), "compiled block by block"}
    for name in ("attention: native", "attention: _native_math", "compiled block by block"):
        assert isinstance(found["variants"][name], float), found["variants"][name]
    others = [value for value in found["variants"].values() if not isinstance(value, float)]
    assert all(value.startswith("not there: ") for value in others), others


@pytest.mark.parametrize("resize", ["nearest", "bicubic"])
def test_images_are_resized_on_the_device_that_they_are_for(resize):
    """A device without values stands for an accelerator: nothing of it comes back."""
    image = np.random.default_rng(0).random((3, 4, 3), np.float32)
    found = stack_images([image, image], (6, 8), resize, "meta")
    assert found.device.type == "meta" and found.shape == (2, 3, 6, 8)
