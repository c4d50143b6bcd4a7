"""Weights that are pages of a file leave memory once they were used: backbones/file_pages.py and who calls it."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.casting import cast_while_running
from conceptseg.backbones.encoders.image_encoder import load_strictly

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gives pages back on Linux only")


def resident_bytes_of(file):
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = [n for n, line in enumerate(lines) if line.endswith(str(file))]
    assert at, "the file is not mapped"
    return sum(1024 * int(next(line for line in lines[n:] if line.startswith("Rss:")).split()[1]) for n in at)


def test_pages_of_a_weight_file_leave_memory_once_a_block_has_run_but_never_what_was_written_to(tmp_path):
    width, count = 1024, 8
    drawn = torch.randn(count, width, width, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    file = tmp_path / "model.safetensors"
    save_file({f"blocks.{n}.weight": drawn[n].clone() for n in range(count)}, file)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(width, width, bias=False, device="meta") for _ in range(count)])
    model.load_state_dict(load_file(file), assign=True)
    model.blocks[0].weight.data[3, 5] = 7.0  # in memory alone, not in the file
    drawn[0, 3, 5] = 7.0
    model = cast_while_running(model, torch.float32)

    with torch.inference_mode():
        for _ in range(2):
            for block, weight in zip(model.blocks, drawn, strict=True):
                assert torch.equal(block(torch.eye(width)), weight.float().T)
    assert 0 < resident_bytes_of(file) < 2.5 * width * width  # of 2 bytes a weight, 16 MB in all: the block that was written to


def test_weights_that_were_copied_into_a_model_are_not_in_memory_twice(tmp_path):
    width, file = 1024, tmp_path / "model.safetensors"
    model, other = (nn.Sequential(*(nn.Linear(width, width) for _ in range(4))) for _ in range(2))
    save_file(model.state_dict(), file)
    state = load_file(file)
    load_strictly(other, state, Checkpoint(str(tmp_path)), "config.json")
    assert resident_bytes_of(file) < 2 * width * width  # of 16 MB
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
