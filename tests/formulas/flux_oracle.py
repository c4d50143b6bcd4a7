"""The double blocks of FLUX.1 with concepts beside them, written out pair by pair in float64, and tiny models to hold against it.

The oracle knows nothing of diffusers' modules: it takes weights by name and follows the equations of the reference
(Helbling et al. 2025, arXiv:2502.04320, section 4). Text, image and concepts are kept apart throughout,
softmax is a quotient of sums, rotation turns one pair of features at a time.
"""

import math

import torch
from diffusers import FluxTransformer2DModel

from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.saliency.views import Fold, Normalize, Softmax

HEADS, WIDTH, LAYERS, GRID, ROPE = 2, 8, 3, (3, 2), (2, 4, 2)
LEVEL = 0.5
BOTH, CROSS_ONLY, SELF_ONLY, NEITHER = (True, True), (True, False), (False, True), (False, False)

# The host is float64, but diffusers computes angles, rotations, the variance of QK-norms and (here) dot products in float32:
# relative errors of 1e-7 that three blocks with modulations of order 1 raise to some 1e-6 of scores of magnitude 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def random_flux(guidance=False, seed=0):
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=LAYERS, num_single_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS,
        joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=guidance, axes_dims_rope=ROPE,
    )  # fmt: skip
    for name, weight in model.named_parameters():
        spread = 1.3 / math.sqrt(weight.shape[-1]) if weight.ndim == 2 else 0.3
        torch.nn.init.normal_(weight, 1.0 if "norm_" in name and weight.ndim == 1 and "linear" not in name else 0.0, spread)
    return model.double().eval()


def wrapped(model):
    backbone = FluxBackbone("lab:none", dtype="float64")
    backbone.transformer, backbone.config = model, dict(model.config)
    return backbone


def inputs(rows=2, concepts=4, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(rows, 4, 2 * GRID[0], 2 * GRID[1], generator=g, dtype=torch.float64),
        "captions": torch.randn(rows, 5, 12, generator=g, dtype=torch.float64),
        "concepts": torch.randn(rows, concepts, 12, generator=g, dtype=torch.float64),
    }


# ---------------------------------------------------------------- the oracle


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)


def sinus(value):
    """[cos, sin] of 1000·t at 128 frequencies, in float32 as released: at phase 500 float64 differs by 1e-5."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    phases = torch.tensor(1000 * value, dtype=torch.float32) * frequencies
    return torch.cat([torch.cos(phases), torch.sin(phases)]).double()


def rotate(vector, position):
    """Each pair of features (2i, 2i+1) turned by its angle; position is (0, row, column), one axis after the other."""
    turned, at = vector.clone(), 0
    for axis, size in enumerate(ROPE):
        for i in range(size // 2):
            angle = position[axis] / 10000 ** (2 * i / size)
            a, b = vector[at].item(), vector[at + 1].item()
            turned[at] = a * math.cos(angle) - b * math.sin(angle)
            turned[at + 1] = a * math.sin(angle) + b * math.cos(angle)
            at += 2
    return turned


def attend(queries, keys, values):
    """One head: every query's mean of the values, weighted by exp(q·k / sqrt(d))."""
    outputs = []
    for q in queries:
        logits = [(q @ k).item() / math.sqrt(WIDTH) for k in keys]
        weights = [math.exp(x - max(logits)) for x in logits]
        outputs.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    return torch.stack(outputs)


def shapley(scores):
    """Each concept's mean softmax over every coalition that holds it, weighted by (|T| - 1)! (C - |T|)! / C!; no background."""
    count, found = len(scores), torch.zeros_like(scores)
    for bits in range(1, 2**count):
        inside = [c for c in range(count) if bits >> c & 1]
        weight = math.factorial(len(inside) - 1) * math.factorial(count - len(inside)) / math.factorial(count)
        shares = torch.exp(scores[inside] - scores[inside].max(0).values)
        found[inside] += weight * shares / shares.sum(0)
    return found


