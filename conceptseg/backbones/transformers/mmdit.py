"""Base class of multi-modal diffusion transformers: text encoded once per string, and one denoiser call."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from inspect import signature
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.announcing import announced, counted
from conceptseg.backbones.settings import check_length
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextCache, TextRecord
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptCarrier, ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.latent_model import LatentModel
from conceptseg.backbones.transformers.prompts import POOLINGS, Prompts, own_tokens, pooled_tokens
from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 16
"""How many texts go through an encoder together; a T5-XXL keeps 0.2 GB of activations a text."""


def _on_host(tensor: Tensor) -> Tensor:
    """Where texts wait; a tensor without values (device "meta", for counting) stays what it is."""
    return tensor if tensor.is_meta else tensor.cpu()


class MultiModalBackbone(LatentModel):
    """A transformer that reads text and image side by side. Weights are read on first use; text is encoded once a string.

    text_tokens: padded text length (where pads are attended the length changes the numbers). concept_pooling: see POOLINGS.
    text_cache: a folder that keeps embedded texts, by encoder and string. text_encoders: "keep", or "release" once new strings
    are encoded: encoders and transformer are then never in memory together. model: the settings of `LatentModel`;
    licence, memory and hub: what a sheet says of the repository, never read here.
    """

    family = "mmdit"
    kind: ClassVar[str]
    """Names the family in run ids."""
    carrier: ClassVar[type[ConceptCarrier]]
    spaces: ClassVar[tuple[str, ...]] = tuple(SPACES)
    rotates_text: ClassVar[bool] = True
    """Whether attention turns the prompt's own keys by a rotary embedding; they are tapped before it."""
    text_encoder_name: ClassVar[str] = "T5"
    """Name of the text encoders in messages."""
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Attributes that hold text encoders."""
    beside_text: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    """Parts of the stock pipeline that encoding texts does without."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        text_tokens: int = 256,
        concept_pooling: str = "first",
        text_cache: str | None = None,
        text_encoders: str = "keep",
        licence: str | None = None,
        memory: str | None = None,
        hub: Mapping[str, Any] | None = None,
        **model: Any,
    ) -> None:
        if unknown := sorted(set(model) - set(signature(LatentModel).parameters)):
            raise ConfigError(f"extractor.backbone.{unknown[0]}: no such setting. {did_you_mean(unknown[0], self.settings())}")
        super().__init__(path, revision, **model)
        one_of("extractor.backbone.concept_pooling", concept_pooling, POOLINGS)
        one_of("extractor.backbone.text_encoders", text_encoders, ("keep", "release"))
        self.text_tokens, self.concept_pooling = text_tokens, concept_pooling
        self.releases_text_encoders = text_encoders == "release"
        self.texts = TextCache(text_cache, self.text_identity)
        self.forward_passes = 0
        self._encoded_before = False

    # ------------------------------------------------------------ what it is

    @classmethod
    def settings(cls) -> list[str]:
        """Every setting this family takes."""
        names = {name for kind in cls.__mro__ if issubclass(kind, LatentModel) for name in signature(kind).parameters}
        return sorted(names - {"self", "model", "settings"})

    def identity(self) -> dict[str, Any]:
        """Return the settings of this backbone that change numbers, for the run id. The device is not one of them."""
        return {
            "class": self.kind, **self.settings_identity(),
            "text_tokens": self.text_tokens, "concept_pooling": self.concept_pooling,
            **({} if self.weights == "full" else {"weights": self.weights}),
        }  # fmt: skip

    def text_identity(self) -> dict[str, Any]:
        """Return the settings that embedded texts depend on."""
        return {
            "class": self.kind, **self.checkpoint.identity(), **self.dtypes_identity(), "text_tokens": self.text_tokens,
        }  # fmt: skip

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks in which text and image have streams of their own."""
        return tuple(range(int(self.config["num_layers"])))

    # ------------------------------------------------------------ text

    @abstractmethod
    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        """Yield one record per string: "tokens" [N d], and "pooled" [p] if the family has it.

        The string's own tokens are "length" [] tokens, with the end mark left out, from position "start" [] (0 if it is absent).
        """

    @cached_property
    def text_pipeline(self) -> Any:
        """The checkpoint's own pipeline with nothing but its text parts, in families whose text comes from a chat model."""
        from diffusers import DiffusionPipeline

        with self.checkpoint.loading("text_encoder"), announced(f"reading the text encoder of {self.checkpoint.path}"):
            pipeline = DiffusionPipeline.from_pretrained(
                **dict.fromkeys(self.beside_text), torch_dtype=self.stored_dtype, **self.checkpoint.source()
            )
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                self.placed(part)
        return pipeline

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer whose tokens stand for concepts."""
        from transformers import AutoTokenizer

        return self.part("tokenizer", AutoTokenizer)

    def encode_text(self, strings: Sequence[str]) -> None:
        """Put every string that is new into the cache.

        Raises DataError for a word the tokenizer does not know, or a text that is longer than the encoder reads.
        """
        self.check_words([s for s in dict.fromkeys(strings) if s not in self.texts])
        self.check_lengths(strings)
        self.fill({s: s for s in strings}, self.encode)

    def check_length(self, string: str) -> None:
        check_length(self.tokenizer, [string], self.text_tokens, "extractor.backbone.text_tokens")

    def texts_of(self, caption: str, words: Sequence[str]) -> set[str]:
        """Return the strings that are encoded for one image with this caption and these words."""
        return {caption, *words}

    def encode_all(self, strings: Iterable[str]) -> None:
        """Put the texts of a whole run into the cache, all but those that are refused: the batch that asks for one says why."""
        readable = []
        for string in sorted(s for s in strings if s not in self.texts):
            with suppress(DataError):
                self.check_words([string])
                self.check_length(string)
                readable.append(string)
        self.fill({s: s for s in readable}, self.encode)

    def fill(self, names: Mapping[str, str], encode: Callable[[Sequence[str]], Iterable[TextRecord]]) -> None:
        """Encode the strings whose names the cache lacks, with the transformer out of memory where encoders are released."""
        new = {name: string for name, string in names.items() if name not in self.texts}
        if not new:
            return
        if self.releases_text_encoders:
            self.release("transformer", "vae")
        count = len(new)
        texts = f"encoding {count} text{'' if count == 1 else 's'} with {self.text_encoder_name}"
        # A run's first texts may wait for an encoder of 10 GB on a processor; later ones come batch by batch, with its progress.
        short = self._encoded_before or self.checkpoint.path.startswith("lab:")
        self._encoded_before = True
        names_in_order = list(new)
        with announced(texts, short), torch.inference_mode():
            for start in counted(range(0, count, TEXTS_AT_ONCE), f"{texts}, {TEXTS_AT_ONCE} at a time"):
                some = names_in_order[start : start + TEXTS_AT_ONCE]
                for name, record in zip(some, encode([new[name] for name in some]), strict=True):
                    self.texts[name] = {kind: _on_host(tensor) for kind, tensor in record.items()}
        if self.releases_text_encoders:
            self.release(*self.text_parts)

    def release(self, *parts: str) -> None:
        """Let go of parts; they are read again when they are needed."""
        for name in parts:
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(self, captions: Sequence[str]) -> Prompts:
        """Encoded captions, padded to `text_tokens`."""
        self.encode_text(captions)
        return Prompts(self._stacked("tokens", captions))

    def generation_prompts(self, captions: Sequence[str]) -> Prompts:
        """Encoded captions as the model was trained on them, for making images."""
        return self.prompts(captions)

    def concepts(self, names: Sequence[Sequence[str]]) -> ConceptTokens:
        """Tokens of each row's words, every word encoded alone; of several tokens, what `concept_pooling` says."""
        self.encode_text([word for row in names for word in row])
        return pooled_tokens([[self._word_tokens(word) for word in row] for row in names], self.concept_pooling)

    def concept_pooled(self, rows: int) -> Float[Tensor, "R p"] | None:
        """Return the pooled vector that modulates concepts; None in families where the prompt's modulation does."""
        return None

    def word_places(self, words: Sequence[str]) -> list[range]:
        """Where each word's tokens stand in the encoded prompt of all words joined by blanks.

        By construction: words are counted off one after the other, so that "dog" is not looked for in "hot dog". Raises DataError
        for a word without tokens of its own, or if there are more tokens than are encoded.
        """
        check_length(self.tokenizer, [" ".join(words)], self.places_read, self.places_setting)
        ends = [self.own_tokens(" ".join(words[:count])) for count in range(len(words) + 1)]
        shift = self._start(" ".join(words))
        places = [range(shift + start, shift + end) for start, end in pairwise(ends)]
        if empty := [word for word, place in zip(words, places, strict=True) if not len(place)]:
            raise DataError(f'the word "{empty[0]}" has no token in the prompt "{" ".join(words)}". Ask for another word.')
        return places

    def own_tokens(self, string: str) -> int:
        """How many tokens a string has in its prompt, a begin mark included."""
        return own_tokens(self.tokenizer, string)

    @property
    def places_read(self) -> int:
        """How many tokens, marks included, of those that `word_places` counts are encoded."""
        return self.text_tokens

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of a prompt take part in attention, padding included."""
        return self.text_tokens

    places_setting: ClassVar[str] = "extractor.backbone.text_tokens"
    """Set `places_read`."""

    def _start(self, string: str) -> int:
        """Where a string's own tokens begin among those encoded. Raises DataError where they were not found in its message."""
        if string not in self.texts:
            return 0
        record = self.texts[string]
        if "start" in record and string.strip() and not int(record["length"]):
            raise DataError(
                f'encoding "{string[:80]}": its tokens are not found in its chat message, so no map can be read off them. Leave '
                f"out blanks at its ends and special marks."
            )
        return int(record.get("start", torch.tensor(0)))

    def _word_tokens(self, word: str) -> Float[Tensor, "n d"]:
        record, start = self.texts[word], self._start(word)
        return record["tokens"][start : start + max(1, int(record["length"]))].to(self.device)

    def _stacked(self, name: str, strings: Sequence[str]) -> Tensor:
        return torch.stack([self.texts[s][name] for s in strings]).to(self.device)

    # ------------------------------------------------------------ one denoiser call

    @abstractmethod
    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        """Return the stock model's output, in its own layout, for noisy latents at levels in 0..1."""

    def as_latents(self, velocity: Float[Tensor, "R ..."], grid: tuple[int, ...]) -> Float[Tensor, "R *c H W"]:
        """Return the output of `call` in the layout of the latents; grid: the map's shape in tokens."""
        return velocity

    def denoise(
        self,
        noisy: Float[Tensor, "R *c H W"],
        level: float | Float[Tensor, " R"],
        prompts: Prompts,
        stream: ConceptStream | None = None,
        guidance: float = 0.0,
    ) -> Float[Tensor, "R ..."] | None:
        """Run one forward pass on noisy latents at noise level t in 0..1.

        Returns the velocity in the model's own layout (see `as_latents`), or None if the stream stopped the pass early.
        """
        levels = torch.as_tensor(level, dtype=torch.float64, device=self.device).expand(len(noisy))
        self.check_shown()
        self.forward_passes += 1
        with torch.inference_mode():
            if stream is None:
                return self.call(noisy.to(self.dtype), levels, prompts, guidance)
            with TapSet(self.transformer) as taps:
                carrier = self.carrier(stream)
                carrier.image_tokens = prod(self.grid(noisy))
                carrier.attach(taps)
                return taps.run(lambda: self.call(noisy.to(self.dtype), levels, prompts, guidance))
