"""FLUX.1: a stock FluxTransformer2DModel with its T5 encoder and autoencoder, and a concept stream tapped into it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from conceptseg.backbones.base import RESIZES, Checkpoint, Provenance
from conceptseg.backbones.latents import image_ids, pack
from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.errors import ConfigError, DataError, TapError, did_you_mean

log = logging.getLogger(__name__)

Vectors = tuple[Tensor, Tensor]
"""Concept vectors [R C d] or [R A C d], and image vectors [R L d] or [R A L d]."""


class FluxBackbone:
    """FLUX.1 (schnell, dev, or the lab's). Weights are read on first use; text is encoded once per distinct string.

    image_size: pixels a side that the model is shown, a multiple of `pixels_per_token`; resize: how images get there.
    text_tokens: padded text length (256 schnell, 512 dev; pads are attended, so the length changes the numbers).
    concept_pooling: which tokens of a word stand for it: "first" (the paper's), "mean" or "last".
    """

    family = "mmdit"

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int = 1024,
        resize: str = "nearest",
        text_tokens: int = 256,
        concept_pooling: str = "first",
        vae_dtype: str = "float32",
        **about: Any,
    ) -> None:
        self.checkpoint = Checkpoint(path, revision)
        self.dtype, self.vae_dtype = _dtype(dtype, "dtype"), _dtype(vae_dtype, "vae_dtype")
        self.device = _device(device)
        if resize not in RESIZES:
            raise ConfigError(f'extractor.backbone.resize: unknown "{resize}". {did_you_mean(resize, RESIZES)}')
        self.image_size, self.resize, self.text_tokens = image_size, resize, text_tokens
        if concept_pooling not in ("first", "mean", "last"):
            raise ConfigError(
                f'extractor.backbone.concept_pooling: unknown "{concept_pooling}". '
                f"{did_you_mean(concept_pooling, ['first', 'mean', 'last'])}"
            )
        self.concept_pooling = concept_pooling
        self.about = about  # licence, memory need, provenance notes: printed, never read
        self._text_cache: dict[str, Float[Tensor, "N d"]] = {}
        self._length_cache: dict[str, int] = {}
        self._warned: set[str] = set()
        self.forward_passes = 0

    # ------------------------------------------------------------ what it is

    @property
    def provenance(self) -> Provenance:
        return self.checkpoint.provenance

    def identity(self) -> dict[str, Any]:
        """What of this backbone changes the numbers, for the run id; the device does not belong to it."""
        return {
            "class": "flux", **self.checkpoint.identity(), "dtype": str(self.dtype), "vae_dtype": str(self.vae_dtype),
            "image_size": self.image_size, "resize": self.resize, "text_tokens": self.text_tokens,
            "concept_pooling": self.concept_pooling,
        }  # fmt: skip

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's config.json; read without loading weights."""
        folder = self.checkpoint.folder()
        if folder is not None:
            file = folder / "transformer" / "config.json"
            if not file.exists():
                raise ConfigError(f'extractor.backbone.path "{self.checkpoint.path}": wanted {file}, which is not there.')
            return dict(json.loads(file.read_text(encoding="utf-8")))
        from diffusers import FluxTransformer2DModel

        with self.checkpoint.loading("transformer/config.json"):
            return dict(FluxTransformer2DModel.load_config(subfolder="transformer", **self.checkpoint.source()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Joint (double-stream) blocks."""
        return tuple(range(int(self.config["num_layers"])))

    # ------------------------------------------------------------ parts, loaded on first use

    @cached_property
    def transformer(self) -> nn.Module:
        from diffusers import FluxTransformer2DModel

        with self.checkpoint.loading("transformer"):
            model = FluxTransformer2DModel.from_pretrained(
                subfolder="transformer", torch_dtype=self.dtype, **self.checkpoint.source()
            )
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        from conceptseg.backbones.codec import PatchCodec

        source = self.checkpoint.source()
        with self.checkpoint.loading("vae/config.json"):
            kind = AutoencoderKL.load_config(subfolder="vae", **source)["_class_name"]
        codecs = {"AutoencoderKL": AutoencoderKL, "PatchCodec": PatchCodec}
        if kind not in codecs:
            raise ConfigError(f'extractor.backbone.path: its vae is a "{kind}". {did_you_mean(kind, codecs)}')
        with self.checkpoint.loading("vae"):
            model = codecs[kind].from_pretrained(subfolder="vae", torch_dtype=self.vae_dtype, **source)
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with self.checkpoint.loading("tokenizer_2"):
            return AutoTokenizer.from_pretrained(subfolder="tokenizer_2", **self.checkpoint.source())

    @cached_property
    def text_encoder(self) -> Any:
        from transformers import T5EncoderModel

        with self.checkpoint.loading("text_encoder_2"):
            model = T5EncoderModel.from_pretrained(subfolder="text_encoder_2", torch_dtype=self.dtype, **self.checkpoint.source())
        return model.to(self.device).eval().requires_grad_(False)

    # ------------------------------------------------------------ text

    def encode_text(self, strings: Sequence[str]) -> None:
        """Put every string that is new into the cache. Raises DataError for a word the tokenizer does not know."""
        new = [s for s in dict.fromkeys(strings) if s not in self._text_cache]
        if not new:
            return
        self._check_words(new)
        tokens = self.tokenizer(new, padding="max_length", truncation=True, max_length=self.text_tokens, return_tensors="pt")
        with torch.inference_mode():
            # The mask is left out on purpose: Flux attends to the padding as if it were text.
            hidden = self.text_encoder(input_ids=tokens.input_ids.to(self.device)).last_hidden_state
        end = self.tokenizer.eos_token_id
        for string, one, ids in zip(new, hidden, tokens.input_ids.tolist(), strict=True):
            self._text_cache[string] = one
            self._length_cache[string] = ids.index(end) if end in ids else len(ids)

    def _check_words(self, strings: Sequence[str]) -> None:
        unknown = self.tokenizer.unk_token_id
        trained = set((self.checkpoint.card() or {}).get("trained_words", ()))
        for string in strings:
            if unknown is not None and unknown in self.tokenizer(string).input_ids:
                known = [w for w in self.tokenizer.get_vocab() if w.isalpha()]
                word = next((w for w in string.split() if unknown in self.tokenizer(w).input_ids), string)
                raise DataError(
                    f'the text "{string}": "{word}" is unknown to this backbone\'s tokenizer. {did_you_mean(word, known)}'
                )
        said = {word for string in strings for word in re.findall(r"[a-z0-9]+", string.lower())}
        if trained and (unseen := sorted(said - trained - self._warned)):
            self._warned |= set(unseen)
            log.warning("this lab model never saw the words %s: such maps say nothing about the method", ", ".join(unseen))

    def text(self, strings: Sequence[str]) -> Float[Tensor, "B N d"]:
        """Encoded captions, padded to `text_tokens`."""
        self.encode_text(strings)
        return torch.stack([self._text_cache[s] for s in strings])

    def concepts(self, names: Sequence[Sequence[str]]) -> Float[Tensor, "B C d"]:
        """One vector a concept, each encoded alone; of several tokens, what `concept_pooling` says."""
        self.encode_text([word for row in names for word in row])
        return torch.stack([torch.stack([self._pool(word) for word in row]) for row in names])

    def _pool(self, word: str) -> Float[Tensor, " d"]:
        tokens, length = self._text_cache[word], max(1, self._length_cache[word])
        if self.concept_pooling == "mean":
            return tokens[:length].mean(0)
        return tokens[0] if self.concept_pooling == "first" else tokens[length - 1]

    def zero_pooled(self, rows: int) -> Float[Tensor, "R p"]:
        """The pooled vector of the reference when it encodes a real image: zeros, for image, text and concepts."""
        return torch.zeros(rows, int(self.config["pooled_projection_dim"]), device=self.device, dtype=self.dtype)

    # ------------------------------------------------------------ images

    def latents(self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images in 0..1 -> scaled latents [B c 2h 2w]: the posterior's mean, or a sample per image with its generator."""
        step = self.pixels_per_token
        if images.shape[-2] % step or images.shape[-1] % step:
            near = max(step, round(images.shape[-1] / step) * step)
            raise ConfigError(
                f"extractor.backbone.image_size is {images.shape[-1]}; this model's tokens are {step} pixels wide, so a multiple "
                f"of {step} is wanted, for example {near}."
            )
        with torch.inference_mode():
            posterior = self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist
            z = posterior.mean
            if generators is not None:
                noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
                z = z + posterior.std * noise.to(z)
        return (z - (self.vae.config["shift_factor"] or 0.0)) * self.vae.config["scaling_factor"]

    @property
    def pixels_per_token(self) -> int:
        """Side of an image token: the autoencoder's factor times the 2 x 2 packing."""
        config = self.vae.config
        return 2 * int(config["patch"] if "patch" in config else 2 ** (len(config["block_out_channels"]) - 1))

    # ------------------------------------------------------------ one denoiser call

    def denoise(
        self,
        noisy: Float[Tensor, "R c H W"],
        level: float | Float[Tensor, " R"],
        text: Float[Tensor, "R N d"],
        pooled: Float[Tensor, "R p"],
        stream: ConceptStream | None = None,
        guidance: float = 0.0,
    ) -> Float[Tensor, "R L c4"] | None:
        """One forward pass at noise level t in 0..1. Returns the velocity, or None if the stream stopped it early."""
        model = self.transformer
        rows = len(noisy)
        t = torch.as_tensor(level, dtype=self.dtype, device=self.device).expand(rows)
        grid = noisy.shape[-2] // 2, noisy.shape[-1] // 2
        tokens = pack(noisy.to(self.dtype))
        self.forward_passes += 1

        def forward() -> Any:
            return model(
                hidden_states=tokens, encoder_hidden_states=text.to(self.dtype), pooled_projections=pooled.to(self.dtype),
                timestep=t, img_ids=image_ids(*grid, self.device), txt_ids=torch.zeros(text.shape[1], 3, device=self.device),
                guidance=torch.full((rows,), guidance, device=self.device) if self.config.get("guidance_embeds") else None,
                return_dict=False,
            )[0]  # fmt: skip

        with torch.inference_mode():
            if stream is None:
                return forward()
            with TapSet(model) as taps:
                stream.attach(taps)
                return taps.run(forward)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'runtime.device: unknown "{name}". {did_you_mean(name, ["cpu", "cuda", "cuda:0", "mps"])}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch sees no CUDA device here. Use runtime.device=cpu.')
    return device


def _dtype(name: str, key: str) -> torch.dtype:
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in choices:
        raise ConfigError(f'extractor.backbone.{key}: unknown "{name}". {did_you_mean(name, choices)}')
    return choices[name]


@dataclass
class BlockActivations:
    """What one double block yields for scoring, all before any output projection and before rotary embedding.

    R rows, A heads, C concepts, L image tokens; concept_* are [R C A d] or [R C A·d], image_* [R L A d] or [R L A·d].
    """

    concept_queries: Tensor
    concept_keys: Tensor
    concept_values: Tensor
    concept_outputs: Tensor
    image_queries: Tensor
    image_keys: Tensor
    image_values: Tensor
    image_outputs: Tensor
    rotated_image_keys: Tensor
    project_concepts: Callable[[Tensor], Tensor]
    project_image: Callable[[Tensor], Tensor]


def _by_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.flatten(2)


SPACES: dict[str, tuple[str, Callable[[BlockActivations], Vectors]]] = {
    "output": (
        "attention outputs before the output projection, heads concatenated (the paper's space)",
        lambda a: (a.concept_outputs, a.image_outputs),
    ),
    "output_per_head": (
        "attention outputs head by head; softmax per head, then heads folded (keep_head_dim of the release)",
        lambda a: (
            _by_head(a.concept_outputs.unflatten(-1, a.image_queries.shape[2:])),
            _by_head(a.image_outputs.unflatten(-1, a.image_queries.shape[2:])),
        ),
    ),
    "output_projected": (
        "attention outputs after the output projections (what the reference's diffusers port scores)",
        lambda a: (a.project_concepts(a.concept_outputs), a.project_image(a.image_outputs)),
    ),
    "cross": (
        "concept key against image query, head by head, no rotation, no scaling (released code of the paper's days)",
        lambda a: (_by_head(a.concept_keys), _by_head(a.image_queries)),
    ),
    "cross_query_query": (
        "concept query against image query, heads concatenated (released code since 2025-03)",
        lambda a: (_joined(a.concept_queries), _joined(a.image_queries)),
    ),
    "cross_query_key": (
        "concept query against image key as attention sees them: rotated, over sqrt(d), head by head (paper Eq. 12's direction)",
        lambda a: (_by_head(a.concept_queries) / a.concept_queries.shape[-1] ** 0.5, _by_head(a.rotated_image_keys)),
    ),
    "cross_mixed": (
        "mean over heads of concept queries against sum over heads of image queries (a slip in the release of 2025-02)",
        lambda a: (a.concept_queries.mean(2), a.image_queries.sum(2)),
    ),
    "value": (
        "concept value against image value, head by head",
        lambda a: (_by_head(a.concept_values), _by_head(a.image_values)),
    ),
}


@dataclass
class ConceptStream:
    """Concept tokens that travel through the double blocks beside text and image: they read the image, nothing reads them.

    Each concept token uses the text stream's weights with the modulation of (t, pooled); its queries attend to concept
    keys and image keys. `on_block(layer, activations)` is called in every block up to `last_layer`, where the forward pass
    ends (when `stop` is set) before that block's projections and everything after it.

    concepts: [R C d_text], one row per row of the forward pass; pooled: [R p].
    Source: Helbling et al. 2025, arXiv:2502.04320, section 4; released code for pooled = 0 and the ablation switches.
    """

    concepts: Float[Tensor, "R C d"]
    pooled: Float[Tensor, "R p"]
    on_block: Callable[[int, BlockActivations], None]
    last_layer: int
    cross_attention: bool = True
    self_attention: bool = True
    stop: bool = True
    _state: dict[str, Any] = field(default_factory=dict)

    def attach(self, taps: TapSet) -> None:
        """Hook the stock model. Raises TapError if it is not laid out as expected or has fused projections."""
        taps.after("time_text_embed", self._modulation)
        taps.before("context_embedder", self._embed)
        count = len(list(taps.module("transformer_blocks").children()))
        for layer in range(min(self.last_layer + 1, count)):
            block = f"transformer_blocks.{layer}"
            attention = taps.module(f"{block}.attn")
            if getattr(attention, "fused_projections", False):
                raise TapError(
                    f"tapping {block}.attn: its projections are fused, so queries, keys and values can't be read. "
                    f"Call unfuse_qkv_projections() on the transformer first."
                )
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k", "to_add_out"):
                taps.module(f"{block}.attn.{name}")
            taps.before(block, self._rotary)
            taps.after(f"{block}.attn.norm_q", self._keep("image_queries"))
            taps.after(f"{block}.attn.norm_k", self._keep("image_keys"))
            taps.after(f"{block}.attn.to_v", self._keep("image_values"))
            taps.before(f"{block}.attn.to_out.0", self._at_output(layer, taps.module(block)))

    def _modulation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # forward(), not a call: the module's own hooks (this one) must not run again.
        self._state["temb"] = module.forward(*args[:-1], self.pooled.to(output.dtype))

    def _embed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._state["residual"] = module.forward(self.concepts.to(args[0].dtype))

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._state["rotary"] = kwargs["image_rotary_emb"]
        self._state["text_tokens"] = kwargs["encoder_hidden_states"].shape[1]

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self._state[name] = output

        return keep

    def _at_output(self, layer: int, block: Any) -> Callable[..., None]:
        def at_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._advance(layer, block, image_outputs=args[0])

        return at_output

    def _advance(self, layer: int, block: Any, image_outputs: Float[Tensor, "R L D"]) -> None:
        """One double block for the concepts: attention, scoring, residual update."""
        from diffusers.models.embeddings import apply_rotary_emb

        state, attention = self._state, block.attn
        residual = state["residual"]
        normed, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1_context(residual, emb=state["temb"])
        queries = attention.norm_added_q(attention.add_q_proj(normed).unflatten(-1, (-1, attention.head_dim)))
        keys = attention.norm_added_k(attention.add_k_proj(normed).unflatten(-1, (-1, attention.head_dim)))
        values = attention.add_v_proj(normed).unflatten(-1, (-1, attention.head_dim))
        # Concepts and text sit at position 0, where the rotary embedding is the identity; only image keys are turned.
        cosine, sine = (part[state["text_tokens"] :] for part in state["rotary"])
        image_keys = apply_rotary_emb(state["image_keys"], (cosine, sine), sequence_dim=1)
        image_values = state["image_values"].unflatten(-1, (-1, attention.head_dim))
        seen_keys = [k for k, on in ((keys, self.self_attention), (image_keys, self.cross_attention)) if on]
        seen_values = [v for v, on in ((values, self.self_attention), (image_values, self.cross_attention)) if on]
        if seen_keys:
            outputs = scaled_dot_product_attention(
                queries.transpose(1, 2), torch.cat(seen_keys, 1).transpose(1, 2), torch.cat(seen_values, 1).transpose(1, 2)
            ).transpose(1, 2)
        else:
            outputs = values  # neither: a concept sees only itself
        outputs = outputs.flatten(2).to(residual.dtype)
        self.on_block(
            layer,
            BlockActivations(
                concept_queries=queries, concept_keys=keys, concept_values=values, concept_outputs=outputs,
                image_queries=state["image_queries"], image_keys=state["image_keys"], image_values=image_values,
                image_outputs=image_outputs, rotated_image_keys=image_keys,
                project_concepts=attention.to_add_out, project_image=attention.to_out[0].forward,
            ),
        )  # fmt: skip
        if layer == self.last_layer and self.stop:
            raise StopForward
        residual = residual + gate[:, None] * attention.to_add_out(outputs)
        mlp_in = block.norm2_context(residual) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        state["residual"] = residual + gate_mlp[:, None] * block.ff_context(mlp_in)
