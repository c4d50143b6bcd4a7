"""Base class of image encoders with a text tower: text vectors averaged over prompt templates, and zero-shot classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from conceptseg.announcing import announced, counted
from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of
from conceptseg.types import folded

TEMPLATE_LISTS = ("openai_imagenet",)
TEXTS_AT_ONCE = 256


class ImageTextEncoder(ImageEncoder):
    """A stock model that gives images and texts vectors in one space.

    templates: prompts that a name is put into, "{}" standing for it; a name's vector is the mean of their unit vectors, made a
        unit vector again. "openai_imagenet" are OpenAI's 80.
    """

    classifies = True

    def __init__(self, path: str, trained_on: str, templates: str | Sequence[str], **settings: Any) -> None:
        super().__init__(path, trained_on, **settings)
        if isinstance(templates, str):
            one_of("extractor.backbone.templates", templates, TEMPLATE_LISTS)
        elif not templates or any("{}" not in t for t in templates):
            raise ConfigError(f'extractor.backbone.templates is {list(templates)}; wanted prompts with "{{}}" for the name.')
        self._templates = templates
        self._vectors: dict[tuple[tuple[str, ...], str], Float[Tensor, " k"]] = {}

    def identity(self) -> dict[str, Any]:
        templates = self._templates if isinstance(self._templates, str) else list(self._templates)
        return {**super().identity(), "templates": templates}

    @cached_property
    def templates(self) -> tuple[str, ...]:
        if self._templates == "openai_imagenet":
            from open_clip import OPENAI_IMAGENET_TEMPLATES

            return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
        return tuple(self._templates)

    @property
    @abstractmethod
    def logit_scale(self) -> Float[Tensor, ""]:
        """The factor of cosines before softmax or sigmoid."""

    @abstractmethod
    def project(self, tokens: Float[Tensor, "B *L d"]) -> Float[Tensor, "B *L k"]:
        """Bring outputs of the tower's last block into the common space; k wide, not of unit length."""

    @abstractmethod
    def token_ids(self, texts: Sequence[str]) -> Int[Tensor, "n N"]:
        """Return token ids of n texts, padded to the context length N. Raises DataError for a longer text or unknown word."""

    @abstractmethod
    def encode_tokens(self, ids: Int[Tensor, "n N"]) -> Float[Tensor, "n k"]:
        """Encode n texts, given as token ids, as vectors of width k, not of unit length."""

    def text_vectors(self, names: Sequence[str], templates: Sequence[str] | None = None) -> Float[Tensor, "n k"]:
        """Return a unit vector per name, averaged over the templates; every name is encoded once."""
        prompts = self.templates if templates is None else tuple(templates)
        new = [name for name in dict.fromkeys(names) if (prompts, name) not in self._vectors]
        model = type(self).__name__.removesuffix("Backbone")
        count = f"encoding {len(new)} name{'' if len(new) == 1 else 's'} in {len(prompts)} prompts with {model}"
        with announced(count, usually_short=len(new) * len(prompts) <= TEXTS_AT_ONCE or self.checkpoint.path.startswith("lab:")):
            for name in counted(new, count):
                found = normalize(self.encode_tokens(self.token_ids([t.replace("{}", name) for t in prompts])), dim=-1)
                self._vectors[prompts, name] = normalize(found.mean(0), dim=0)
        return torch.stack([self._vectors[prompts, name] for name in names])

    # ------------------------------------------------------------ outputs

    def predicted(self, output: Float[Tensor, "B k"]) -> Explained:
        vectors = self.text_vectors(self.labels)
        return Explained(vectors[(output @ vectors.T).argmax(1)], None)

    def named(self, names: Sequence[str]) -> Explained:
        return Explained(self.text_vectors(names), None)

    def score(self, output: Float[Tensor, "B k"], explained: Explained) -> Float[Tensor, " B"]:
        return (normalize(output, dim=-1) * explained.rows).sum(-1)

    def class_logits(self, output: Float[Tensor, "B k"], words: Sequence[str] = ()) -> Float[Tensor, "B K"]:
        vectors = self.text_vectors(self._classes(words))
        return self.logit_scale * normalize(output, dim=-1) @ vectors.T

    def class_of(self, word: str, words: Sequence[str]) -> int:
        return [folded(name) for name in self._classes(words)].index(folded(word))

    def _classes(self, words: Sequence[str]) -> tuple[str, ...]:
        """The labels, and the words that are not among them."""
        known = {folded(label) for label in self.labels}
        return (*self.labels, *(word for word in words if folded(word) not in known))


def padded_ids(tokenizer: Any, texts: Sequence[str], length: int) -> Int[Tensor, "n N"]:
    """Return ids of n texts from a tokenizer of transformers, padded to N = length. Raises DataError for an unknown word."""
    unknown = tokenizer.unk_token_id
    found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ids: Tensor = found.input_ids
    for text, row in zip(texts, ids.tolist(), strict=True):
        if unknown is not None and unknown in row and unknown != tokenizer.eos_token_id:
            word = next((w for w in text.split() if unknown in tokenizer(w).input_ids), text)
            words = [w for w in tokenizer.get_vocab() if w.isalpha()]
            raise DataError(f'the text "{text}": "{word}" is unknown to this tokenizer. {did_you_mean(word, words)}')
    return ids
