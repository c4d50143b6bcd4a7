"""Attention replay: a generation whose cross-attention looks where another one's looked, while it reads its own words.

The stock attention runs as ever; before a layer's output projection its result is replaced by the recorded probabilities times
the values of the new prompt. Nothing else of the model is touched, and everything comes off again.
Source: castorini/daam at 09564e0, daam/trace.py (save_heads, load_heads); the mid block is included, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttentionTap, cross_attentions
from conceptseg.errors import TapError


@dataclass
class AttentionRecord:
    """Probabilities of every cross-attention in every call of the U-Net, [R A N T] on the CPU, by layer."""

    calls: dict[int, list[Float[Tensor, "R A N T"]]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(one.numel() * one.element_size() for calls in self.calls.values() for one in calls)


@contextmanager
def recording(unet: Any, record: AttentionRecord) -> Iterator[None]:
    """Record all cross-attention of what runs inside; a fresh recording replaces an older one."""
    record.calls.clear()

    def on_layer(attended: Attended) -> None:
        probabilities = attended.probabilities(slice(None), slice(None)).to("cpu", attended.queries.dtype)
        record.calls.setdefault(attended.layer.index, []).append(probabilities)

    with TapSet(unet) as taps:
        CrossAttentionTap(cross_attentions(unet.config), on_layer).attach(taps)
        yield


@contextmanager
def replaying(unet: Any, record: AttentionRecord) -> Iterator[None]:
    """Let every cross-attention look where the recorded one did, call by call.

    Raises TapError if there is no record for a call, or one of another shape (image size, number of images, guidance).
    """
    handles: list[Any] = []
    values: dict[int, Tensor] = {}
    played: dict[int, int] = {}

    def note_values(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            values[index] = output

        return note

    def replace_output(index: int, path: str, heads: int) -> Callable[..., tuple[Any, ...]]:
        def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            call = played.get(index, 0)
            played[index] = call + 1
            recorded = record.calls.get(index, [])
            value = rearrange(values.pop(index), "R T (A d) -> R A T d", A=heads)
            wanted = (args[0].shape[0], heads, args[0].shape[1], value.shape[2])
            if call >= len(recorded) or recorded[call].shape != wanted:
                held = tuple(recorded[call].shape) if call < len(recorded) else None
                raise TapError(
                    f"replaying attention at {path}, call {call + 1}: wanted a record of {wanted}, there is {held}. Record and "
                    f"replay with the same steps, image size, number of images and guidance."
                )
            output = torch.matmul(recorded[call].to(value), value)
            return (rearrange(output, "R A N d -> R N (A d)"), *args[1:])

        return replace

    try:
        for layer in cross_attentions(unet.config):
            attention = unet.get_submodule(layer.path)
            handles.append(attention.to_v.register_forward_hook(note_values(layer.index)))
            handles.append(attention.to_out[0].register_forward_pre_hook(replace_output(layer.index, layer.path, layer.heads)))
        yield
    finally:
        for handle in handles:
            handle.remove()
