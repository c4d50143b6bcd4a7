"""Layer-wise relevance for vision transformers: ordinary forward operations whose backward passes hand down relevance.

A tower is run once more out of these operations, on its own weights, and one call of autograd gives the relevance of every
attention matrix of a batch. The rules divide by signed activations and are numerically chaotic through many layers, so they
refuse anything below float32.

Source: Chefer et al. 2021 (arXiv:2012.09838) and its released code, as restated in the baselines note, sections 3 to 3.4:
rule set "new" (TransInterp) and rule set "orig" (LRP, partial LRP).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, linear, softmax

from conceptseg.backbones.tower import Tower, Weights
from conceptseg.errors import ConfigError, TapError, did_you_mean

RULES = ("new", "orig")


def safe_divide(top: Tensor, bottom: Tensor) -> Tensor:
    """top / (bottom + 1e-9), and 0 where bottom is 0. The offset does not follow the sign of bottom: it is the reference's."""
    shifted = bottom + 1e-9
    shifted = torch.where(shifted == 0, torch.full_like(shifted, 1e-9), shifted)
    return torch.where(bottom == 0, torch.zeros_like(shifted), top / shifted)


class LinearRelevance(torch.autograd.Function):
    """x W^T + b; the bias gets no relevance.

    joint (rule set "new"): products of equal sign share R over one denominator, z = x+ W+^T + x- W-^T.
    Otherwise ("orig"): x+ W+ and x- W- each share the whole of R over their own denominator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, joint: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.joint = joint
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, ...]:
        (relevance,) = relevances
        x, weight = ctx.saved_tensors
        above, below, positive, negative = x.clamp(min=0), x.clamp(max=0), weight.clamp(min=0), weight.clamp(max=0)
        if ctx.joint:
            shares = safe_divide(relevance, linear(above, positive).add_(linear(below, negative)))
            # x+ and x- do not overlap, so each entry needs one of the two products.
            return torch.where(x > 0, x * (shares @ positive), x * (shares @ negative)), None, None, None
        up = safe_divide(relevance, linear(above, positive))
        down = safe_divide(relevance, linear(below, negative))
        return above * (up @ positive) + below * (down @ negative), None, None, None


class AddRelevance(torch.autograd.Function):
    """a + b, each with its own part of R / (a + b).

    rescale (rule set "new"): the two parts then share the sample's total relevance in proportion to the absolute values of
    their own totals, all totals being taken over one sample.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rescale: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rescale = rescale
        return a + b

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, ...]:
        (relevance,) = relevances
        a, b = ctx.saved_tensors
        share = safe_divide(relevance, a + b)
        of_a, of_b = a * share, b * share
        if ctx.rescale:
            total_a, total_b, total = (r.flatten(1).sum(1).view(-1, *[1] * (r.ndim - 1)) for r in (of_a, of_b, relevance))
            both = total_a.abs() + total_b.abs()
            of_a = of_a * safe_divide(safe_divide(total_a.abs(), both) * total, total_a)
            of_b = of_b * safe_divide(safe_divide(total_b.abs(), both) * total, total_b)
        return of_a, of_b, None


class MatmulRelevance(torch.autograd.Function):
    """a @ b; each factor gets itself times the gradient of R / (a @ b), halved."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        ctx.save_for_backward(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, ...]:
        (relevance,) = relevances
        a, b, product = ctx.saved_tensors
        share = safe_divide(relevance, product)
        of_a = a * (share @ b.mT) / 2 if ctx.needs_input_grad[0] else None
        of_b = b * (a.mT @ share) / 2 if ctx.needs_input_grad[1] else None
        return of_a, of_b


class CloneRelevance(torch.autograd.Function):
    """A tensor read `times` over: x times the sum of R / x, so that an activation of exactly 0 loses its relevance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        return tuple(x.clone() for _ in range(times))

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return x * sum(safe_divide(r, x) for r in relevances), None


