"""Eight-bit weights: the blocks' matrices as integers with one scale an output channel, everything else as it was.

Weights alone are rounded, activations never, so maps stay close to the unrounded model's. torchao does it: plain tensors on any
device, part of PyTorch; bitsandbytes' eight bits round activations too and are made of CUDA kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from conceptseg.errors import ConfigError

WEIGHTS = ("full", "int8")


def to_eight_bits(model: nn.Module, path: str = "", dtype: torch.dtype | None = None) -> nn.Module:
    """Rounds, in place, every matrix of the model's blocks that multiplies tokens. path: where the model sits in its host.

    dtype: of the scales, and so of what a rounded matrix computes in; None is that of the weights.

    Matrices that make modulations stay: they act on one vector that reaches every token, and encode-only loading folds them away.
    Raises ConfigError where torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            "extractor.backbone.weights is int8, which needs the package torchao: pip install 'conceptseg[int8]', "
            "or use extractor.backbone.weights=full."
        ) from error
    for name, module in model.named_modules():
        if is_rounded(module, f"{path}.{name}".strip(".")):
            quantize_(module if dtype is None else module.to(dtype), Int8WeightOnlyConfig(version=2), filter_fn=lambda *_: True)
    return model


def is_rounded(module: nn.Module, path: str) -> bool:
    """Whether this module of a stock transformer is a block's matrix that multiplies tokens."""
    parts = path.lower().split(".")
    return (
        isinstance(module, nn.Linear)
        and any(part.isdecimal() for part in parts[:-1])
        and not any(part.startswith("norm") or "mod" in part for part in parts)
    )


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a weight of any shape, [...]; for a rounded one, those of its integers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.dtype.itemsize
    whole: Any = tensor
    return sum(stored_bytes(getattr(whole, name)) for name in whole.__tensor_flatten__()[0])
