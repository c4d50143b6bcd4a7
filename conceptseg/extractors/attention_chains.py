"""Attention as a Markov chain on multi-modal diffusion transformers (Erel et al. 2025, arXiv:2507.17657).

The joint attention of prompt and image, mean over heads and layers, is a matrix of transitions. A chain starts at a word's tokens
in the prompt and bounces a few times; its weight on image tokens is the map. One forward pass.
Source: yoterel/attention_chains_code at 1019d0d, flux.py ("bounce_src", "bounce_sink") and helpers.py (prep_for_power_method).
Not checked against the original, which reads images while they are made. Its weights of heads by their second eigenvalue,
its TokenRank and the single-stream blocks are not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from conceptseg.backbones.attention_rows import MeanAttention
from conceptseg.backbones.in_memory import Loaded
from conceptseg.backbones.transformers.concept_stream import ConceptTokens, StreamActivations
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.errors import one_of, real_number
from conceptseg.extractors.across_layers import AcrossLayers
from conceptseg.extractors.cross_attention import PromptCrossAttention
from conceptseg.saliency.views import Axes

MOST_BOUNCES = 10
"""As many as the released demonstration shows."""


def bounced(
    attention: Float[Tensor, "R n n"], start: Float[Tensor, "R C n"], bounces: int, alpha: float, direction: str
) -> Float[Tensor, "R C n"]:
    """Return the weights of C chains on n tokens after some bounces along alpha · attention + (1 - alpha) / n.

    attention: each row sums to 1. start: weights that sum to 1. direction: "incoming" hands a token's weight to those that attend
    to it, each column over its sum; "outgoing" to those it attends to. The matrix of transitions is never written out.
    """
    weights, count = start, attention.shape[-1]
    columns = alpha * attention.sum(1)[:, None] + (1 - alpha)
    for _ in range(bounces):
        weights = weights / weights.sum(-1, keepdim=True)
        if direction == "incoming":
            weights = weights / columns
        moved = weights @ (attention.mT if direction == "incoming" else attention)
        weights = alpha * moved + (1 - alpha) / count * weights.sum(-1, keepdim=True)
    return weights


@dataclass
class Chains:
    """The mean attention of a set of layers; words: the share of each of the prompt's N tokens in each word."""

    words: Float[Tensor, "R C N"]
    alpha: float
    direction: str
    attention: MeanAttention = field(default_factory=MeanAttention)

    def add(self, found: StreamActivations) -> None:
        """Add one layer."""
        keys = found.joint_keys()
        self.attention.add(found.joint_queries(), keys, keys.shape[-1] ** -0.5)

    def maps(self, space: str) -> Float[Tensor, "R C L"]:
        """Return the weights on the L image tokens after as many bounces as the space names."""
        attention, prompt = self.attention.read(), self.words.shape[-1]
        start = pad(self.words, (0, attention.shape[-1] - prompt))
        return bounced(attention, start, int(space.removeprefix("bounce_")), self.alpha, self.direction)[..., prompt:]


class AttentionChains(AcrossLayers, PromptCrossAttention):
    """The prompt is the task's words, joined by blanks; space "bounce_2" reads two bounces from each word's tokens.

    direction: "incoming" follows the attention that tokens receive (the released "bounce_src"), "outgoing" the attention that
    they pay ("bounce_sink"). alpha: the matrix's share in each step, the rest goes evenly to all tokens.
    noise, posterior, guidance, seed: as for ConceptAttention.
    """

    version = 1

    def __init__(
        self,
        backbone: MultiModalBackbone | Loaded,
        direction: str = "incoming",
        alpha: float = 0.99,
        noise: str = "per_sample",
        posterior: str = "mode",
        guidance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, noise=noise, posterior=posterior, guidance=guidance, seed=seed)
        one_of("extractor.direction", direction, ("incoming", "outgoing"))
        real_number("extractor.alpha", alpha, 0, 1)
        self.direction, self.alpha = direction, alpha

    def axes(self) -> Axes:
        spaces = tuple(f"bounce_{count}" for count in range(1, MOST_BOUNCES + 1))
        return Axes(spaces=spaces, layers=self.backbone.layers, has_timesteps=True, has_vectors=False)

    def gathering(self, concepts: ConceptTokens) -> Chains:
        assert concepts.words is not None
        return Chains(concepts.words.to(torch.float32), self.alpha, self.direction)
