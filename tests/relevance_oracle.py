"""Relevance, rule by rule: a forward pass that keeps every activation, then each layer's rule by hand, for one image.

A literal restatement of hila-chefer/Transformer-Explainability at c3e578f, modules/layers_ours.py and
baselines/ViT/ViT_explanation_generator.py: the general rule is alpha - beta with alpha 1 and beta 0, each rule
is the gradient of its layer's own products applied to a quotient, and no step knows of any other. Slow on purpose.
"""

import torch
from torch.nn.functional import conv2d, conv_transpose2d, linear


def quotient(top, bottom):
    """Division that gives 0 where the divisor is 0 (safe_divide)."""
    shifted = bottom.clamp(min=1e-9) + bottom.clamp(max=1e-9)
    shifted = shifted + shifted.eq(0).to(shifted) * 1e-9
    return top / shifted * bottom.ne(0).to(top)


def through(products, relevances, inputs):
    """Gradient of products with regard to inputs, applied to relevances."""
    return torch.autograd.grad(products, inputs, relevances)


class Linear:
    def __init__(self, weights):
        self.weights = weights

    def forward(self, x):
        self.x = x.detach().requires_grad_()
        return linear(x, self.weights.weight, self.weights.bias)

    def relevance(self, arriving, rules):
        w = self.weights.weight
        above, below = w.clamp(min=0), w.clamp(max=0)
        x1, x2 = (c.detach().requires_grad_() for c in (self.x.clamp(min=0), self.x.clamp(max=0)))

        def shared(w1, w2):
            z1, z2 = linear(x1, w1), linear(x2, w2)
            s1 = quotient(arriving, z1 + z2) if rules == "new" else quotient(arriving, z1)
            s2 = quotient(arriving, z1 + z2) if rules == "new" else quotient(arriving, z2)
            return x1 * through(z1, s1, (x1,))[0] + x2 * through(z2, s2, (x2,))[0]

        activator, inhibitor = shared(above, below), shared(below, above)
        return (1 * activator - 0 * inhibitor).detach()


class Add:
    def forward(self, a, b):
        self.a, self.b = (t.detach().requires_grad_() for t in (a, b))
        return a + b

    def relevance(self, arriving, rules):
        total = self.a + self.b
        a, b = (x * g for x, g in zip((self.a, self.b), through(total, quotient(arriving, total), (self.a, self.b)), strict=True))
        if rules == "new":
            share_a, share_b = a.sum().abs(), b.sum().abs()
            whole = share_a + share_b
            a = a * quotient(quotient(share_a, whole) * arriving.sum(), a.sum())
            b = b * quotient(quotient(share_b, whole) * arriving.sum(), b.sum())
        return a.detach(), b.detach()


class Product:
    def forward(self, a, b):
        self.a, self.b = (t.detach().requires_grad_() for t in (a, b))
        return a @ b

    def relevance(self, arriving):
        product = self.a @ self.b
        found = through(product, quotient(arriving, product), (self.a, self.b))
        return tuple((x * g / 2).detach() for x, g in zip((self.a, self.b), found, strict=True))


def clone_relevance(x, *arriving):
    return (x * sum(quotient(r, x) for r in arriving)).detach()


