"""Layer-wise relevance for vision transformers: autograd operations whose backward passes hand down relevance.

What the stock model computed in its one forward pass is linked a second time by these operations, and one call of autograd
gives the relevance of every attention matrix of a batch. The rules divide by signed activations, which may be close to 0, layer
after layer: in float32 the last bit of a matrix product can decide the whole map of an image, so that maps differ between
processors. In float64 they agree (docs/baselines.md). Anything below float32 is refused.

Source: Chefer et al. 2021 (arXiv:2012.09838) and
hila-chefer/Transformer-Explainability at c3e578f, modules/layers_ours.py:
rule set "new" (TransInterp) and rule set "orig" (LRP, partial LRP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, linear

from conceptseg.backbones.encoders.activations import Activations
from conceptseg.backbones.encoders.tower import Tower, Weights
from conceptseg.errors import ConfigError, TapError, did_you_mean

RULES = ("new", "orig")


def safe_divide(top: Float[Tensor, "*n"], bottom: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return top / (bottom + 1e-9), entry by entry, and 0 where bottom is 0.

    The offset does not follow the sign of bottom, as in the reference.
    """
    shifted = bottom + 1e-9
    # Choosing entry by entry costs more than dividing, and few calls hold a zero: look for one first.
    if int(torch.count_nonzero(bottom * shifted)) == shifted.numel():
        return torch.div(top, shifted, out=shifted)
    shifted = torch.where(shifted == 0, torch.full_like(shifted, 1e-9), shifted)
    return torch.where(bottom == 0, torch.zeros_like(shifted), top / shifted)


