"""The figures that the scripts of this folder found, by script: figures.json, which docs/speed.md quotes."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("figures.json")


def device_name(device: str = "cpu") -> str:
    if device == "cpu":
        return f"{platform.machine()} processor, threads: {torch.get_num_threads()}, torch {torch.__version__.split('+')[0]}"
    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__.split('+')[0]}"


def rounded(found: Any) -> Any:
    """Floats to four digits."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.4g}") if isinstance(found, float) else found


def record(name: str, found: dict[str, Any], device: str = "cpu") -> None:
    """Replace one script's figures."""
    held = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    held[name] = {"device": device_name(device), **rounded(found)}
    FILE.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
