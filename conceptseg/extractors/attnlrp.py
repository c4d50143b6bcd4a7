"""AttnLRP (Achtibat et al. 2024, arXiv:2402.05602): relevance through attention as gradient times input with changed gradients.

Source: the paper, section 3.3, and rachtibat/LRP-eXplains-Transformers at 1f37da8. Not checked against the original. Linear maps
take the epsilon rule with epsilon towards 0; the gamma rules that the authors tune for vision transformers are not implemented.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.relevance import check_tower, full_precision
from conceptseg.backbones.encoders.tower import Tower
from conceptseg.extractors.image_model import ClassMethod, needs_gradient
from conceptseg.types import Batch


def identity_norm(norm: nn.Module, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Apply a layer norm whose standard deviation is a constant of the backward pass; an identity stays one."""
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return centred / spread * norm.weight + norm.bias


def identity_activation(activation: nn.Module, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Apply an activation as x times a constant of the backward pass, f(x) / x, so that its relevance is that of x."""
    with torch.no_grad():
        factor = torch.where(x == 0, torch.zeros_like(x), activation(x) / torch.where(x == 0, torch.ones_like(x), x))
    return x * factor


def halved(product: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return a product of two activations, of whose gradient half is handed down: each factor gets half of the relevance."""
    return 0.5 * product + 0.5 * product.detach()


def relevance_forward(tower: Tower, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B r"]:
    """Run the tower's weights on images as operations with AttnLRP's gradients; the value is the host's own, up to rounding.

    Returns the class token after the final norm and projection, of r features.
    """
    assert tower.class_token is not None, "methods that read it refuse other towers"
    patches = conv2d(images, tower.patch.weight, tower.patch.bias, stride=tower.patch.weight.shape[-2:])
    tokens = torch.cat([tower.class_token.expand(len(images), 1, -1), rearrange(patches, "B d h w -> B (h w) d")], dim=1)
    x = identity_norm(tower.pre_norm, tokens + tower.positions)
    for layer, block in enumerate(tower.blocks):
        queries, keys, values = tower.query_key_value(layer, identity_norm(block.first_norm, x))
        attention = torch.softmax(halved(queries @ keys.mT) * queries.shape[-1] ** -0.5, dim=-1)
        mixed = rearrange(halved(attention @ values), "B A T k -> B T (A k)")
        x = x + linear(mixed, block.proj.weight, block.proj.bias)
        hidden = linear(identity_norm(block.second_norm, x), block.up.weight, block.up.bias)
        x = x + linear(identity_activation(block.activation, hidden), block.down.weight, block.down.bias)
    feature = identity_norm(tower.norm, x[:, 0])
    for weights in tower.projection:
        feature = linear(feature, weights.weight, weights.bias)
    return feature


class AttnLRP(ClassMethod):
    """Signed relevance of the pixels, summed over colours. A forward pass of the host, one of ours, a backward pass per class.

    Softmax passes its gradient, the two factors of a matrix product share their relevance by halves, layer norms and activations
    pass it unchanged. The bias of a linear map keeps its share. CLIP's division by the image vector's length is a constant.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, explained_class: str = "predicted") -> None:
        super().__init__(backbone, explained_class)

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        check_tower(self.backbone.tower)
        images = self.backbone.images(batch.tasks)
        with full_precision():
            with torch.no_grad():
                output = self.backbone.run(images)
            with torch.enable_grad():
                root = needs_gradient(images)
                feature = relevance_forward(self.backbone.tower, root)
            return self.by_class(batch, output, partial(self._explain, root, feature))

    def _explain(self, root: Tensor, feature: Tensor, explained: Explained) -> Float[Tensor, "B h w"]:
        (gradient,) = torch.autograd.grad((feature * explained.rows).sum(), root, retain_graph=True)
        return (root.detach() * gradient).sum(1)
