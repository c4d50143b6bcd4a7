"""OSP (orthogonal semantic projection, arXiv:2606.14758): LeGrad on the part of a word that other words do not explain.

Source: emirhanbilgic/Orthogonal-Semantic-Projection at 3701581, scripts/sparse_encoding.py (omp_sparse_residual). Its
dictionaries are neighbours from WordNet or a file; here they are the image's other words, absent ones included, or a given list.
Not checked against the original.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.in_memory import Loaded
from conceptseg.errors import ConfigError, in_range, real_number
from conceptseg.extractors.legrad import LeGrad
from conceptseg.types import Batch, checked_word, folded

LEAST = 1e-6
"""Correlations and residuals below this end the pursuit; also the ridge of its least squares."""


def residual(word: Float[Tensor, " k"], dictionary: Float[Tensor, "n k"], atoms: int) -> Float[Tensor, " k"]:
    """Return the unit residual of a unit vector after orthogonal matching pursuit with at most `atoms` unit rows of a dictionary.

    Each step takes the row of greatest absolute product with the residual and fits all taken rows by least squares. A word that
    the dictionary explains wholly keeps its own vector.
    """
    taken: list[int] = []
    left = word
    for _ in range(min(atoms, len(dictionary))):
        products = (dictionary @ left).abs()
        products[taken] = -1
        best = int(products.argmax())
        if products[best] <= LEAST:
            break
        taken.append(best)
        rows = dictionary[taken]
        gram = rows @ rows.T + LEAST * torch.eye(len(taken)).to(rows)
        left = word - torch.linalg.solve(gram, rows @ word) @ rows
        if left.norm() <= LEAST:
            return word
    return normalize(left, dim=0)


class OSP(LeGrad):
    """LeGrad of each word's residual over a dictionary of words; a word that the image lacks is left with less to find.

    dictionary: "concepts" for the other words of the image, background words and absent names included, or a list of words.
    atoms: most of them that are used, 8 in the released code. most_alike: words whose cosine with the word exceeds it are left
    out, 0.6 there. layers: as for LeGrad.
    """

    version = 1

    def __init__(
        self,
        backbone: ImageEncoder | Loaded,
        layers: int = 2,
        dictionary: str | Sequence[str] = "concepts",
        atoms: int = 8,
        most_alike: float = 0.6,
    ) -> None:
        super().__init__(backbone, layers)
        if isinstance(dictionary, str) and dictionary != "concepts":
            raise ConfigError(f'extractor.dictionary is "{dictionary}"; wanted concepts, or a list of words.')
        in_range("extractor.atoms", atoms, 1, 1000)
        real_number("extractor.most_alike", most_alike, -1, 1)
        self.atoms, self.most_alike = atoms, most_alike
        self.dictionary = (
            None if isinstance(dictionary, str) else [checked_word(word, "extractor.dictionary") for word in dictionary]
        )

    def named(self, names: Sequence[str], batch: Batch) -> Explained:
        rows = []
        for name, concepts in zip(names, batch.concepts, strict=True):
            others = [word for word in self.dictionary or concepts.names if folded(word) != folded(name)]
            (word,) = self.backbone.text_vectors([name])
            vectors = self.backbone.text_vectors(others) if others else word[None][:0]
            rows.append(residual(word, vectors[vectors @ word <= self.most_alike], self.atoms))
        return Explained(torch.stack(rows), None)
