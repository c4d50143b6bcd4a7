"""Stable Diffusion 3 and 3.5: a stock SD3Transformer2DModel with two CLIP encoders, a T5 encoder and an autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from conceptseg.backbones.settings import check_length, token_count
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextRecord
from conceptseg.backbones.transformers.concept_stream import SPACES, ConceptCarrier, ConceptTokens, Heads, by_heads, normed
from conceptseg.backbones.transformers.mmdit import MultiModalBackbone
from conceptseg.backbones.transformers.prompts import Prompts, own_tokens, pooled_tokens
from conceptseg.errors import DataError, one_of


class SD3Carrier(ConceptCarrier):
    """Concepts in the joint blocks: text weights and the prompt's own modulation; no positions, no rotation.

    The last block has no text stream to go on with: concepts are normalised by scale and shift only, scored, and end there. The
    second attention of SD3.5 medium (`attn2`) is the image's alone and is left alone.
    Source: Helbling et al. 2025, arXiv:2502.04320; helblazer811/ConceptAttention at db30c4d, concept_attention/sd3/dit_block.py.
    """

    def attach(self, taps: TapSet) -> None:
        taps.after("time_text_embed", self.keep("temb"))
        taps.before("context_embedder", self.embed)
        for layer, path, block in self.wanted_blocks(taps, "transformer_blocks"):
            attention = block.attn
            self.refuse_fused(f"{path}.attn", attention)
            # SD3 medium has no norms on queries and keys; then the projections themselves are read.
            for name, norm, projection in (
                ("image_queries", "norm_q", "to_q"),
                ("image_keys", "norm_k", "to_k"),
                ("text_queries", "norm_added_q", "add_q_proj"),
                ("text_keys", "norm_added_k", "add_k_proj"),
            ):
                if getattr(attention, norm) is None:
                    taps.after(f"{path}.attn.{projection}", self.keep(name, lambda x, a=attention: by_heads(x, a)))  # type: ignore[misc]
                else:
                    taps.after(f"{path}.attn.{norm}", self.keep(name, lambda x: x.transpose(1, 2)))
            for name, projection in (("image_values", "to_v"), ("text_values", "add_v_proj")):
                taps.after(f"{path}.attn.{projection}", self.keep(name, lambda x, a=attention: by_heads(x, a)))  # type: ignore[misc]
            taps.before(f"{path}.attn.to_out.0", self.at_output(layer, block))

    def advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        state, attention = self.state, block.attn
        residual, temb = state["residual"], state["temb"]
        if block.context_pre_only:
            x = block.norm1_context(residual, temb)
        else:
            x, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(residual, emb=temb)
        concepts = Heads(
            normed(attention.norm_added_q, by_heads(attention.add_q_proj.forward(x), attention)),
            normed(attention.norm_added_k, by_heads(attention.add_k_proj.forward(x), attention)),
            by_heads(attention.add_v_proj.forward(x), attention),
        )
        image = Heads(state["image_queries"], state["image_keys"], state["image_values"])
        text = Heads(state["text_queries"], state["text_keys"], state["text_values"])
        # The last block has no projection for text; "output_projected" is therefore no space of this family.
        outputs = self.attend(
            layer, concepts, image, image_outputs, text,
            attention.to_add_out or nn.Identity(), attention.to_out[0].forward,
        )  # fmt: skip
        if block.context_pre_only:
            return
        residual = residual + gate[:, None] * attention.to_add_out(outputs)
        mlp_in = block.norm2_context(residual) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        state["residual"] = residual + gate_mlp[:, None] * block.ff_context(mlp_in)


def encode_prompts(
    prompts: Sequence[str],
    tokenizers: Sequence[Any],
    encoders: Sequence[nn.Module],
    clip_tokens: int,
    t5_tokens: int,
) -> tuple[Float[Tensor, "B N d"], Float[Tensor, "B p"]]:
    """Encode prompts for SD3: (encoder_hidden_states, pooled_projections); gradients flow.

    tokenizers, encoders: both CLIPs and the T5, in the pipeline's order; their padded lengths are `clip_tokens` and `t5_tokens`.
    Both CLIPs' last but one hidden states stand side by side, padded with zeros to the T5's width; the T5's tokens follow, so
    N = clip_tokens + t5_tokens. pooled is both CLIPs' projected vectors side by side. Pads are attended: there is no mask.
    Source: StableDiffusion3Pipeline.encode_prompt of diffusers.
    """
    hidden, pooled = [], []
    for tokenizer, encoder in zip(tokenizers[:2], encoders[:2], strict=True):
        found = encoder(input_ids=token_ids(tokenizer, prompts, clip_tokens, encoder), output_hidden_states=True)
        hidden.append(found.hidden_states[-2])
        pooled.append(found.text_embeds)
    t5 = encoders[2](input_ids=token_ids(tokenizers[2], prompts, t5_tokens, encoders[2])).last_hidden_state
    clip = torch.cat(hidden, -1)
    return torch.cat([pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5], 1), torch.cat(pooled, -1)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int, encoder: nn.Module) -> Int[Tensor, "B N"]:
    """Return token ids, padded to N = length, on the encoder's device."""
    found = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return found.to(next(encoder.parameters()).device)


