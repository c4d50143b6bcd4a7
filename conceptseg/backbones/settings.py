"""Checks of settings that backbones share; each refusal names the setting and the nearest choice."""

from __future__ import annotations

import torch

from conceptseg.errors import ConfigError, did_you_mean, one_of


def device_of(name: str) -> torch.device:
    """Raises ConfigError for a device that torch does not know or see."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'runtime.device: unknown "{name}". {did_you_mean(name, ["cpu", "cuda", "cuda:0", "mps"])}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch sees no CUDA device here. Use runtime.device=cpu.')
    return device


def dtype_of(name: str, key: str) -> torch.dtype:
    """Raises ConfigError for a name that is no floating-point type."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    one_of(f"extractor.backbone.{key}", name, choices)
    return choices[name]
