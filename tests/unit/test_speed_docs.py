"""docs/speed.md quotes benchmarks/speed/figures.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGE = " ".join((REPO / "docs" / "speed.md").read_text(encoding="utf-8").split())
FIGURES = json.loads((REPO / "benchmarks" / "speed" / "figures.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("plan", ["ours, new words", "ours, known words"])
def test_the_ratios_to_the_original_are_those_that_were_measured(plan):
    found = FIGURES["original_plan cut"]
    ratio, tflop = found["ratios"][plan], found["tflop"]["cut"]
    row = (
        f"{found['seconds'][plan]:.2f} | {ratio['min']:.2f} | **{ratio['median']:.2f}** | {ratio['max']:.2f} | "
        f"{tflop[plan]:.3f} | {tflop['original'] / tflop[plan]:.1f} |"
    )
    assert row in PAGE
    whole = found["tflop"]["full"]
    assert f"{whole[plan]:.0f} | {whole['original'] / whole[plan]:.1f} |" in PAGE
    assert ratio["min"] >= 2.5


def test_the_harnesss_shares_are_those_that_were_measured():
    found = FIGURES["harness"]
    assert found["share_of_cut_percent"] < 3 and found["share_of_h100_percent"] < 3 and found["lab_share_percent"] < 30
    assert f"{found['share_of_cut_percent']:.1f} % beside an image of the cut-down FLUX" in PAGE
    assert f"computed: {found['share_of_h100_percent']:.1f} %" in PAGE
    assert f"the harness takes {found['lab_share_percent']:.1f} %" in PAGE
    assert all(f"| {ms:.1f} |" in PAGE for ms in found["stages_ms"].values())


def test_what_was_not_measured_is_said_to_be_so():
    """The row of GPU figures says "not run" as long as nothing was measured on one, and no longer."""
    (row,) = re.findall(r"\| time of either on a GPU[^|]*\| ([^|]*) \|", PAGE)
    assert (row == "not run") == ("gpu_check full" not in FIGURES)
