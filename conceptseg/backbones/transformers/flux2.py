"""FLUX.2: a stock Flux2Transformer2DModel; modulation is shared by all blocks, and there is no pooled vector."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.latents import spread_out
from conceptseg.backbones.settings import token_count, too_long
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.concept_stream import ConceptStream, ConceptTokens
from conceptseg.backbones.transformers.double_blocks import DoubleBlockCarrier
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import ConfigError

log = logging.getLogger(__name__)


class Flux2Carrier(DoubleBlockCarrier):
    """Concepts in the double blocks: text weights and the text's own modulation; all at one text position.

    Source: Helbling et al. 2025, arXiv:2502.04320; helblazer811/ConceptAttention at db30c4d,
    concept_attention/flux2/dit_block.py.
    """

    def __init__(self, stream: ConceptStream, position: int = 510) -> None:
        super().__init__(stream)
        self.position = position

    def attach(self, taps: TapSet) -> None:
        self.state["host"] = taps.model
        taps.before("context_embedder", self.embed)
        self.tap_blocks(taps)

    def before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        text = kwargs["encoder_hidden_states"].shape[1]
        self.state["rotary"] = tuple(part[text:] for part in kwargs["image_rotary_emb"])
        place = torch.tensor([[0, 0, 0, self.position]], device=kwargs["hidden_states"].device)
        self.state["own_rotary"] = self.state["host"].pos_embed(place)
        given = kwargs["temb_mod_txt"]
        self.state["modulation"] = given[:, None] if given.ndim == 2 else given

    def _rotate(self, x: Tensor, rotary: str) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        cosine, sine = (part.expand(x.shape[1], -1) for part in self.state[rotary])
        return apply_rotary_emb(x, (cosine, sine), sequence_dim=1)

    def rotate_image(self, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
        return self._rotate(x, "rotary")

    def rotate_concepts(self, x: Float[Tensor, "R n A d"]) -> Float[Tensor, "R n A d"]:
        return self._rotate(x, "own_rotary")

    def modulation(self, block: Any) -> tuple[Tensor, ...]:
        given = self.state["modulation"]
        rows = given[self.stream.rows] if len(given) > 1 else given  # one row where all levels are equal
        return rows.chunk(6, dim=-1)

    def norms(self, block: Any) -> tuple[Any, Any, Any]:
        return block.norm1_context, block.norm2_context, block.ff_context


class Flux2Model(MultiModalBackbone):
    """Parts of FLUX.2 that do not depend on its text model."""

    transformer_class = "Flux2Transformer2DModel"
    autoencoders = ("AutoencoderKLFlux2",)
    text_parts = ("text_pipeline",)

    def latents(
        self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B c h w"]:
        """Encode images in 0..1 as latents, one token per latent pixel, whitened by the autoencoder's running statistics."""
        self.check_size(images.shape[-2], images.shape[-1])
        with torch.inference_mode():
            z = spread_out(self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist, generators)
        mean, spread = self._whitening(z)
        return (rearrange(z, "B c (h a) (w b) -> B (c a b) h w", a=2, b=2) - mean) / spread

    def images(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B 3 H W"]:
        mean, spread = self._whitening(latents)
        z = rearrange(latents.float() * spread + mean, "B (c a b) h w -> B c (h a) (w b)", a=2, b=2)
        with torch.inference_mode():
            return (self.vae.decode(z.to(self.vae_dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def _whitening(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.vae.bn
        spread = torch.sqrt(norm.running_var + self.vae.config["batch_norm_eps"])
        return norm.running_mean.view(-1, 1, 1).to(like), spread.view(-1, 1, 1).to(like)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        self.check_size(height, width)
        return int(self.config["in_channels"]), height // self.pixels_per_token, width // self.pixels_per_token

    def grid(self, latents: Float[Tensor, "R *c H W"]) -> tuple[int, ...]:
        return latents.shape[-2], latents.shape[-1]

    def levels(self, steps: int, tokens: int) -> list[float]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        self.scheduler.set_timesteps(**self.sigmas(steps), mu=compute_empirical_mu(image_seq_len=tokens, num_steps=steps))
        return [float(sigma) for sigma in self.scheduler.sigmas]

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        rows, (h, w) = len(noisy), self.grid(noisy)
        steps = [torch.arange(1), torch.arange(h), torch.arange(w), torch.arange(1)]
        text = [torch.arange(1)] * 3 + [torch.arange(prompts.hidden.shape[1])]
        return self.transformer(
            hidden_states=rearrange(noisy, "B c h w -> B (h w) c"), encoder_hidden_states=prompts.hidden.to(self.dtype),
            timestep=level.to(self.dtype), img_ids=torch.cartesian_prod(*steps).to(self.device),
            txt_ids=torch.cartesian_prod(*text).to(self.device),
            guidance=torch.full((rows,), guidance, device=self.device) if self.config.get("guidance_embeds", True) else None,
            return_dict=False,
        )[0]  # fmt: skip

    def as_latents(self, velocity: Float[Tensor, "R ..."], grid: tuple[int, ...]) -> Float[Tensor, "R *c H W"]:
        return rearrange(velocity, "B (h w) c -> B c h w", h=grid[0], w=grid[1])


class Flux2Backbone(Flux2Model):
    """FLUX.2-dev.

    concept_token: which of the `text_tokens` tokens of a word's chat message stands for it, and its position: 510 of 512 in the
    released code, a word's last token where messages are padded on the left and end in one mark. Text goes through the
    checkpoint's own pipeline (Mistral, layers 10, 20 and 30 side by side).
    """

    kind = "flux2"
    text_encoder_name = "Mistral"

    def __init__(self, path: str, revision: str | None = None, concept_token: int = 510, **settings: Any) -> None:
        super().__init__(path, revision, **settings)
        if self.concept_pooling != "first":
            raise ConfigError(
                f"extractor.backbone.concept_pooling is {self.concept_pooling}, but on FLUX.2 a concept is the token at "
                f"extractor.backbone.concept_token of its message: leave the pooling at first."
            )
        self.concept_token = concept_token

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "concept_token": self.concept_token}

    def carrier(self, stream: ConceptStream) -> Flux2Carrier:  # type: ignore[override]
        return Flux2Carrier(stream, self.concept_token)

    @cached_property
    def tokenizer(self) -> Any:
        found = super().tokenizer
        return getattr(found, "tokenizer", found)  # of a pipeline in memory the processor is at hand

    @cached_property
    def chat(self) -> Any:
        """Return the processor that makes chat messages of strings, as the checkpoint's pipeline holds it; reads no weights."""
        from transformers import AutoProcessor

        return self.part("tokenizer", AutoProcessor)

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        for string in strings:
            tokens, _ = self.text_pipeline.encode_prompt([string], max_sequence_length=self.text_tokens)
            start, length = self._place(string)
            yield {"tokens": tokens[0], "start": torch.tensor(start), "length": torch.tensor(length)}

    def check_length(self, string: str) -> None:
        count = len(self._message(string))
        if count > self.text_tokens:
            raise too_long(string, count, self.text_tokens, "extractor.backbone.text_tokens, with its chat message")

    def _message(self, string: str, **cut: Any) -> list[int]:
        """Token ids of a string's chat message."""
        from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

        message = self.chat.apply_chat_template(
            format_input([string], SYSTEM_MESSAGE), add_generation_prompt=False, tokenize=True, return_dict=True, **cut
        )
        return [int(one) for one in message["input_ids"][0]]

    def _place(self, string: str) -> tuple[int, int]:
        """(start, length) of a string's own tokens in its padded chat message; (0, 0) if they are not found there."""
        ids = self._message(string, padding="max_length", truncation=True, max_length=self.text_tokens)
        own = self.tokenizer(string, add_special_tokens=False).input_ids
        places = [k for k in range(len(ids) - len(own) + 1) if ids[k : k + len(own)] == own]
        return (places[-1], len(own)) if places else (0, 0)

    def concepts(self, names: Sequence[Sequence[str]]) -> ConceptTokens:
        words = [word for row in names for word in row]
        self.encode_text(words)
        for word in words:
            last = self._start(word) + int(self.texts[word]["length"]) - 1
            if last != self.concept_token and word not in self._warned:
                self._warned.add(word)
                log.warning(
                    'the last token of "%s" is at %d of the %d of its message, but extractor.backbone.concept_token is %d',
                    word, last, self.text_tokens, self.concept_token,
                )  # fmt: skip
        rows = [torch.stack([self.texts[word]["tokens"][self.concept_token] for word in row]) for row in names]
        return ConceptTokens(torch.stack(rows).to(self.device))


class Flux2KleinBackbone(Flux2Model):
    """FLUX.2 klein, 4B or 9B, and their base models.

    Text goes through the checkpoint's own pipeline (Qwen3, layers 9, 18 and 27 side by side). A concept is its word's own tokens
    (see concept_pooling), and all stand at the text position concept_position: 3, where a message's content begins in Qwen's
    template. No published code covers this model. guidance: strength of the second pass; 1 or less for those distilled to steps.
    """

    kind = "flux2_klein"
    text_encoder_name = "Qwen3"
    classifier_free = True

    def __init__(self, path: str, revision: str | None = None, concept_position: int = 3, **settings: Any) -> None:
        super().__init__(path, revision, **settings)
        self.concept_position = concept_position

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "concept_position": self.concept_position}

    def carrier(self, stream: ConceptStream) -> Flux2Carrier:  # type: ignore[override]
        return Flux2Carrier(stream, self.concept_position)

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        before = token_count(self.tokenizer, chat_message(self.tokenizer, CONTENT).partition(CONTENT)[0])
        for string in strings:
            tokens, _ = self.text_pipeline.encode_prompt([string], max_sequence_length=self.text_tokens)
            yield {
                "tokens": tokens[0], "start": torch.tensor(before),
                "length": torch.tensor(token_count(self.tokenizer, string)),
            }  # fmt: skip

    def check_length(self, string: str) -> None:
        count = token_count(self.tokenizer, chat_message(self.tokenizer, string))
        if count > self.text_tokens:
            raise too_long(string, count, self.text_tokens, "extractor.backbone.text_tokens, with its chat message")


CONTENT = "\0"
"""Stands for a chat message's content."""


def chat_message(tokenizer: Any, content: str) -> str:
    """The chat message that klein's pipeline makes of a text."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )
