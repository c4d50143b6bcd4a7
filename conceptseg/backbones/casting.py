"""Arithmetic that a processor is fast in, on weights that keep the dtype that a sheet names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conceptseg.backbones.file_pages import give_back

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "avx10_1", "avx10_2", "fp16_arith"),
}
"""Dtype -> instructions, as `torch.cpu.get_capabilities` names them, any of which makes a CPU fast in it."""


def fast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in where weights have `dtype`: float32 on a CPU without instructions for its 16 bits."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type != "cpu" or dtype not in INSTRUCTIONS or not capabilities:
        return dtype
    return dtype if any(capabilities.get(name) for name in INSTRUCTIONS[dtype]) else torch.float32


def cast_while_running(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Let a model compute in `dtype`, with its blocks' weights as they are stored but for the time that a block runs.

    Weights outside of blocks are cast for good; of embeddings only what is looked up. The result equals that of a model cast as
    a whole to the last bit. diffusers' layerwise casting casts a block's weights back; here the stored ones are kept, so that
    weights that are pages of a file stay so. After a block has run, the kernel gets these pages back.
    """
    within: set[int] = set()
    for block in _blocks(model):
        within |= {id(weight) for weight in _weights(block)}
        block.register_forward_pre_hook(_Cast(dtype))
        block.register_forward_hook(_restore, always_call=True)  # also where a tap ends the pass inside of the block
    for module in model.modules():
        held = [weight for weight in _own_weights(module) if id(weight) not in within and weight.dtype != dtype]
        if held and isinstance(module, nn.Embedding):
            module.register_forward_hook(_CastOutput(dtype))
            continue
        for weight in held:
            weight.data = weight.data.to(dtype)
    return model


class _Cast:
    """Casts a block's weights before it runs; what is stored waits at the block."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, block: nn.Module, args: Any) -> None:
        held: dict[Tensor, Tensor] = block.__dict__.setdefault("_stored_weights", {})
        for weight in _weights(block):
            if weight.dtype != self.dtype:
                held[weight] = weight.data
                weight.data = weight.data.to(self.dtype)


class _CastOutput:
    """Casts what a module gives."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


def _restore(block: nn.Module, args: Any, output: Any) -> None:
    for weight, stored in block.__dict__.pop("_stored_weights", {}).items():
        weight.data = stored
        give_back(stored)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _weights(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        yield from _own_weights(part)


def _own_weights(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a module alone that hold plain numbers; quantised ones dequantise themselves."""
    for one in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if one.is_floating_point() and not hasattr(one, "__tensor_flatten__"):
            yield one
