"""A vision transformer of pre-norm blocks from any library: where its weights are and where taps read its tokens.

timm's VisionTransformer and open_clip's visual tower differ in names only. What methods need is computed from two taps a block,
the normed input and the attention's output, so fused attention need not be switched off: the matrices are formed again from the
queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from conceptseg.backbones.taps import TapSet

See = Callable[[Tensor], None]
"""Receiver of the tokens [B T d] that a tap reads."""


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A linear map, [out in] with an optional bias [out]; of the patch embedding, [out 3 p p]."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TowerBlock:
    """x + attention(norm1(x)), then + mlp(norm2(x)); `scaled` where a learnt layer scale stands between."""

    path: str
    norm1: str
    """Dotted path of the module whose output goes into the attention."""
    attention: str
    """Dotted path of the attention, whose output is added to the residual stream."""
    qkv_module: str | None
    """Dotted path of the module that maps to queries, keys and values at once; None where the attention does it unseen."""
    mlp: tuple[str, str, str, str]
    """Dotted paths of the second norm, the MLP's first map, its activation and its second map."""
    first_norm: nn.Module
    qkv: Weights
    proj: Weights
    second_norm: nn.Module
    up: Weights
    activation: nn.Module
    down: Weights
    scaled: bool
    pools: bool = False
    """Whether it is an attention pooling head: a learnt query attends to the patches, and its attention has no residual."""


@dataclass(frozen=True, slots=True, eq=False)
class Tower:
    """Blocks and the parts around them; `prefix` tokens (CLS first, then registers) stand before rows · columns patches."""

    model: nn.Module
    blocks: tuple[TowerBlock, ...]
    heads: int
    grid: tuple[int, int]
    prefix: int
    patch: Weights
    class_token: Float[Tensor, " d"] | None
    """None where a pooling head, then the last of the blocks, makes the image vector of the patches."""
    positions: Float[Tensor, "T d"]
    pre_norm: nn.Module
    """Between position embedding and first block; an identity where there is none."""
    norm: nn.LayerNorm
    """After the last block."""
    projection: tuple[Weights, ...]
    """Linear maps between the normed class token and the rows that score it: none for a classifier, CLIP's projection."""

    def query_key_value(
        self, layer: int, normed: Float[Tensor, "B T d"]
    ) -> tuple[Float[Tensor, "B A T k"], Float[Tensor, "B A T k"], Float[Tensor, "B A T k"]]:
        """Return queries (not scaled), keys and values of all A heads, k wide, from the block's normed input of T tokens."""
        return self.split_heads(self.mapped(layer, normed))

    def mapped(self, layer: int, normed: Float[Tensor, "B T d"]) -> Float[Tensor, "B T n"]:
        """Return queries, keys and values of the block's normed input side by side, n = 3 d."""
        return linear(normed, self.blocks[layer].qkv.weight, self.blocks[layer].qkv.bias)

    def split_heads(
        self, mapped: Float[Tensor, "B T n"]
    ) -> tuple[Float[Tensor, "B A T k"], Float[Tensor, "B A T k"], Float[Tensor, "B A T k"]]:
        """Split the output of `mapped` into queries, keys and values of all A heads, k wide."""
        q, k, v = rearrange(mapped, "B T (n A k) -> n B A T k", n=3, A=self.heads)
        return q, k, v

    def attention(self, layer: int, normed: Float[Tensor, "B T d"]) -> Float[Tensor, "B A T T"]:
        """Return the attention after softmax, [batch, head, query, key], in 0..1."""
        q, k, _ = self.query_key_value(layer, normed)
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)

    def class_attention(self, layer: int, normed: Float[Tensor, "B T d"]) -> Float[Tensor, "B A T"]:
        """Return the class token's row of `attention`, [batch, head, key], without computing the other rows."""
        q, k, _ = self.query_key_value(layer, normed)
        return torch.softmax(q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5, dim=-1)[:, :, 0]

    def attention_gradient(
        self, layer: int, values: Float[Tensor, "B A T k"], output_gradient: Float[Tensor, "B Q d"]
    ) -> Float[Tensor, "B A Q T"]:
        """Return d score / d attention from d score / d (the attention module's output), for the query rows that are given.

        The output is concat_h(A_h V_h) W_O^T, so dA_h = (g W_O)_h V_h^T: no graph through the matrix itself is needed.
        """
        into_heads = rearrange(output_gradient @ self.blocks[layer].proj.weight, "B Q (A k) -> B A Q k", A=self.heads)
        return into_heads @ values.mT

    def maps(self, tokens: Float[Tensor, "B L"]) -> Float[Tensor, "B h w"]:
        """Lay out one number per patch as a map; L = h·w, row-major."""
        return rearrange(tokens, "B (h w) -> B h w", h=self.grid[0], w=self.grid[1])


def tap_normed(taps: TapSet, tower: Tower, layer: int, see: See) -> None:
    """Call `see` with what goes into a block's attention."""

    tap_output(taps, tower.blocks[layer].norm1, see)


def tap_attended(taps: TapSet, tower: Tower, layer: int, see: See) -> None:
    """Call `see` with a block's attention output, after its output projection."""

    tap_output(taps, tower.blocks[layer].attention, see)


def tap_block(taps: TapSet, tower: Tower, layer: int, see: See) -> None:
    """Call `see` with the residual stream after a block."""

    tap_output(taps, tower.blocks[layer].path, see)


def tap_input(taps: TapSet, tower: Tower, layer: int, see: See) -> None:
    """Call `see` with the residual stream before a block."""

    taps.before(tower.blocks[layer].path, partial(_see_input, see))


def tap_output(taps: TapSet, path: str, see: See) -> None:
    """Call `see` with the output of the module at a dotted path."""

    taps.after(path, partial(_see_output, see))


def _see_output(see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    see(output[0] if isinstance(output, tuple) else output)  # nn.MultiheadAttention returns (output, weights)


def _see_input(see: See, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    see(args[0])


def resized_positions(
    positions: Float[Tensor, "T d"], prefix: int, old: tuple[int, int], new: tuple[int, int], rule: str
) -> Float[Tensor, "N d"]:
    """Resize a learnt position embedding to the grid `new`, (rows, columns) in patches, bicubic; the `prefix` rows are kept.

    rule "timm" resamples to the new size, antialiased. "dino" gives the scale factors (rows + 0.1) / side and
    (columns + 0.1) / side to the interpolation, which places its samples by them, without antialiasing, and takes the
    embedding as it is only for the old count of patches on a square grid; so does NACLIP.
    Computed in float64, so that every processor rounds to the same bits.
    """
    untouched = new == old if rule == "timm" else new[0] * new[1] == old[0] * old[1] and new[0] == new[1]
    if untouched:
        return positions
    first, rest = positions[:prefix], rearrange(positions[prefix:], "(h w) d -> 1 d h w", h=old[0])
    if rule == "timm":
        resized = interpolate(rest.double(), size=new, mode="bicubic", antialias=True)
    else:
        resized = interpolate(rest.double(), scale_factor=((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1]), mode="bicubic")
    return torch.cat([first, rearrange(resized.to(positions), "1 d h w -> (h w) d")])
