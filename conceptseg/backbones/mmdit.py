"""What the multi-modal diffusion transformers share: weights on first use, text once a string, latents, one denoiser call."""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from inspect import signature
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.base import RESIZES, Checkpoint, Provenance
from conceptseg.backbones.concept_stream import SPACES, ConceptCarrier, ConceptStream, ConceptTokens
from conceptseg.backbones.prompts import POOLINGS, Prompts, own_tokens, pooled_tokens
from conceptseg.backbones.quantized_weights import WEIGHTS, to_eight_bits
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.text_cache import TextCache, TextRecord
from conceptseg.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)


class MultiModalBackbone(ABC):
    """A transformer that reads text and image side by side. Weights are read on first use; text is encoded once a string.

    image_size: pixels a side that the model is shown, or [height, width], multiples of `pixels_per_token`; resize: how images
    get there. text_tokens: padded text length (where pads are attended the length changes the numbers). concept_pooling: see
    POOLINGS. text_cache: a folder that keeps embedded texts, by encoder and string. text_encoders: "keep", or "release" once new
    strings are encoded: encoders and transformer are then never in memory together. weights: "full", in dtype, or "int8": the
    blocks' matrices rounded to eight bits (torchao), a variant with rows of its own.
    """

    family = "mmdit"
    kind: ClassVar[str]
    """Names the family in run ids."""
    transformer_class: ClassVar[str]
    """The stock diffusers class."""
    carrier: ClassVar[type[ConceptCarrier]]
    spaces: ClassVar[tuple[str, ...]] = tuple(SPACES)
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Attributes that hold text encoders."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int | Sequence[int] = 1024,
        resize: str = "nearest",
        text_tokens: int = 256,
        concept_pooling: str = "first",
        vae_dtype: str = "float32",
        text_cache: str | None = None,
        text_encoders: str = "keep",
        weights: str = "full",
        **about: Any,
    ) -> None:
        self.checkpoint = Checkpoint(path, revision)
        self.dtype, self.vae_dtype = dtype_of(dtype, "dtype"), dtype_of(vae_dtype, "vae_dtype")
        self.device = device_of(device)
        chosen("resize", resize, RESIZES)
        chosen("concept_pooling", concept_pooling, POOLINGS)
        chosen("text_encoders", text_encoders, ("keep", "release"))
        self.size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        self.resize, self.text_tokens, self.concept_pooling = resize, text_tokens, concept_pooling
        chosen("weights", weights, WEIGHTS)
        self.weights = weights
        self.releases_text_encoders = text_encoders == "release"
        if unknown := sorted(set(about) - {"licence", "memory"}):
            raise ConfigError(f"extractor.backbone.{unknown[0]}: no such setting. {did_you_mean(unknown[0], self.settings())}")
        self.about = about  # what a sheet tells its reader: never read
        self.texts = TextCache(text_cache, self.text_identity)
        self._warned: set[str] = set()
        self.forward_passes = 0

    # ------------------------------------------------------------ what it is

    @classmethod
    def settings(cls) -> list[str]:
        """Every setting this family takes."""
        names = {name for kind in cls.__mro__ if issubclass(kind, MultiModalBackbone) for name in signature(kind).parameters}
        return sorted(names - {"self", "about", "settings"} | {"licence", "memory"})

    @property
    def provenance(self) -> Provenance:
        return self.checkpoint.provenance

    def identity(self) -> dict[str, Any]:
        """What of this backbone changes the numbers, for the run id; the device does not belong to it."""
        return {
            "class": self.kind, **self.checkpoint.identity(), "dtype": str(self.dtype), "vae_dtype": str(self.vae_dtype),
            "image_size": self.size[0] if self.size[0] == self.size[1] else list(self.size), "resize": self.resize,
            "text_tokens": self.text_tokens, "concept_pooling": self.concept_pooling,
            **({} if self.weights == "full" else {"weights": self.weights}),
        }  # fmt: skip

    def text_identity(self) -> dict[str, Any]:
        """What embedded texts depend on."""
        return {
            "class": self.kind, **self.checkpoint.identity(), "dtype": str(self.dtype), "text_tokens": self.text_tokens,
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
        import diffusers

        with self.checkpoint.loading("transformer/config.json"):
            host = getattr(diffusers, self.transformer_class)
            return dict(host.load_config(subfolder="transformer", **self.checkpoint.source()))

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks in which text and image have streams of their own."""
        return tuple(range(int(self.config["num_layers"])))

    # ------------------------------------------------------------ parts, loaded on first use

    @cached_property
    def transformer(self) -> nn.Module:
        import diffusers

        host = getattr(diffusers, self.transformer_class)
        with self.checkpoint.loading("transformer"):
            model = host.from_pretrained(subfolder="transformer", torch_dtype=self.dtype, **self.checkpoint.source())
        return self.placed(model if self.weights == "full" else to_eight_bits(model))

    @cached_property
    def vae(self) -> Any:
        import diffusers

        from conceptseg.backbones.codec import PatchCodec

        source = self.checkpoint.source()
        with self.checkpoint.loading("vae/config.json"):
            kind = diffusers.AutoencoderKL.load_config(subfolder="vae", **source)["_class_name"]
        codecs = {"PatchCodec": PatchCodec, **{name: getattr(diffusers, name) for name in self.autoencoders}}
        if kind not in codecs:
            raise ConfigError(f'extractor.backbone.path: its vae is a "{kind}". {did_you_mean(kind, codecs)}')
        with self.checkpoint.loading("vae"):
            return self.placed(codecs[kind].from_pretrained(subfolder="vae", torch_dtype=self.vae_dtype, **source))

    autoencoders: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)

    @cached_property
    def scheduler(self) -> Any:
        """The checkpoint's own schedule of noise levels, for making images."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        with self.checkpoint.loading("scheduler"):
            return FlowMatchEulerDiscreteScheduler.from_pretrained(subfolder="scheduler", **self.checkpoint.source())

    def placed(self, model: Any) -> Any:
        """A model on the device, without dropout and gradients."""
        return model.to(self.device).eval().requires_grad_(False)

    def part(self, name: str, loader: Any, **options: Any) -> Any:
        """A tokenizer or text encoder of the checkpoint."""
        with self.checkpoint.loading(name):
            return loader.from_pretrained(subfolder=name, **self.checkpoint.source(), **options)

    # ------------------------------------------------------------ text

    @abstractmethod
    def encode(self, strings: Sequence[str]) -> Iterable[TextRecord]:
        """One record a string: "tokens" [N d], "length" [] (tokens before the end mark), "pooled" [p] if the family has it."""

    @cached_property
    def text_pipeline(self) -> Any:
        """The checkpoint's own pipeline with nothing but its text parts, in families whose text comes from a chat model."""
        from diffusers import DiffusionPipeline

        with self.checkpoint.loading("text_encoder"):
            pipeline = DiffusionPipeline.from_pretrained(
                transformer=None, vae=None, torch_dtype=self.dtype, **self.checkpoint.source()
            )
        return pipeline.to(self.device)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose tokens stand for concepts."""
        return self.text_pipeline.tokenizer

    def encode_text(self, strings: Sequence[str]) -> None:
        """Put every string that is new into the cache. Raises DataError for a word the tokenizer does not know."""
        self._check_words([s for s in dict.fromkeys(strings) if s not in self.texts])
        self.fill({s: s for s in strings}, self.encode)

    def fill(self, names: Mapping[str, str], encode: Callable[[Sequence[str]], Iterable[TextRecord]]) -> None:
        """Encode the strings whose names the cache lacks, with the transformer out of memory where encoders are released."""
        new = {name: string for name, string in names.items() if name not in self.texts}
        if not new:
            return
        if self.releases_text_encoders:
            self.release("transformer", "vae")
        with torch.inference_mode():
            for name, record in zip(new, encode(list(new.values())), strict=True):
                self.texts[name] = record
        if self.releases_text_encoders:
            self.release(*self.text_parts)

    def release(self, *parts: str) -> None:
        """Let go of parts; they are read again when they are needed."""
        for name in parts:
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_words(self, strings: Sequence[str]) -> None:
        if not strings:
            return
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
        """The pooled vector that modulates concepts, in families that make a modulation of their own for them."""
        return None

    def word_places(self, words: Sequence[str]) -> list[range]:
        """Where each word's tokens stand in the encoded prompt of all words joined by blanks."""
        ends = [own_tokens(self.tokenizer, " ".join(words[:count])) for count in range(len(words) + 1)]
        return [range(start, end) for start, end in pairwise(ends)]

    def _word_tokens(self, word: str) -> Float[Tensor, "n d"]:
        record = self.texts[word]
        return record["tokens"][: max(1, int(record["length"]))].to(self.device)

    def _stacked(self, name: str, strings: Sequence[str]) -> Tensor:
        return torch.stack([self.texts[s][name] for s in strings]).to(self.device)

    # ------------------------------------------------------------ images

    def latents(self, images: Float[Tensor, "B 3 H W"], generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Images in 0..1 -> scaled latents [B c 2h 2w]: the posterior's mean, or a sample per image with its generator."""
        self.check_size(images.shape[-2], images.shape[-1])
        with torch.inference_mode():
            posterior = self.vae.encode((2 * images - 1).to(self.device, self.vae_dtype)).latent_dist
            z = posterior.mean
            if generators is not None:
                noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
                z = z + posterior.std * noise.to(z)
        return (z - (self.vae.config["shift_factor"] or 0.0)) * self.vae.config["scaling_factor"]

    def images(self, latents: Float[Tensor, "B *c h w"]) -> Float[Tensor, "B *f 3 H W"]:
        """Scaled latents -> images in 0..1."""
        with torch.inference_mode():
            z = latents.to(self.vae_dtype) / self.vae.config["scaling_factor"] + (self.vae.config["shift_factor"] or 0.0)
            return (self.vae.decode(z, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError for a size that tokens do not tile."""
        step = self.pixels_per_token
        for side in (height, width):
            if side % step:
                raise ConfigError(
                    f"extractor.backbone.image_size is {side}; this model's tokens are {step} pixels wide, so a multiple "
                    f"of {step} is wanted, for example {max(step, round(side / step) * step)}."
                )

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent pixel: the autoencoder's factor."""
        config = self.vae.config
        return int(config["patch"] if "patch" in config else 2 ** (len(config["block_out_channels"]) - 1))

    @property
    def pixels_per_token(self) -> int:
        """Side of an image token: the autoencoder's factor times the 2 x 2 patches of the transformer."""
        return 2 * self.pixels_per_latent

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of one image of this many pixels."""
        self.check_size(height, width)
        return (self.latent_channels, height // self.pixels_per_latent, width // self.pixels_per_latent)

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"])

    def grid(self, latents: Tensor) -> tuple[int, ...]:
        """Image tokens as the maps lay them out: (h, w), or (f, h, w) for video."""
        return latents.shape[-2] // 2, latents.shape[-1] // 2

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of these proportions that tokens tile, at about the area of `size`."""
        step = self.pixels_per_token
        scale = (self.size[0] * self.size[1] / (height * width)) ** 0.5
        if self.largest_grid is not None:
            scale = min(scale, step * self.largest_grid / max(height, width))
        return max(step, round(height * scale / step) * step), max(step, round(width * scale / step) * step)

    @property
    def largest_grid(self) -> int | None:
        """Tokens a side above which the model has no positions; None where it has for any."""
        return None

    # ------------------------------------------------------------ making images

    classifier_free: ClassVar[bool] = False
    """Whether the family is guided by a second pass without a caption, rather than told a strength."""

    def levels(self, steps: int, tokens: int) -> list[float]:
        """Noise levels of the checkpoint's own schedule, from its first to 0, steps + 1 of them."""
        scheduler = self.scheduler
        shift = {"mu": shift_of(tokens, scheduler.config)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **self.sigmas(steps), **shift)
        return [float(sigma) for sigma in scheduler.sigmas]

    def sigmas(self, steps: int) -> dict[str, Any]:
        """What the family's pipeline asks of its scheduler beyond the number of steps."""
        return {}

    # ------------------------------------------------------------ one denoiser call

    @abstractmethod
    def call(self, noisy: Tensor, level: Float[Tensor, " R"], prompts: Prompts, guidance: float) -> Tensor:
        """The stock model's answer to noisy latents [R c H W] at levels in 0..1, as it gives it."""

    def mix(self, noise: Tensor, latents: Tensor, level: float) -> Tensor:
        """Latents at a noise level in 0..1, on the straight line from image to noise that flow matching takes."""
        return level * noise + (1 - level) * latents

    def as_latents(self, velocity: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The answer in the shape of the latents."""
        return velocity

    def denoise(
        self,
        noisy: Float[Tensor, "R *c H W"],
        level: float | Float[Tensor, " R"],
        prompts: Prompts,
        stream: ConceptStream | None = None,
        guidance: float = 0.0,
    ) -> Tensor | None:
        """One forward pass at noise level t in 0..1. Returns the velocity, or None if the stream stopped it early."""
        levels = torch.as_tensor(level, dtype=torch.float64, device=self.device).expand(len(noisy))
        self.forward_passes += 1
        with torch.inference_mode():
            if stream is None:
                return self.call(noisy.to(self.dtype), levels, prompts, guidance)
            with TapSet(self.transformer) as taps:
                carrier = self.carrier(stream)
                carrier.image_tokens = prod(self.grid(noisy))
                carrier.attach(taps)
                return taps.run(lambda: self.call(noisy.to(self.dtype), levels, prompts, guidance))


def shift_of(tokens: int, config: Mapping[str, Any]) -> float:
    """mu of a schedule that is shifted by the number of image tokens: linear through two points of its config.

    Source: spec §1.12; the points of diffusers' schedulers where the config lacks them.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (tokens - few) * (high - low) / (many - few))


def chosen(key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of the choices."""
    if value not in choices:
        raise ConfigError(f'extractor.backbone.{key}: unknown "{value}". {did_you_mean(value, choices)}')


def device_of(name: str) -> torch.device:
    """Raises ConfigError for a device that torch does not know or see."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'runtime.device: unknown "{name}". {did_you_mean(name, ["cpu", "cuda", "cuda:0", "mps"])}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch sees no CUDA device here. Use runtime.device=cpu.')
    return device


def dtype_of(name: str, key: str) -> torch.dtype:
    """Raises ConfigError for a name that is no floating-point type."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    chosen(key, name, list(choices))
    return choices[name]
