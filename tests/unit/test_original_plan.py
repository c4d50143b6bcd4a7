"""The original's computing plan, as benchmarks/speed restates it, and ours see the same maps; ours with less work."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "speed"))

from flux_geometry import GEOMETRIES, random_backbone, random_task
from original_plan import OriginalPlan, counted, plans, tflop

TINY = GEOMETRIES["tiny"]


@pytest.fixture(scope="module")
def compared():
    backbone = random_backbone(TINY)
    return backbone, plans(backbone, TINY, draws=3)


@pytest.mark.parametrize("ours", ["ours, new words", "ours, known words"])
def test_both_plans_make_the_same_maps(compared, ours):
    _, plan = compared
    task = random_task(TINY, 1)
    original, mine = plan["original"].maps(task), plan[ours].maps(task)
    assert original.std(1).min() > 0.01  # else any two maps would agree
    torch.testing.assert_close(mine, original, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "texts", "images"), [("original", 3 * 8, 3), ("ours, new words", 8, 3), ("ours, known words", 0, 3)]
)
def test_a_plan_encodes_as_many_texts_and_noisy_images_as_it_says(compared, name, texts, images):
    backbone, plan = compared
    rows = {"texts": 0, "images": 0}
    task = random_task(TINY, 2)
    plan["ours, known words"].maps(task)

    def count(what):
        def hook(module, args, kwargs=None, output=None):
            rows[what] += len((kwargs or {}).get("input_ids", args[0] if args else None))

        return hook

    hooks = [
        backbone.text_encoder.register_forward_pre_hook(count("texts"), with_kwargs=True),
        backbone.transformer.x_embedder.register_forward_pre_hook(count("images")),
    ]
    try:
        plan[name].maps(task)
    finally:
        for hook in hooks:
            hook.remove()
    assert rows == {"texts": texts, "images": images}


def test_operations_are_counted_without_weights():
    """Operators without values are slow to count: no more blocks and draws than tell the plans apart."""
    few = replace(TINY, double_blocks=2, single_blocks=1, text_layers=1)
    flop = counted(few, draws=1, stop=False)
    without_single = tflop(OriginalPlan(random_backbone(few, "meta"), few.layers_read, draws=1, stop=True), few)
    assert flop["original"] > without_single > flop["ours, new words"] > flop["ours, known words"] > 0
