"""Attention of stock U-Nets, read through hooks: which cross-attentions there are, what a layer yields, its probability maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from conceptseg.backbones.attention_rows import attention_rows
from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import TapError

CFG_ROWS = ("conditional", "all", "legacy_half_of_heads")
UPSAMPLINGS = ("bicubic_clamped", "bilinear")
RELEASED_FACTORS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Factors that the reference aggregates by default; others are collected and left out."""


@dataclass(frozen=True, slots=True)
class CrossAttention:
    """One cross-attention (`attn2`) of a U-Net. index: the reference's numbering, up blocks, then down, then mid."""

    index: int
    path: str
    heads: int
    level: int
    """How often its grid has been halved from the latents'."""

    @property
    def transformer(self) -> str:
        """Path of the spatial transformer around it, which is given the grid."""
        return self.path.rsplit(".transformer_blocks.", 1)[0]

    @property
    def self_attention(self) -> CrossAttention:
        """The attention of the image to itself in the same block, which runs just before."""
        return replace(self, path=self.path.removesuffix("attn2") + "attn1")

    @property
    def runs(self) -> tuple[int, int]:
        """Sorts layers in the order in which a forward pass meets them: down, mid, up."""
        return {"d": 0, "m": 1, "u": 2}[self.path[0]], self.index


