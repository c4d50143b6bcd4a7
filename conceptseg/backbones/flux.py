"""FLUX.1: a stock FluxTransformer2DModel with its T5 encoder and autoencoder."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.base import RESIZES, Checkpoint, Provenance
from conceptseg.backbones.concept_stream import ConceptStream
from conceptseg.backbones.latents import image_ids, pack
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)


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