class SD3Backbone(MultiModalBackbone):
    """SD3 medium, SD3.5 medium, large and large-turbo, or the lab's.

    text_tokens: padded length of the T5; clip_tokens: of both CLIPs. concept_text: which tokens stand for concepts: "joined", as
    released: all words of a row in one prompt, of which the CLIPs' begin-of-text token and each word's tokens are taken (words
    are read in the light of those before them; begin-of-text joins the attention and is not scored); or "t5": every word
    alone, the T5's tokens, as on Flux.
    Source: helblazer811/ConceptAttention at db30c4d, concept_attention/sd3/pipeline.py, which takes one token per word,
        whatever its length.
    """

    kind = "sd3"
    rotates_text = False
    transformer_class = "SD3Transformer2DModel"
    carrier = SD3Carrier
    spaces = tuple(s for s in SPACES if s != "output_projected")
    text_encoder_name = "T5 and CLIP"
    text_parts = ("text_encoder", "text_encoders")
    classifier_free = True

    def __init__(
        self, path: str, revision: str | None = None, clip_tokens: int = 77, concept_text: str = "joined", **settings: Any
    ) -> None:
        super().__init__(path, revision, **settings)
        one_of("extractor.backbone.concept_text", concept_text, ("joined", "t5"))
        self.clip_tokens, self.concept_text = clip_tokens, concept_text

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "clip_tokens": self.clip_tokens, "concept_text": self.concept_text}

    def text_identity(self) -> dict[str, Any]:
        return {**super().text_identity(), "clip_tokens": self.clip_tokens}

    # ------------------------------------------------------------ text

    @cached_property
    def tokenizers(self) -> tuple[Any, Any, Any]:
        from transformers import AutoTokenizer

        one, two, three = (self.part(name, AutoTokenizer) for name in ("tokenizer", "tokenizer_2", "tokenizer_3"))
        return one, two, three

    @property
    def tokenizer(self) -> Any:
        return self.tokenizers[0 if self.concept_text == "joined" else 2]

    @cached_property
    def text_encoders(self) -> tuple[Any, Any, Any]:
        from transformers import CLIPTextModelWithProjection

        clips = [
            self.placed(self.part(name, CLIPTextModelWithProjection, torch_dtype=self.stored_dtype))
            for name in ("text_encoder", "text_encoder_2")
        ]
        return clips[0], clips[1], self.text_encoder

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        return self.placed(self.part("text_encoder_3", T5EncoderModel, torch_dtype=self.stored_dtype))

    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        hidden, pooled = encode_prompts(strings, self.tokenizers, self.text_encoders, self.clip_tokens, self.text_tokens)
        t5 = self.tokenizers[2]
        for string, tokens, vector in zip(strings, hidden, pooled, strict=True):
            yield {"tokens": tokens, "length": torch.tensor(min(own_tokens(t5, string), self.text_tokens)), "pooled": vector}

    def check_length(self, string: str) -> None:
        check_length(self.tokenizers[2], [string], self.text_tokens, "extractor.backbone.text_tokens, of the T5")

    def prompts(self, captions: Sequence[str]) -> Prompts:
        self.encode_text(captions)
        for caption in dict.fromkeys(captions):
            if (count := token_count(self.tokenizers[0], caption)) > self.clip_tokens:
                self.warn_once(
                    "clip", 'the caption "%s..." has %d CLIP tokens, of which the CLIPs read %d (backbone.clip_tokens): '
                    "the rest is read by the T5 alone (reported once)", caption[:80], count, self.clip_tokens,
                )  # fmt: skip
        return Prompts(self._stacked("tokens", captions), self._stacked("pooled", captions))

    @property
    def prompt_tokens(self) -> int:
        return self.clip_tokens + self.text_tokens

    def texts_of(self, caption: str, words: Sequence[str]) -> set[str]:
        return {caption, " ".join(words)} if self.concept_text == "joined" else super().texts_of(caption, words)

    def concepts(self, names: Sequence[Sequence[str]]) -> ConceptTokens:
        if self.concept_text == "t5":
            return super().concepts(names)
        for row in names:
            self._check_joined(row)
        self.encode_text([" ".join(row) for row in names])
        found = [self._joined_words(row) for row in names]
        words = pooled_tokens([row_words for _, row_words in found], self.concept_pooling)
        start = torch.stack([begin for begin, _ in found])
        rows, marks, count = len(names), start.shape[1], words.tokens.shape[1]
        shares = torch.eye(len(names[0])).expand(rows, -1, -1) if words.words is None else words.words
        present = torch.ones(rows, count, dtype=torch.bool, device=self.device) if words.present is None else words.present
        return ConceptTokens(
            torch.cat([start, words.tokens], 1),
            pad(shares.to(words.tokens), (marks, 0)),
            None if words.present is None else pad(present, (marks, 0), value=True),
        )

    @property
    def places_read(self) -> int:
        return self.clip_tokens if self.concept_text == "joined" else self.text_tokens

    places_setting = "extractor.backbone.clip_tokens, or text_tokens where concept_text is t5"

    def word_places(self, words: Sequence[str]) -> list[range]:
        shift = 0 if self.concept_text == "joined" else self.clip_tokens  # the T5's tokens follow the CLIPs'
        return [range(place.start + shift, place.stop + shift) for place in super().word_places(words)]

    def _word_tokens(self, word: str) -> Float[Tensor, "n d"]:
        record = self.texts[word]
        return record["tokens"][self.clip_tokens :][: max(1, int(record["length"]))].to(self.device)

    def _joined_words(self, words: Sequence[str]) -> tuple[Float[Tensor, "m d"], list[Tensor]]:
        """CLIP tokens of one joined prompt: those before the first word (begin-of-text), and those of each word."""
        joined = " ".join(words)
        marks, counts = self._check_joined(words)
        tokens = self.texts[joined]["tokens"].to(self.device)
        return tokens[:marks], list(tokens[marks : marks + sum(counts)].split(counts))

    def _check_joined(self, words: Sequence[str]) -> tuple[int, list[int]]:
        """How many CLIP tokens stand before the first word of a joined prompt, and how many each word has.

        Raises DataError if they don't fit, or if a word has other tokens beside its neighbours than alone.
        """
        tokenizer, joined = self.tokenizers[0], " ".join(words)
        marks = int(tokenizer(joined).input_ids[0] == tokenizer.bos_token_id)
        counts = [own_tokens(tokenizer, word) - marks for word in words]
        if marks + sum(counts) >= self.clip_tokens:
            raise DataError(
                f'the concepts "{joined}" are {sum(counts)} CLIP tokens in one prompt; {self.clip_tokens - marks - 1} fit. '
                f"Ask for fewer words, or set extractor.backbone.concept_text=t5, which reads every word alone."
            )
        if own_tokens(tokenizer, joined) != marks + sum(counts):
            raise DataError(
                f'the concepts "{joined}" have other CLIP tokens in one prompt than each alone, so they can\'t be separated. '
                f"Set extractor.backbone.concept_text=t5, which reads every word alone."
            )
        return marks, counts

    # ------------------------------------------------------------ the denoiser

    @property
    def largest_grid(self) -> int | None:
        return int(self.config["pos_embed_max_size"])

    def grid(self, latents: Float[Tensor, "R *c H W"]) -> tuple[int, ...]:
        patch = int(self.config["patch_size"])
        return latents.shape[-2] // patch, latents.shape[-1] // patch

    def sigmas(self, steps: int) -> dict[str, Any]:
        return {}

    def call(
        self, noisy: Float[Tensor, "R *c H W"], level: Float[Tensor, " R"], prompts: Prompts, guidance: float
    ) -> Float[Tensor, "R ..."]:
        assert prompts.pooled is not None
        return self.transformer(
            hidden_states=noisy, encoder_hidden_states=prompts.hidden.to(self.dtype),
            pooled_projections=prompts.pooled.to(self.dtype), timestep=(1000 * level).float(), return_dict=False,
        )[0]  # fmt: skip