class PassedRelevance(torch.autograd.Function):
    """Any function whose relevance passes unchanged: layer norm, GELU, softmax of the scaled scores."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> tuple[Tensor | None, ...]:
        return relevances[0], None


def patch_relevance(
    image: Float[Tensor, "B 3 H W"], relevance: Float[Tensor, "B L d"], patch: Weights, grid: tuple[int, int]
) -> Float[Tensor, "B H W"]:
    """Relevance of the pixels, summed over colours: the z^B rule with bounds at each image's least and greatest value.

    Signed, not clamped; the bias takes no part.
    """
    weight = patch.weight
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    stride = (weight.shape[-2], weight.shape[-1])
    low = image.amin((1, 2, 3), keepdim=True).expand_as(image)
    high = image.amax((1, 2, 3), keepdim=True).expand_as(image)
    arriving = rearrange(relevance, "B (h w) d -> B d h w", h=grid[0], w=grid[1])
    explained = (
        conv2d(image, weight, stride=stride) - conv2d(low, positive, stride=stride) - conv2d(high, negative, stride=stride)
    )
    share = arriving / (explained + 1e-9)
    back = image * conv_transpose2d(share, weight, stride=stride)
    back = back - low * conv_transpose2d(share, positive, stride=stride) - high * conv_transpose2d(share, negative, stride=stride)
    return back.sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class RelevanceGraph:
    """A tower's forward pass, ready to hand relevance down from the score to any of these tensors."""

    score: Float[Tensor, " B"]
    attention: tuple[Float[Tensor, "B A T T"], ...]
    """After softmax, by block."""
    inputs: tuple[Float[Tensor, "B T d"], ...]
    """Residual stream before each block, then after the last."""
    tokens: Float[Tensor, "B T d"]
    """Class token and embedded patches before the position embedding is added."""

    def relevance_of(self, *tensors: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        """Relevance that starts as 1 at the score; keep: the graph is used again."""
        return torch.autograd.grad(self.score, tensors, torch.ones_like(self.score), retain_graph=keep)


def relevance_graph(tower: Tower, images: Float[Tensor, "B 3 H W"], rows: Float[Tensor, "B r"], rules: str) -> RelevanceGraph:
    """Run the tower out of relevance rules. rows: weights of the last linear map that end in the explained output.

    The start is 1 at that output and 0 at the others, which then get nothing; so one row a sample is enough. The division
    by an embedding's length (CLIP) passes relevance unchanged, as the norms do.
    """
    if rules not in RULES:
        raise ConfigError(f'relevance rules: unknown "{rules}". {did_you_mean(rules, RULES)}')
    check_tower(tower)
    joint = rules == "new"

    with torch.enable_grad(), full_precision():
        with torch.no_grad():
            patches = conv2d(images, tower.patch.weight, tower.patch.bias, stride=tower.patch.weight.shape[-2:])
            patches = rearrange(patches, "B d h w -> B (h w) d")
            tokens = torch.cat([tower.class_token.expand(len(images), 1, -1), patches], dim=1)
        tokens.requires_grad_()
        x = _added(tokens, tower.positions.expand_as(tokens), joint)
        x = _passed(x, tower.pre_norm)
        inputs, matrices = [x], []
        for block in tower.blocks:
            skipped, read = _cloned(x, 2)
            normed = _passed(read, block.first_norm)
            q, k, v = rearrange(_mapped(normed, block.qkv, joint), "B T (n A k) -> n B A T k", n=3, A=tower.heads)
            scores: Tensor = MatmulRelevance.apply(q, k.mT)
            scale = q.shape[-1] ** -0.5
            matrix = _passed(scores, lambda s, scale=scale: softmax(s * scale, dim=-1))  # type: ignore[misc]
            attended: Tensor = MatmulRelevance.apply(matrix, v)
            x = _added(skipped, _mapped(rearrange(attended, "B A T k -> B T (A k)"), block.proj, joint), joint)
            skipped, read = _cloned(x, 2)
            hidden = _passed(_mapped(_passed(read, block.second_norm), block.up, joint), block.activation)
            x = _added(skipped, _mapped(hidden, block.down, joint), joint)
            inputs.append(x)
            matrices.append(matrix)
        (feature,) = _cloned(_passed(x, tower.norm)[:, :1], 1)  # the reference divides and multiplies here too
        for weights in tower.projection:
            feature = _mapped(feature, weights, joint)
        score = torch.cat([_mapped(one, Weights(row[None]), joint) for one, row in zip(feature, rows, strict=True)])[:, 0]
    return RelevanceGraph(score, tuple(matrices), tuple(inputs), tokens)


def _mapped(x: Tensor, weights: Weights, joint: bool) -> Tensor:
    return LinearRelevance.apply(x, weights.weight, weights.bias, joint)


def _passed(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return PassedRelevance.apply(x, function)


def _added(a: Tensor, b: Tensor, rescale: bool) -> Tensor:
    return AddRelevance.apply(a, b, rescale)


def _cloned(x: Tensor, times: int) -> tuple[Tensor, ...]:
    return CloneRelevance.apply(x, times)


def check_tower(tower: Tower) -> None:
    """Raises TapError for parts that no rule is stated for, and ConfigError below float32."""
    if tower.positions.dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"extractor.backbone.dtype is {str(tower.positions.dtype).removeprefix('torch.')}: relevance divides by signed "
            f"activations through every layer and is meaningless in reduced precision. Use float32 or float64."
        )
    if any(block.scaled for block in tower.blocks):
        raise TapError(
            f"relevance of {type(tower.model).__name__}: its blocks have a learnt layer scale, for which no rule is stated. "
            f"Use a plain pre-norm ViT (backbone@extractor.backbone=vit_base_patch16_224)."
        )
    if len(tower.positions) != tower.prefix + tower.grid[0] * tower.grid[1] or tower.prefix != 1:
        raise TapError(
            f"relevance of {type(tower.model).__name__}: it has {tower.prefix} tokens before its patches; wanted one class token "
            f"with a position embedding of its own. Use a plain ViT (backbone@extractor.backbone=vit_base_patch16_224)."
        )


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 off: its ten-bit mantissa is reduced precision under a float32 name. Set back afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