class LinearRelevance(torch.autograd.Function):
    """x W^T + b, whose value the host has computed; the bias gets no relevance.

    joint (rule set "new"): products of equal sign share R over one denominator, z = x+ W+^T + x- W-^T.
    Otherwise ("orig"): x+ W+ and x- W- each share the whole of R over their own denominator.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "*n i"], weights: Weights, value: Float[Tensor, "*n o"], joint: bool
    ) -> Float[Tensor, "*n o"]:
        """Return the known output, value = x W^T + b."""
        ctx.save_for_backward(x, value)
        ctx.weights, ctx.joint = weights, joint
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *relevances: Float[Tensor, "*n o"]) -> tuple[Float[Tensor, "*n i"] | None, ...]:
        """Return the relevance of x from that of the output, and None for the other arguments."""
        (relevance,) = relevances
        x, value = ctx.saved_tensors
        weight, above, below = ctx.weights.weight, x.clamp(min=0), x.clamp(max=0)
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        if ctx.joint:
            up = down = relevance / equal_signs(x, ctx.weights, value).add_(1e-9)
        else:
            up = safe_divide(relevance, linear(above, positive))
            down = safe_divide(relevance, linear(below, negative))
        return above.mul_(up @ positive).addcmul_(below, down @ negative), None, None, None


def equal_signs(x: Float[Tensor, "*n i"], weights: Weights, value: Float[Tensor, "*n o"]) -> Float[Tensor, "*n o"]:
    """Return x+ W+^T + x- W-^T, not negative, from the known value x W^T + b.

    x W^T is the sum of the products of equal sign and of those of unequal sign, |x| |W|^T their difference: half of both
    together takes one matrix product where the definition takes two. Cancellation costs digits: on the lab's models at most
    2e-5 relative in float32 (two products: 5e-7) and 3e-14 in float64. Where nothing is of equal sign, rounding may leave a
    little, which then divides relevance that nothing gets.
    """
    products = value if weights.bias is None else value - weights.bias
    flat, magnitudes = products.reshape(-1, products.shape[-1]), x.abs().reshape(-1, x.shape[-1])
    found = torch.addmm(flat, magnitudes, weights.weight.abs().T, beta=0.5, alpha=0.5).clamp_(min=0)
    return found.view_as(products)


class AddRelevance(torch.autograd.Function):
    """a + b, each with its own part of R / (a + b).

    rescale (rule set "new"): the two parts then share the sample's total relevance in proportion to the absolute values of
    their own totals, all totals being taken over one sample.
    """

    @staticmethod
    def forward(ctx: Any, a: Float[Tensor, "B ..."], b: Float[Tensor, "B ..."], rescale: bool) -> Float[Tensor, "B ..."]:
        """Return a + b."""
        ctx.save_for_backward(a, b)
        ctx.rescale = rescale
        return a + b

    @staticmethod
    def backward(ctx: Any, *relevances: Float[Tensor, "B ..."]) -> tuple[Float[Tensor, "B ..."] | None, ...]:
        """Return the relevance of a and of b from that of the sum, and None for `rescale`."""
        (relevance,) = relevances
        a, b = ctx.saved_tensors
        share = safe_divide(relevance, a + b)
        of_a, of_b = a * share, b * share
        if ctx.rescale:
            total_a, total_b, total = (r.flatten(1).sum(1).view(-1, *[1] * (r.ndim - 1)) for r in (of_a, of_b, relevance))
            both = total_a.abs() + total_b.abs()
            of_a.mul_(safe_divide(safe_divide(total_a.abs(), both) * total, total_a))
            of_b.mul_(safe_divide(safe_divide(total_b.abs(), both) * total, total_b))
        return of_a, of_b, None


class MatmulRelevance(torch.autograd.Function):
    """a @ b; each factor gets itself times the gradient of R / (a @ b), halved."""

    @staticmethod
    def forward(ctx: Any, a: Float[Tensor, "*n i k"], b: Float[Tensor, "*n k j"]) -> Float[Tensor, "*n i j"]:
        """Return a @ b."""
        product = a @ b
        ctx.save_for_backward(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, *relevances: Float[Tensor, "*n i j"]) -> tuple[Float[Tensor, "*n _ _"] | None, ...]:
        """Return the relevance of a, [*n i k], and of b, [*n k j], from that of the product."""
        (relevance,) = relevances
        a, b, product = ctx.saved_tensors
        share = safe_divide(relevance, product).mul_(0.5)
        of_a = (share @ b.mT).mul_(a) if ctx.needs_input_grad[0] else None
        of_b = (a.mT @ share).mul_(b) if ctx.needs_input_grad[1] else None
        return of_a, of_b


class CloneRelevance(torch.autograd.Function):
    """A tensor read `times` over: x times the sum of R / x, so that an activation of exactly 0 loses its relevance."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*n"], times: int) -> tuple[Float[Tensor, "*n"], ...]:
        """Return x `times` over."""
        ctx.save_for_backward(x)
        return tuple(x.detach() for _ in range(times))

    @staticmethod
    def backward(ctx: Any, *relevances: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"] | None, ...]:
        """Return the relevance of x from those of its copies, and None for `times`."""
        (x,) = ctx.saved_tensors
        return safe_divide(sum(relevances), x).mul_(x), None  # type: ignore[arg-type]


class PassedRelevance(torch.autograd.Function):
    """Any function of a known value whose relevance passes unchanged: layer norm, GELU, softmax of the scaled scores."""

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*n"], value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the known value of the function at x."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *relevances: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"] | None, ...]:
        """Return the relevance of the value as that of x, and None for the value."""
        return relevances[0], None


def patch_relevance(
    image: Float[Tensor, "B 3 H W"], relevance: Float[Tensor, "B L d"], patch: Weights, grid: tuple[int, int]
) -> Float[Tensor, "B H W"]:
    """Return the relevance of the pixels, summed over colours: the z^B rule, bounded by each image's least and greatest value.

    image: normalised. relevance: that of the L = h·w patch tokens. Signed, not clamped; the bias takes no part.
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


def token_relevance(
    tower: Tower, images: Float[Tensor, "B 3 H W"], relevance: Float[Tensor, "B T d"], rules: str
) -> Float[Tensor, "B T d"]:
    """Return the share of the first block's input relevance that belongs to tokens rather than to the position embedding."""
    patches = conv2d(images, tower.patch.weight, tower.patch.bias, stride=tower.patch.weight.shape[-2:])
    patches = rearrange(patches, "B d h w -> B (h w) d")
    assert tower.class_token is not None, "methods that read it refuse other towers"
    tokens = torch.cat([tower.class_token.expand(len(images), 1, -1), patches], dim=1).requires_grad_()
    with torch.enable_grad():
        summed = _added(tokens, tower.positions.expand_as(tokens), rules == "new")
    return torch.autograd.grad(summed, tokens, relevance)[0]


@dataclass(frozen=True, slots=True, eq=False)
class RelevanceGraph:
    """A tower's forward pass, ready to hand relevance down from the score to any of these tensors."""

    score: Float[Tensor, " B"]
    attention: tuple[Float[Tensor, "B A _ T"], ...]
    """After softmax, by block; of the last block the class token's row alone."""
    inputs: tuple[Float[Tensor, "B _ d"], ...]
    """Residual stream before each block, then the class token's after the last."""

    def relevance_of(self, *tensors: Float[Tensor, "B ..."], keep: bool = False) -> tuple[Float[Tensor, "B ..."], ...]:
        """Return the relevance of tensors of this graph, each in its own shape; it starts as 1 at the score.

        keep: keep the graph for another call.
        """
        return torch.autograd.grad(self.score, tensors, torch.ones_like(self.score), retain_graph=keep)


def relevance_graph(tower: Tower, activations: Activations, rows: Float[Tensor, "B r"], rules: str) -> RelevanceGraph:
    """Build a second graph over the host's activations, from its first kept block on, whose backward pass is relevance.

    Only attention, which hosts don't expose, and sums are computed again. rows: for each image, the weights of the last linear
    map that lead to the explained output. Relevance starts as 1 at that output and 0 at the others, so one row per image is
    enough. The division by an embedding's length (CLIP) passes relevance unchanged, as the norms do. No relevance reaches the
    last block's other tokens behind its attention, so they are left out there. Raises ConfigError for unknown rules.
    """
    if rules not in RULES:
        raise ConfigError(f'relevance rules: unknown "{rules}". {did_you_mean(rules, RULES)}')
    joint = rules == "new"
    with torch.enable_grad():
        x = activations.entering.detach().requires_grad_()
        inputs, matrices = [x], []
        for block, seen in zip(tower.blocks[activations.first :], activations.blocks, strict=True):
            skipped, read = _cloned(x, 2)
            mapped = _mapped(_passed(read, seen.normed), block.qkv, seen.mapped, joint)
            q, k, v = (part.contiguous() for part in tower.split_heads(mapped))
            if block is tower.blocks[-1]:
                seen, q, skipped = seen.of_class_token(), q[:, :, :1], skipped[:, :1]
            scores: Tensor = MatmulRelevance.apply(q, k.mT)
            matrix = _passed(scores, torch.softmax(scores.detach() * q.shape[-1] ** -0.5, dim=-1))
            mixed = rearrange(MatmulRelevance.apply(matrix, v), "B A T k -> B T (A k)")
            x = _added(skipped, _mapped(mixed, block.proj, seen.attended, joint), joint)
            skipped, read = _cloned(x, 2)
            raised = _mapped(_passed(read, seen.second_normed), block.up, seen.raised, joint)
            x = _added(skipped, _mapped(_passed(raised, seen.activated), block.down, seen.lowered, joint), joint)
            inputs.append(x)
            matrices.append(matrix)
        (feature,) = _cloned(_passed(x, tower.norm(x.detach())), 1)  # the reference divides and multiplies here too
        for weights in tower.projection:
            feature = _mapped(feature, weights, linear(feature.detach(), weights.weight, weights.bias), joint)
        score = torch.cat([_read_out(one, row, joint) for one, row in zip(feature, rows, strict=True)])
    return RelevanceGraph(score, tuple(matrices), tuple(inputs))


def _read_out(feature: Float[Tensor, "1 r"], row: Float[Tensor, " r"], joint: bool) -> Float[Tensor, " 1"]:
    return _mapped(feature, Weights(row[None]), feature.detach() @ row[:, None], joint)[0]


def _mapped(x: Tensor, weights: Weights, value: Tensor, joint: bool) -> Tensor:
    return LinearRelevance.apply(x, weights, value, joint)


def _passed(x: Tensor, value: Tensor) -> Tensor:
    return PassedRelevance.apply(x, value)


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


def _float32_products() -> tuple[Any, ...]:
    """torch's settings of the precision that each library may take float32 products in."""
    b: Any = torch.backends
    return b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products in float32: TF32 and bfloat16, which a GPU or a CPU may take instead, are off. Set back afterwards."""
    before = [(library, library.fp32_precision) for library in _float32_products()]
    try:
        for library, _ in before:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, precision in before:
            library.fp32_precision = "none"  # torch's setting for all libraries counts again, where there is one
            if library.fp32_precision != precision:
                library.fp32_precision = precision
