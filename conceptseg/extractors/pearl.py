"""PEARL (arXiv:2603.21528): keys are rotated onto the queries before the last block attends, without residual and MLP.

Source: PGSmall/PEARL at c26062b, as a third party describes it; the code itself was not at hand. Not checked against the
original. Its optional refinement of the maps by a text-aware Laplacian is not implemented.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from conceptseg.backbones.encoders.image_encoder import ImageEncoder
from conceptseg.errors import in_range
from conceptseg.extractors.image_model import PatchTextMethod
from conceptseg.types import Batch


def polar_factor(matrix: Float[Tensor, "*n k k"], steps: int) -> Float[Tensor, "*n k k"]:
    """Approach the orthogonal polar factor by Newton-Schulz steps X (3 I - Xᵀ X) / 2, from the matrix over its Frobenius norm.

    Few steps leave directions of small singular values shorter than 1. A zero matrix stays zero.
    """
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    x = matrix / torch.where(norm == 0, torch.ones_like(norm), norm)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


class PEARL(PatchTextMethod):
    """softmax((q (k R)ᵀ + weight · k_c k_cᵀ) / √d) times the values, through the output projection. One forward pass.

    R is the polar factor of k_cᵀ q_c in every head, where q_c and k_c are queries and keys less their mean over all tokens: the
    rotation that brings the keys closest to the queries (orthogonal Procrustes).
    steps: of Newton-Schulz, 5 in the released code. weight: of the keys' own similarity, 0.08 there.
    """

    version = 1

    def __init__(self, backbone: ImageEncoder, steps: int = 5, weight: float = 0.08) -> None:
        super().__init__(backbone)
        in_range("extractor.steps", steps, 1, 100)
        self.steps, self.weight = steps, weight

    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        queries, keys, values = self.last_query_key_value(batch)
        centred_queries, centred_keys = (x - x.mean(-2, keepdim=True) for x in (queries, keys))
        rotation = polar_factor(centred_keys.mT @ centred_queries, self.steps)
        scores = queries @ (keys @ rotation).mT + self.weight * centred_keys @ centred_keys.mT
        return self.read_out(torch.softmax(scores * queries.shape[-1] ** -0.5, dim=-1) @ values)