class Oracle:
    """One image: text p, image x and concepts c through the double blocks, everything that can be scored kept by layer."""

    def __init__(self, model, switches=BOTH, guidance=0.0):
        self.weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
        self.guided, self.guidance = model.config.guidance_embeds, guidance
        self.cross, self.own = switches

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name, x):
        return self.linear(f"{name}.linear_2", silu(self.linear(f"{name}.linear_1", x)))

    def conditioning(self, level, pooled):
        vector = self.mlp("time_text_embed.timestep_embedder", sinus(level)) + self.mlp("time_text_embed.text_embedder", pooled)
        return vector + self.mlp("time_text_embed.guidance_embedder", sinus(self.guidance)) if self.guided else vector

    def heads(self, x, norm=None):
        """[tokens, A·d] -> [A, tokens, d], each vector divided by its root mean square and scaled where a norm is named."""
        split = x.reshape(len(x), HEADS, WIDTH).transpose(0, 1)
        if norm is None:
            return split
        return split / torch.sqrt((split**2).mean(-1, keepdim=True) + 1e-6) * self.weights[f"{norm}.weight"]

    def projected(self, at, stream, normed):
        q, k, v = {
            "image": ("to_q", "to_k", "to_v"), "text": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }[stream]  # fmt: skip
        norm = "norm" if stream == "image" else "norm_added"
        return (
            self.heads(self.linear(f"{at}.attn.{q}", normed), f"{at}.attn.{norm}_q"),
            self.heads(self.linear(f"{at}.attn.{k}", normed), f"{at}.attn.{norm}_k"),
            self.heads(self.linear(f"{at}.attn.{v}", normed)),
        )

    def __call__(self, noisy, caption, concepts, level, pooled=None):
        """Per layer, what the blocks hold for scoring. noisy: latents [c 2h 2w]; pooled: the caption's vector, zeros if None."""
        positions = [(0, row, column) for row in range(GRID[0]) for column in range(GRID[1])]
        tokens = torch.stack([noisy[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].reshape(-1) for _, r, c in positions])
        x, p, c = (
            self.linear("x_embedder", tokens), self.linear("context_embedder", caption), self.linear("context_embedder", concepts)
        )  # fmt: skip
        zeros = torch.zeros(10, dtype=torch.float64)
        vector, concept_vector = self.conditioning(level, zeros if pooled is None else pooled), self.conditioning(level, zeros)
        found = []
        for layer in range(LAYERS):
            at = f"transformer_blocks.{layer}"
            modulation = {
                "image": self.linear(f"{at}.norm1.linear", silu(vector)).chunk(6),
                "text": self.linear(f"{at}.norm1_context.linear", silu(vector)).chunk(6),
                "concepts": self.linear(f"{at}.norm1_context.linear", silu(concept_vector)).chunk(6),
            }
            normed = {
                name: (1 + modulation[stream][1]) * layer_norm(value) + modulation[stream][0]
                for name, stream, value in (("x", "image", x), ("p", "text", p), ("c", "concepts", c))
            }
            qx, kx, vx = self.projected(at, "image", normed["x"])
            qp, kp, vp = self.projected(at, "text", normed["p"])
            qc, kc, vc = self.projected(at, "text", normed["c"])
            ox, oxc, op, oc, turned_keys, turned_queries = [], [], [], [], [], []
            for a in range(HEADS):
                turned_q = torch.stack([rotate(q, at_) for q, at_ in zip(qx[a], positions, strict=True)])
                turned_k = torch.stack([rotate(k, at_) for k, at_ in zip(kx[a], positions, strict=True)])
                turned_keys.append(turned_k)
                turned_queries.append(turned_q)
                keys, values = torch.cat([kp[a], turned_k]), torch.cat([vp[a], vx[a]])
                ox.append(attend(turned_q, keys, values))
                oxc.append(attend(turned_q, torch.cat([turned_k, kc[a]]), torch.cat([vx[a], vc[a]])))
                op.append(attend(qp[a], keys, values))
                seen = [(kc[a], vc[a])] * self.own + [(turned_k, vx[a])] * self.cross
                keys, values = (torch.cat([pair[i] for pair in seen]) for i in (0, 1)) if seen else (None, None)
                oc.append(attend(qc[a], keys, values) if seen else vc[a])
            found.append(
                {
                    "qc": qc, "kc": kc, "vc": vc, "oc": torch.stack(oc), "qx": qx, "kx": torch.stack(turned_keys), "vx": vx,
                    "ox": torch.stack(ox), "oxc": torch.stack(oxc), "at": at, "turned_q": torch.stack(turned_queries),
                    "qp": qp, "kp": kp, "vp": vp,
                }
            )  # fmt: skip
            x = self.updated(x, found[-1]["ox"], modulation["image"], f"{at}.attn.to_out.0", f"{at}.ff")
            p = self.updated(p, torch.stack(op), modulation["text"], f"{at}.attn.to_add_out", f"{at}.ff_context")
            c = self.updated(c, found[-1]["oc"], modulation["concepts"], f"{at}.attn.to_add_out", f"{at}.ff_context")
        return found

    def joined(self, x):
        return x.transpose(0, 1).reshape(x.shape[1], -1)

    def updated(self, residual, outputs, modulation, projection, feed_forward):
        _, _, gate1, shift2, scale2, gate2 = modulation
        residual = residual + gate1 * self.linear(projection, self.joined(outputs))
        inner = gelu_tanh(self.linear(f"{feed_forward}.net.0.proj", (1 + scale2) * layer_norm(residual) + shift2))
        return residual + gate2 * self.linear(f"{feed_forward}.net.2", inner)

    def vectors(self, space, found):
        """Concept and image vectors of a space, [A C d] and [A L d] with A = 1 where heads are joined."""
        f, whole = found, lambda x: self.joined(x)[None]
        return {
            "output": lambda: (whole(f["oc"]), whole(f["ox"])),
            "output_per_head": lambda: (f["oc"], f["ox"]),
            "output_beside_concepts": lambda: (whole(f["oc"]), whole(f["oxc"])),
            "output_projected": lambda: (
                self.linear(f"{f['at']}.attn.to_add_out", self.joined(f["oc"]))[None],
                self.linear(f"{f['at']}.attn.to_out.0", self.joined(f["ox"]))[None],
            ),
            "cross": lambda: (f["kc"], f["qx"]),
            "cross_query_query": lambda: (whole(f["qc"]), whole(f["qx"])),
            "cross_query_key": lambda: (f["qc"] / math.sqrt(WIDTH), f["kx"]),
            "cross_mixed": lambda: (f["qc"].mean(0, keepdim=True), f["qx"].sum(0, keepdim=True)),
            "value": lambda: (f["vc"], f["vx"]),
            "gramcol": lambda: (self.anchors(f), f["ox"]),
        }[space]()

    def anchors(self, f):
        """The output of the image token whose query meets a concept's key best, head by head and concept by concept."""
        picked = [
            [o[max(range(len(q)), key=lambda i: float(q[i] @ key))] for key in keys]
            for q, keys, o in zip(f["qx"], f["kc"], f["ox"], strict=True)
        ]
        return torch.stack([torch.stack(rows) for rows in picked])

    def cell(self, view, found):
        """Scores [C L] of one layer: normalise concepts, multiply, softmax, and fold heads, one number at a time."""
        concept_vectors, image_vectors = self.vectors(view.space, found)
        heads = []
        for c, x in zip(concept_vectors, image_vectors, strict=True):
            c = c.clone()
            if view.normalize is Normalize.LINEAR:
                for j in range(c.shape[1]):
                    raised = [v - min(c[:, j].tolist()) for v in c[:, j].tolist()]
                    c[:, j] = torch.tensor([v / (sum(raised) or 1) for v in raised])
            elif view.normalize is Normalize.UNIT:
                c = torch.stack([row / math.sqrt(sum(v * v for v in row.tolist())) for row in c])
            scores = torch.tensor([[float(row @ token) for token in x] for row in c], dtype=torch.float64)
            if view.space == "gramcol":
                centred = scores - scores.mean(0)
                scores = centred / (torch.sqrt((centred**2).sum(0) / (len(scores) - 1)) + 1e-6)
            if view.softmax is Softmax.SHAPLEY_PER_CELL:
                scores = shapley(scores)
            elif view.softmax is Softmax.PER_CELL:
                scores = torch.exp(scores) / torch.exp(scores).sum(0, keepdim=True)
            elif view.softmax is Softmax.TOKENS:
                scores = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
            heads.append(scores)
        return sum(heads) / (1 if view.fold is Fold.SUM else len(heads))

    def map(self, view, runs):
        """runs[draw][layer]. Cells added up, divided, and softmaxed in the order the view says."""
        cells = [self.cell(view, found[layer]) for found in runs for layer in view.layers]
        folded = sum(cells) / (1 if view.fold is Fold.SUM else len(cells))
        if view.softmax is Softmax.SHAPLEY:
            folded = shapley(folded)
        elif view.softmax is Softmax.OF_MEAN:
            folded = torch.exp(view.temperature * folded)
            folded = folded / folded.sum(0, keepdim=True)
        return folded.reshape(-1, *GRID)