def cross_attentions(config: Mapping[str, Any]) -> tuple[CrossAttention, ...]:
    """Every cross-attention of a UNet2DConditionModel by its config.json, no weights needed, the mid block's last.

    Source: castorini/daam at 09564e0, daam/hook.py (15 + 1 in SD 1 and 2, 60 + 10 in SDXL).
    """
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    count = len(down)

    def per_block(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else [value] * count

    heads = per_block(config.get("num_attention_heads") or config["attention_head_dim"])  # diffusers' misnomer: it counts heads
    depths, resnets = per_block(config.get("transformer_layers_per_block", 1)), per_block(config["layers_per_block"])
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    blocks: list[tuple[str, int, int, int, int]] = []  # path, level, transformers, depth, heads
    for i, kind in enumerate(up):
        if "CrossAttn" in kind:
            blocks.append((f"up_blocks.{i}", count - 1 - i, resnets[::-1][i] + 1, up_depths[i], heads[::-1][i]))
    for i, kind in enumerate(down):
        if "CrossAttn" in kind:
            blocks.append((f"down_blocks.{i}", i, resnets[i], depths[i], heads[i]))
    if "CrossAttn" in (config.get("mid_block_type") or ""):
        blocks.append(("mid_block", count - 1, 1, depths[-1], heads[-1]))
    found: list[CrossAttention] = []
    for path, level, transformers, depth, number in blocks:
        for i in range(transformers):
            for j in range(depth if isinstance(depth, int) else depth[i]):
                found.append(CrossAttention(len(found), f"{path}.attentions.{i}.transformer_blocks.{j}.attn2", number, level))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Attended:
    """Queries and keys of one layer in one forward pass, split into heads, before any scaling."""

    layer: CrossAttention
    attention: nn.Module
    queries: Float[Tensor, "R A N d"]
    keys: Float[Tensor, "R A T d"]
    grid: tuple[int, int]
    """Rows and columns of the N query positions, in each frame."""
    bias: Float[Tensor, "R 1 T"] | None = None
    """Added to the logits by attention, as a mask of padded text is; None for nothing."""
    frames: int = 1
    """Frames of a video that the N positions come from, one after another."""

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return float(getattr(self.attention, "scale", self.queries.shape[-1] ** -0.5))

    def probabilities(
        self, rows: slice, heads: slice, keys: Float[Tensor, "R A S d"] | None = None, softmax: bool = True
    ) -> Float[Tensor, "r a N S"]:
        """Return the softmax over tokens of the scaled dot products, in float32, 0..1, of some rows and heads, or for other keys.

        Source: Tang et al. 2023, arXiv:2210.04885; castorini/daam at 09564e0, daam/trace.py.
        """
        bias = self.bias if keys is None else None
        keys = self.keys if keys is None else keys
        scaled = self.queries[rows, heads].float() * self.scale  # queries, not logits: they are far fewer
        logits = torch.einsum("rand,ratd->rant", scaled, keys[rows, heads].float())
        if bias is not None:
            logits += bias[rows, None]
        return logits.softmax(-1) if softmax else logits

    def received(self) -> Float[Tensor, "R h w"]:
        """Return the attention that each position of a self-attention receives, mean over heads; 1 on average."""
        total = torch.stack([mean.sum(1) for _, mean in attention_rows(self.queries, self.keys, self.scale)]).sum(0)
        return rearrange(total, "R (h w) -> R h w", h=self.grid[0])

    def head_chunks(self, heads: range, rows: int) -> Iterator[slice]:
        """Heads in groups small enough that their probabilities take about two megabytes: what is held at a time."""
        size = max(1, 2**19 // max(1, rows * self.queries.shape[2] * self.keys.shape[2]))
        for start in range(heads.start, heads.stop, size):
            yield slice(start, min(start + size, heads.stop))


@runtime_checkable
class UNetTap(Protocol):
    """Reads something of a stock U-Net as it runs."""

    def attach(self, taps: TapSet) -> None:
        """Hook the host. Raises TapError where it can't be read."""


@dataclass
class CrossAttentionTap:
    """Calls `on_layer` for the named layers as a stock U-Net runs; the U-Net's own attention stays fused and unchanged.

    With `stop`, the forward pass ends after the last wanted layer.
    """

    layers: Sequence[CrossAttention]
    on_layer: Callable[[Attended], None]
    stop: bool = False
    _grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    _queries: dict[int, Tensor] = field(default_factory=dict)

    def attach(self, taps: TapSet) -> None:
        """Hook the host. Raises TapError for fused projections, normalised queries, or a compiled host."""
        last = max(self.layers, key=lambda layer: layer.runs)
        for path in dict.fromkeys(layer.transformer for layer in self.layers):
            taps.before(path, _noted(self._grids, path))
        for layer in self.layers:
            taps.refuse_compiled(layer.path)
            attention = taps.module(layer.path)
            refuse_fused(layer.path, attention)
            for name in ("norm_q", "norm_k"):
                if getattr(attention, name, None) is not None:
                    raise TapError(f"tapping {layer.path}: it has {name}, which Stable Diffusion's U-Nets do not; not supported.")
            taps.before(layer.path, self._refuse_masks(layer))
            taps.after(f"{layer.path}.to_q", self._note_queries(layer))
            taps.after(f"{layer.path}.to_k", self._at_keys(layer, attention, layer is last))

    def _refuse_masks(self, layer: CrossAttention) -> Callable[..., None]:
        def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            refuse_fused(layer.path, module)
            if kwargs.get("attention_mask") is not None:
                raise TapError(
                    f"tapping {layer.path}: the call masks text tokens (encoder_attention_mask), which maps would not show. "
                    f"Leave the mask out, as Stable Diffusion's pipelines do."
                )

        return refuse

    def _note_queries(self, layer: CrossAttention) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._queries[layer.index] = output

        return note

    def _at_keys(self, layer: CrossAttention, attention: Any, last: bool) -> Callable[..., None]:
        def at_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            queries = rearrange(self._queries.pop(layer.index), "R N (A d) -> R A N d", A=attention.heads)
            keys = rearrange(output, "R T (A d) -> R A T d", A=attention.heads)
            if len(keys) != len(queries):
                raise TapError(
                    f"tapping {layer.path}: {len(queries)} rows of images meet {len(keys)} rows of text; "
                    f"such a pipeline (attention in windows, or rows that share their text) can't be traced."
                )
            grid = self._grids[layer.transformer]
            check_grid(layer, grid, queries.shape[2], "queries")
            if layer.path.endswith("attn1"):
                check_grid(layer, grid, keys.shape[2], "keys")
            self.on_layer(Attended(layer, attention, queries, keys, grid))
            if last and self.stop:
                raise StopForward

        return at_keys


@dataclass
class OutputTap:
    """Calls `on_output` with what one self- or cross-attention of a stock U-Net returns, [R d h w]."""

    layer: CrossAttention
    on_output: Callable[[Float[Tensor, "R d h w"]], None]

    def attach(self, taps: TapSet) -> None:
        """Hook the host."""
        grids: dict[str, tuple[int, int]] = {}
        path = self.layer.transformer
        taps.refuse_compiled(self.layer.path)
        taps.before(path, _noted(grids, path))

        def at_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            check_grid(self.layer, grids[path], output.shape[1], "outputs")
            self.on_output(rearrange(output, "R (h w) d -> R d h w", h=grids[path][0]))

        taps.after(self.layer.path, at_output)


def _noted(grids: dict[str, tuple[int, int]], path: str) -> Callable[..., None]:
    """Keep the grid that the spatial transformer at a path is given."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        grids[path] = hidden.shape[-2], hidden.shape[-1]

    return note


def refuse_fused(path: str, attention: nn.Module) -> None:
    """Raises TapError where queries and keys come out of one matrix."""
    from diffusers.models.attention_processor import Attention

    # diffusers leaves an Attention's fused_projections set after unfusing; what counts there is which processor runs.
    fused = type(getattr(attention, "processor", None)).__name__.startswith("Fused")
    if fused or (getattr(attention, "fused_projections", False) and not isinstance(attention, Attention)):
        raise TapError(
            f"tapping {path}: its projections are fused, so queries and keys can't be read. Call "
            f"unfuse_qkv_projections() on the U-Net or transformer first."
        )


def check_grid(layer: CrossAttention, grid: tuple[int, int], found: int, what: str) -> None:
    """Raises TapError where the image's positions are not those of its grid: they could not be laid out as a map."""
    if found != grid[0] * grid[1]:
        raise TapError(
            f"tapping {layer.path}: {found} {what} of the image, but its grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} "
            f"positions. Token merging (tomesd), or attention in windows or to a sparse choice of positions, changed them. Undo "
            f"it (tomesd.remove_patch(pipe)), or keep it out of this attention (merge_crossattn=False)."
        )


def kept_rows(rows: int, guided: bool, rule: str) -> slice:
    """Rows of a U-Net batch that maps are read from: the second half under guidance, all without, or all anyway.

    Source: diffusers' Stable Diffusion pipelines, which stack unconditional rows first.
    """
    return slice(rows // 2, rows) if guided and rule == "conditional" else slice(0, rows)


def kept_heads(heads: int, rule: str) -> range:
    """Heads that maps are read from: all, or (a single unguided image in the reference) the second half, 2, 3, 4 of 5."""
    return range(heads // 2, heads) if rule == "legacy_half_of_heads" else range(heads)


def reference_half(probabilities: Float[Tensor, "R A N T"]) -> Float[Tensor, "H N T"]:
    """Return the second half of the fused (row, head) axis, as the reference slices it: correct only for one guided image.

    Source: castorini/daam at 09564e0, daam/trace.py.
    """
    fused = rearrange(probabilities, "R A N T -> (R A) N T")
    return fused[len(fused) // 2 :]


def reference_side(sample_size: int, pixels_per_latent: int) -> int:
    """Side of the reference's maps by a model's native size in latents: 64 at 512 or 1024 pixels, 96 at 768, else the latents'.

    Source: castorini/daam at 09564e0, daam/trace.py, which has 96 for every other size.

    >>> reference_side(64, 8), reference_side(96, 8), reference_side(24, 2)
    (64, 96, 24)
    """
    return {512: 64, 768: 96, 1024: 64}.get(sample_size * pixels_per_latent, sample_size)


def map_size(latents: tuple[int, int], side: int) -> tuple[int, int]:
    """Size of maps: `side` squared for square latents, else `side` on the shorter edge and the latents' own proportions.

    >>> map_size((64, 64), 64), map_size((32, 32), 64), map_size((64, 96), 64)
    ((64, 64), (64, 64), (64, 96))
    """
    short = min(latents)
    return round(latents[0] * side / short), round(latents[1] * side / short)


def grid_factor(size: tuple[int, int], positions: int) -> int:
    """How much wider the map is than a layer's grid, rounded down as the reference does.

    >>> [grid_factor((64, 64), n) for n in (4096, 1024, 64, 144)]
    [1, 2, 8, 5]
    """
    return isqrt(size[0] * size[1] // positions)


def upsample(maps: Float[Tensor, "*B h w"], size: tuple[int, int], how: str) -> Float[Tensor, "*B X Y"]:
    """Resize maps to (X, Y): bicubic, each map cut at 0 (the reference's), or bilinear.

    Source: castorini/daam at 09564e0, daam/trace.py (align_corners false, no antialias); OVAM is bilinear
    (vpulab/ovam at 12afd87).
    """
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    if how == "bilinear":
        flat = interpolate(flat, size=size, mode="bilinear")
    else:
        flat = interpolate(flat, size=size, mode="bicubic").clamp_min(0)
    return flat.reshape(*maps.shape[:-2], *size)
