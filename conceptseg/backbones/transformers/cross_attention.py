"""Transformers that text enters by cross-attention alone (PixArt, Sana, Wan, LTX, Lumina-Next, HunyuanDiT), read by one tap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttention, check_grid, refuse_fused
from conceptseg.errors import TapError

HOSTS = (
    "PixArtTransformer2DModel", "SanaTransformer2DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel",
    "LuminaNextDiT2DModel", "HunyuanDiT2DModel",
)  # fmt: skip
"""Stock classes whose `attn2` is the cross-attention to the text. Elsewhere it may be another: SD3.5's sees the image."""


def is_host(model: object) -> bool:
    """Whether a model is one of `HOSTS`, or derived from one."""
    return isinstance(model, nn.Module) and any(kind.__name__ in HOSTS for kind in type(model).__mro__)


def text_cross_attentions(model: nn.Module) -> tuple[CrossAttention, ...]:
    """Every cross-attention of a transformer of `HOSTS`, by block. All have the grid of the image's tokens."""
    found = [(path, module) for path, module in model.named_modules() if path.endswith(".attn2")]
    return tuple(CrossAttention(index, path, int(module.heads), 0) for index, (path, module) in enumerate(found))


def token_grid(config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[int, int, int]:
    """(frames, rows, columns) of the tokens that a transformer makes of the latents it is given; one frame for an image.

    given: its arguments. LTX's pipeline packs its latents, [R n c], and passes num_frames, height and width.
    """
    latents = given["hidden_states"]
    if latents.ndim == 3:
        return int(given["num_frames"]), int(given["height"]), int(given["width"])
    sides = latents.shape[2:]
    size = config["patch_size"]
    patches = tuple(size) if isinstance(size, list | tuple) else (size,) * len(sides)
    *frames, rows, columns = (side // patch for side, patch in zip(sides, patches, strict=True))
    return (frames[0] if frames else 1), rows, columns


@dataclass
class TextCrossAttentionTap:
    """Calls `on_layer` for the named layers as a stock transformer of `HOSTS` runs; its own attention stays as it is.

    What is handed on is what attention sees: queries and keys after their norms, queries after their rotary embedding, keys
    repeated where heads share them, and the mask of padded text.
    """

    layers: Sequence[CrossAttention]
    on_layer: Callable[[Attended], None]
    grid: tuple[int, int, int] = (1, 0, 0)
    """(frames, rows, columns) of this forward pass, set before the first layer runs."""
    _given: dict[int, dict[str, Any]] = field(default_factory=dict)
    _queries: dict[int, Tensor] = field(default_factory=dict)

    def attach(self, taps: TapSet) -> None:
        """Hook the host. Raises TapError for fused projections or a compiled host."""
        for layer in self.layers:
            taps.refuse_compiled(layer.path)
            attention: Any = taps.module(layer.path)
            refuse_fused(layer.path, attention)
            taps.before(layer.path, self._note_call(layer))
            for name, tap in (("q", self._note_queries(layer, attention)), ("k", self._at_keys(layer, attention))):
                normed = getattr(attention, f"norm_{name}", None) is not None
                taps.after(f"{layer.path}.norm_{name}" if normed else f"{layer.path}.to_{name}", tap)

    def _note_call(self, layer: CrossAttention) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            refuse_fused(layer.path, module)
            self._given[layer.index] = {"attention_mask": args[2] if len(args) > 2 else None, **kwargs}

        return note

    def _note_queries(self, layer: CrossAttention, attention: Any) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            queries = output if output.ndim == 4 else rearrange(output, "R N (A d) -> R A N d", A=attention.heads)
            self._queries[layer.index] = _rotated(queries, self._given[layer.index])

        return note

    def _at_keys(self, layer: CrossAttention, attention: Any) -> Callable[..., None]:
        def at_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            queries = self._queries.pop(layer.index)
            rows, heads, count, width = queries.shape
            keys = output if output.ndim == 4 else rearrange(output, "R T (A d) -> R A T d", d=width)
            keys = repeat(keys, "R A T d -> R (A some) T d", some=heads // keys.shape[1])
            if len(keys) != rows:
                raise TapError(
                    f"tapping {layer.path}: {rows} rows of images meet {len(keys)} rows of text; such a pipeline (attention in "
                    f"windows, or rows that share their text) can't be traced."
                )
            frames, *grid = self.grid
            check_grid(layer, (frames * grid[0], grid[1]), count, "queries")
            mask = self._given.pop(layer.index)["attention_mask"]
            bias = None if mask is None else _bias(layer, mask, rows, keys.shape[2])
            self.on_layer(Attended(layer, attention, queries, keys, (grid[0], grid[1]), bias, frames))

        return at_keys


def _rotated(queries: Float[Tensor, "R A N d"], given: Mapping[str, Any]) -> Float[Tensor, "R A N d"]:
    """Queries as HunyuanDiT and Lumina-Next turn them before cross-attention; keys of text are not turned.

    Source: diffusers 0.42, models/attention_processor.py, HunyuanAttnProcessor2_0 and LuminaAttnProcessor2_0.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    if (rotary := given.get("image_rotary_emb")) is not None:
        return apply_rotary_emb(queries, rotary)
    if (rotary := given.get("query_rotary_emb")) is not None:
        return apply_rotary_emb(queries.transpose(1, 2), rotary, use_real=False).transpose(1, 2)
    return queries


def _bias(layer: CrossAttention, mask: Tensor, rows: int, tokens: int) -> Float[Tensor, "R 1 T"]:
    """The mask of padded text as what attention adds to its logits. Raises TapError for one that differs between queries."""
    if mask.shape not in ((rows, tokens), (rows, 1, tokens)):
        raise TapError(
            f"tapping {layer.path}: its attention_mask has shape {tuple(mask.shape)}, wanted {(rows, tokens)} or "
            f"{(rows, 1, tokens)}: one value for each token of the text. Leave other masks out while tracing."
        )
    mask = mask.reshape(rows, 1, tokens)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    return mask.float()