class Block:
    def __init__(self, block, heads):
        self.block, self.heads = block, heads
        self.qkv, self.proj, self.up, self.down = (Linear(w) for w in (block.qkv, block.proj, block.up, block.down))
        self.first, self.second, self.scores, self.mixed = Add(), Add(), Product(), Product()

    def forward(self, x):
        self.x = x
        tokens, width = x.shape[1:]
        qkv = self.qkv.forward(self.block.first_norm(x)).reshape(1, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        self.attention = torch.softmax(self.scores.forward(q, k.transpose(-1, -2)) * (width // self.heads) ** -0.5, dim=-1)
        mixed = self.mixed.forward(self.attention, v).transpose(1, 2).reshape(1, tokens, width)
        self.middle = self.first.forward(x, self.proj.forward(mixed))
        hidden = self.block.activation(self.up.forward(self.block.second_norm(self.middle)))
        return self.second.forward(self.middle, self.down.forward(hidden))

    def relevance(self, arriving, rules):
        tokens, width = arriving.shape[1:]
        skipped, mlp = self.second.relevance(arriving, rules)
        mlp = self.up.relevance(self.down.relevance(mlp, rules), rules)
        middle = clone_relevance(self.middle, skipped, mlp)
        skipped, attended = self.first.relevance(middle, rules)
        attended = self.proj.relevance(attended, rules).reshape(1, tokens, self.heads, width // self.heads).transpose(1, 2)
        self.of_attention, of_values = self.mixed.relevance(attended)
        of_queries, of_keys = self.scores.relevance(self.of_attention)
        parts = torch.stack([of_queries, of_keys.transpose(-1, -2), of_values])
        joined = parts.permute(1, 3, 0, 2, 4).reshape(1, tokens, 3 * width)
        return clone_relevance(self.x, skipped, self.qkv.relevance(joined, rules))


class RuleByRule:
    """One image through a tower, and what its score's relevance is anywhere. `row`: weights of the explained output."""

    def __init__(self, tower, image, row):
        self.tower, self.image, self.row = tower, image, row
        with torch.no_grad():
            patches = conv2d(image, tower.patch.weight, tower.patch.bias, stride=tower.patch.weight.shape[-2:])
            self.tokens = torch.cat([tower.class_token[None, None], patches.flatten(2).transpose(1, 2)], dim=1)
            self.positions = Add()
            x = tower.pre_norm(self.positions.forward(self.tokens, tower.positions[None]))
            self.blocks = [Block(block, tower.heads) for block in tower.blocks]
            for block in self.blocks:
                x = block.forward(x)
            self.normed = tower.norm(x)
            feature = self.normed[:, 0]
            self.head = []
            for weights in tower.projection:
                self.head.append(Linear(weights))
                feature = self.head[-1].forward(feature)
            self.readout = Linear(type(tower.patch)(row[None]))
            self.score = self.readout.forward(feature)

    def relevance(self, rules, down_to=0):
        """Relevance before block `down_to`, filling every block's `of_attention` on the way."""
        arriving = self.readout.relevance(torch.ones_like(self.score), rules)
        for layer in reversed(self.head):
            arriving = layer.relevance(arriving, rules)
        whole = torch.zeros_like(self.normed)
        whole[:, 0] = clone_relevance(self.normed[:, 0], arriving)
        for block in reversed(self.blocks[down_to:]):
            whole = block.relevance(whole, rules)
        return whole

    def last_block(self, rules):
        """Partial LRP (generate_LRP, method "last_layer")."""
        self.relevance(rules, len(self.blocks) - 1)
        return self.blocks[-1].of_attention.clamp(min=0)[0].mean(0)[0, 1:]

    def pixels(self, rules):
        """LRP down to the pixels (generate_LRP, method "full")."""
        of_tokens, _ = self.positions.relevance(self.relevance(rules), rules)
        weight, grid = self.tower.patch.weight, self.tower.grid
        arriving = of_tokens[:, 1:].transpose(1, 2).reshape(1, -1, *grid)
        low, high = (torch.full_like(self.image, float(v)) for v in (self.image.min(), self.image.max()))
        stride = weight.shape[-2:]
        above, below = weight.clamp(min=0), weight.clamp(max=0)
        z = conv2d(self.image, weight, stride=stride) - conv2d(low, above, stride=stride) - conv2d(high, below, stride=stride)
        s = arriving / (z + 1e-9)
        found = self.image * conv_transpose2d(s, weight, stride=stride)
        found = found - low * conv_transpose2d(s, above, stride=stride) - high * conv_transpose2d(s, below, stride=stride)
        return found[0].sum(0)

    def gradients(self, of_cosine):
        """d score / d attention of every block, by autograd through an explicit forward pass."""
        maps, tower = [], self.tower
        x = tower.pre_norm(self.tokens + tower.positions)
        for block in tower.blocks:
            normed = block.first_norm(x)
            width = x.shape[-1]
            qkv = linear(normed, block.qkv.weight, block.qkv.bias).reshape(1, -1, 3, tower.heads, width // tower.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            maps.append(torch.softmax(q @ k.transpose(-1, -2) * (width // tower.heads) ** -0.5, dim=-1).requires_grad_())
            mixed = (maps[-1] @ v).transpose(1, 2).reshape(1, -1, width)
            x = x + linear(mixed, block.proj.weight, block.proj.bias)
            hidden = block.activation(linear(block.second_norm(x), block.up.weight, block.up.bias))
            x = x + linear(hidden, block.down.weight, block.down.bias)
        feature = tower.norm(x)[:, 0]
        for weights in tower.projection:
            feature = linear(feature, weights.weight, weights.bias)
        score = (feature @ self.row) / (feature.norm() if of_cosine else 1)
        return torch.autograd.grad(score.sum(), maps)

    def transinterp(self, of_cosine, start):
        """TransInterp (generate_LRP, method "transformer_attribution")."""
        gradients = self.gradients(of_cosine)
        self.relevance("new")
        product = torch.eye(len(self.tower.positions)).to(self.image)
        for block, gradient in list(zip(self.blocks, gradients, strict=True))[start:]:
            weighted = (gradient * block.of_attention)[0].clamp(min=0).mean(0)
            product = (torch.eye(len(product)).to(product) + weighted) @ product
        return product[0, 1:]
