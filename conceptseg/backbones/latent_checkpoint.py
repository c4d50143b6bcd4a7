"""Common parts of latent diffusion checkpoints with any denoiser: settings, config files, autoencoder, known words."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, takewhile
from typing import Any, ClassVar

import torch

from conceptseg.backbones.base import DENOISERS, GREATEST_SIDE, RESIZES, Backbone, Checkpoint, LoadedCheckpoint
from conceptseg.backbones.casting import cast_while_running, fast_dtype
from conceptseg.backbones.planned_weights import load_part
from conceptseg.backbones.random_weights import RandomWeights
from conceptseg.backbones.settings import check_length, device_of, dtype_of
from conceptseg.errors import ConfigError, DataError, did_you_mean, in_range, one_of

log = logging.getLogger(__name__)


class LatentCheckpoint(Backbone):
    """Parts of a checkpoint, read on first use.

    dtype, vae_dtype: of the weights. compute_dtype: of the denoiser's and text encoders' arithmetic; None is `dtype`, or float32
    where a CPU lacks instructions for it, which is part of the run id. image_size: pixels a side that the model is shown, or
    [height, width]; resize: how images get there. randomise: a control, see `RandomWeights`; it draws weights of the denoiser,
    not of text encoders or autoencoder.
    """

    denoises = True
    autoencoders: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)
    """Stock classes that its images may be encoded by."""
    tokenizer: Any
    """The tokenizer that must know a text's words."""

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int | Sequence[int] = 512,
        resize: str = "bicubic",
        vae_dtype: str = "float32",
        randomise: Mapping[str, Any] | None = None,
        compute_dtype: str | None = None,
    ) -> None:
        self.checkpoint = Checkpoint(path, revision, RandomWeights.of(randomise))
        self.stored_dtype, self.vae_dtype = dtype_of(dtype, "dtype"), dtype_of(vae_dtype, "vae_dtype")
        self.device = device_of(device)
        chosen = None if compute_dtype is None else dtype_of(compute_dtype, "compute_dtype")
        self.dtype = chosen or fast_dtype(self.stored_dtype, self.device)
        """Of arithmetic; `stored_dtype` is that of the weights."""
        one_of("extractor.backbone.resize", resize, RESIZES)
        self.size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        for side in self.size:
            in_range("extractor.backbone.image_size", side, 1, GREATEST_SIDE)
        self.resize = resize
        self._warned: set[str] = set()
        self._measured: set[str] = set()

    def settings_identity(self) -> dict[str, Any]:
        """The checkpoint and how it is run, for the run id; the device does not belong to it."""
        return {
            **self.checkpoint.identity(), **self.dtypes_identity(), "vae_dtype": str(self.vae_dtype),
            "image_size": self.size[0] if self.size[0] == self.size[1] else list(self.size), "resize": self.resize,
        }  # fmt: skip

    def dtypes_identity(self) -> dict[str, str]:
        """The dtype of the weights and, where it is another, that of arithmetic."""
        other = {} if self.dtype == self.stored_dtype else {"compute_dtype": str(self.dtype)}
        return {"dtype": str(self.stored_dtype), **other}

    def config_of(self, part: str) -> dict[str, Any]:
        """config.json of one part, read without loading weights. Raises ConfigError where there is none."""
        if isinstance(self.checkpoint, LoadedCheckpoint):
            return dict(self.checkpoint.parts[part].config)
        folder = self.checkpoint.folder()
        if folder is not None:
            file = folder / part / "config.json"
            if not file.exists():
                raise ConfigError(f'extractor.backbone.path "{self.checkpoint.path}": wanted {file}, which is not there.')
            return dict(json.loads(file.read_text(encoding="utf-8")))
        from diffusers import AutoencoderKL  # any model class reads any model's config.json

        with self.checkpoint.loading(f"{part}/config.json"):
            return dict(AutoencoderKL.load_config(subfolder=part, **self.checkpoint.source()))

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's config.json."""
        return self.config_of("vae")

    @cached_property
    def vae(self) -> Any:
        """The autoencoder. Raises ConfigError for a class that this family has no use for."""
        import diffusers

        from conceptseg.backbones.codec import PatchCodec

        codecs = {"PatchCodec": PatchCodec, **{name: getattr(diffusers, name) for name in self.autoencoders}}
        kind = self.vae_config["_class_name"]
        if kind not in codecs:
            raise ConfigError(f'extractor.backbone.path: its vae is a "{kind}". {did_you_mean(kind, codecs)}')
        return self.placed(self.part("vae", codecs[kind], torch_dtype=self.vae_dtype), self.vae_dtype)

    @property
    def pixels_per_latent(self) -> int:
        """Side of a latent pixel: the autoencoder's factor."""
        config = self.vae_config
        return int(config["patch"] if "patch" in config else 2 ** (len(config["block_out_channels"]) - 1))

    @property
    def pixels_per_token(self) -> int:
        """Side of the cells that must tile an image."""
        return self.pixels_per_latent

    @property
    def largest_grid(self) -> int | None:
        """Tokens a side above which the model has no positions; None where it has for any."""
        return None

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of these proportions that tokens tile, at about the area of `size`."""
        step = self.pixels_per_token
        scale = (self.size[0] * self.size[1] / (height * width)) ** 0.5
        if self.largest_grid is not None:
            scale = min(scale, step * self.largest_grid / max(height, width))
        return max(step, round(height * scale / step) * step), max(step, round(width * scale / step) * step)

    def check_size(self, height: int, width: int) -> None:
        """Raises ConfigError for a size that tokens do not tile, or with more tokens a side than the model has positions."""
        step = self.pixels_per_token
        for side in (height, width):
            if self.largest_grid is not None and side > step * self.largest_grid:
                raise ConfigError(
                    f"extractor.backbone.image_size is {side}; this model has positions for {self.largest_grid} tokens a side: "
                    f"at most {step * self.largest_grid} pixels."
                )
            if side % step:
                raise ConfigError(
                    f"extractor.backbone.image_size is {side}; this model's tokens are {step} pixels wide, so a multiple "
                    f"of {step} is wanted, for example {max(step, round(side / step) * step)}."
                )

    @contextmanager
    def shown_at(self, size: tuple[int, int]) -> Iterator[None]:
        """Images are shown at this (height, width) inside the block."""
        before, self.size = self.size, size
        try:
            yield
        finally:
            self.size = before

    def placed(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """A model on the device, without dropout and gradients; a model that was in memory before stays as it is.

        dtype: of its arithmetic; None is the backbone's.
        """
        if isinstance(self.checkpoint, LoadedCheckpoint):
            return model
        model = model.to(self.device).eval().requires_grad_(False)
        return self.computing(model) if dtype is None else model

    def computing(self, model: Any) -> Any:
        """A model that computes in `dtype`, with weights that stay in `stored_dtype`."""
        if self.dtype == self.stored_dtype:
            return model
        names = [str(one).removeprefix("torch.") for one in (self.stored_dtype, self.dtype)]
        if self.dtype == fast_dtype(self.stored_dtype, self.device):
            self.warn_once(
                "compute_dtype", "%s: this processor has no instructions for %s, so it computes in %s, on the same weights; the "
                "run id says so. +extractor.backbone.compute_dtype=%s computes as the sheet says, many times slower.",
                self.checkpoint.path, *names, names[0],
            )  # fmt: skip
        return cast_while_running(model, self.dtype)

    def part(self, name: str, loader: Any, **options: Any) -> Any:
        """A tokenizer, scheduler or model of the checkpoint, as its class reads it.

        Raises ConfigError for a model whose config does not fit its weights, and for weights that are absent.
        """
        if isinstance(self.checkpoint, LoadedCheckpoint) and name in self.checkpoint.parts:
            found = self.checkpoint.parts[name]
            # Of a scheduler a copy: setting its timesteps must not disturb the pipeline's own.
            return loader.from_config(found.config) if name == "scheduler" else found
        found = load_part(self.checkpoint, name, loader, subfolder=name, **options)
        return self.checkpoint.drawn(found) if name in DENOISERS else found

    def check_length(self, string: str) -> None:
        """Raises DataError for a text that is longer than the text encoder reads."""
        check_length(self.tokenizer, [string], int(self.tokenizer.model_max_length), "the model_max_length of its tokenizer")

    def check_lengths(self, strings: Iterable[str]) -> None:
        """`check_length` of every string, once; also of those in a text cache, which may hold texts that were cut."""
        for string in strings:
            if string not in self._measured:
                self.check_length(string)
                self._measured.add(string)

    def warn_once(self, key: str, message: str, *values: object) -> None:
        """Log a warning, the first time that this key is given."""
        if key not in self._warned:
            self._warned.add(key)
            log.warning(message, *values)

    def check_words(self, strings: Sequence[str]) -> None:
        """Raises DataError for a word the tokenizer does not know; warns once of a word a lab model was not trained on."""
        if not strings:
            return
        self._check_inversions(strings)
        tokenizer, unknown = self.tokenizer, self.tokenizer.unk_token_id
        refuses = unknown is not None and unknown != tokenizer.eos_token_id  # CLIP's "unknown" is its end mark
        for string in strings:
            if refuses and unknown in tokenizer(string, add_special_tokens=False, verbose=False).input_ids:
                known = [w for w in tokenizer.get_vocab() if w.isalpha()]
                word = next((w for w in string.split() if unknown in tokenizer(w).input_ids), string)
                raise DataError(
                    f'the text "{string}": "{word}" is unknown to this backbone\'s tokenizer. {did_you_mean(word, known)}'
                )
        trained = set((self.checkpoint.card() or {}).get("trained_words", ()))
        said = {word for string in strings for word in re.findall(r"[a-z0-9]+", string.lower())}
        if trained and (unseen := sorted(said - trained - self._warned)):
            self._warned |= set(unseen)
            log.warning("this lab model never saw the words %s: such maps say nothing about the method", ", ".join(unseen))

    def _check_inversions(self, strings: Sequence[str]) -> None:
        """Raises DataError for a textual inversion that would be read in part: of several vectors the first, or in pieces."""
        if not isinstance(self.checkpoint, LoadedCheckpoint):
            return
        named = {name: part for name, part in self.checkpoint.parts.items() if name.startswith("tokenizer")}
        tokenizers = {name: getattr(part, "tokenizer", part) for name, part in named.items()}
        own = {name: set(one.added_tokens_encoder) - set(one.all_special_tokens) for name, one in tokenizers.items()}
        inversions = set().union(*own.values())
        for string in strings if inversions else ():
            for name, one in tokenizers.items():
                called = {place: token for token, place in one.added_tokens_encoder.items()}
                ids = one(string, add_special_tokens=False, verbose=False).input_ids if own[name] else []
                said = [called.get(place, "") for place in ids]
                for token in sorted(own[name].intersection(said)):
                    if lacking := [other for other, added in own.items() if token not in added]:
                        raise DataError(
                            f'the text "{string}": the textual inversion "{token}" is not in {" and ".join(lacking)}, which '
                            f"would read its pieces. Load it into each: pipe.load_textual_inversion(..., tokenizer=..., "
                            f"text_encoder=...)."
                        )
                    parts = [token, *takewhile(inversions.__contains__, (f"{token}_{k}" for k in count(1)))]
                    places = [place for place, piece in enumerate(said) if piece == token]
                    if any(said[place : place + len(parts)] != parts for place in places):
                        raise DataError(
                            f'the text "{string}": the textual inversion "{token}" has {len(parts)} vectors, of which only the '
                            f'first would be read. Write all of them: "{" ".join(parts)}".'
                        )

    def check_shown(self) -> None:
        """Raises ConfigError for a denoiser of a pipeline in memory whose IP-Adapter waits for a picture: none is shown here."""
        if not isinstance(self.checkpoint, LoadedCheckpoint):
            return
        denoiser = next(self.checkpoint.parts[name] for name in DENOISERS if name in self.checkpoint.parts)
        if any("IPAdapter" in type(one).__name__ for one in getattr(denoiser, "attn_processors", {}).values()):
            raise ConfigError(
                "the pipeline has an IP-Adapter, which wants a picture to be shown beside the text, and none is shown here. Call "
                "pipe.unload_ip_adapter(); or of a U-Net make the image under `with trace(pipe) as tr:`, and read tr.word_map()."
            )
