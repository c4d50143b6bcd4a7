"""Base class of vision transformers: single-file weights, images at one size, and outputs that can be explained."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conceptseg.announcing import announced
from conceptseg.backbones.base import GREATEST_SIDE, RESIZES, Backbone, Checkpoint, stack_images
from conceptseg.backbones.encoders.tower import Tower
from conceptseg.backbones.file_pages import give_back
from conceptseg.backbones.random_weights import RandomWeights
from conceptseg.backbones.settings import device_of, dtype_of
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, in_range, one_of
from conceptseg.types import Task, TrainedOn, checked_word

LABEL_LISTS = ("imagenet", "scenes")
POSITION_RULES = ("timm", "dino")


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """One output a sample that a map is to explain."""

    rows: Float[Tensor, "B r"]
    """Weights of the last linear map that end in it: a row of the classifier, or a text's unit vector."""
    index: Int[Tensor, " B"] | None
    """Its place among a classifier's outputs; None for a text."""


class ImageEncoder(Backbone):
    """A stock vision transformer on one image size, read from a folder or a pinned hub repository on first use.

    path, revision: see `Checkpoint`. trained_on: what supervision stands behind the weights.
    image_size: pixels a side, or [height, width]; null is the checkpoint's own. Images are brought to it by `resize`, their
        aspect not kept, and the position embedding by `position_resize` (see `resized_positions`).
    mean, std: of the normalisation, by colour; null is the checkpoint's own. [0, 0, 0] and [1, 1, 1] leave images in 0..1.
    labels: the names a model's own prediction is among: a list, "imagenet", "scenes", or null for the checkpoint's own.
    randomise: a control, see `RandomWeights`; of CLIP it draws both towers.
    """

    family: str
    has_class_token: ClassVar[bool] = True
    """False where a pooling head makes the image vector of the patches alone."""

    def __init__(
        self,
        path: str,
        trained_on: str,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        image_size: int | Sequence[int] | None = None,
        resize: str = "bicubic",
        position_resize: str = "timm",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        labels: str | Sequence[str] | None = None,
        randomise: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> None:
        self.checkpoint = Checkpoint(path, revision, RandomWeights.of(randomise))
        self.dtype, self.device = dtype_of(dtype, "dtype"), device_of(device)
        if (self.device.type, self.dtype) == ("mps", torch.float64):
            raise ConfigError(
                'extractor.backbone.dtype is float64, which runtime.device "mps" can\'t compute in. Use runtime.device=cpu, or '
                "extractor.backbone.dtype=float32, in which single relevance maps differ between machines."
            )
        one_of("extractor.backbone.resize", resize, RESIZES)
        one_of("extractor.backbone.position_resize", position_resize, POSITION_RULES)
        one_of("extractor.backbone.trained_on", trained_on, get_args(TrainedOn))
        if isinstance(labels, str):
            one_of("extractor.backbone.labels", labels, LABEL_LISTS)
        for side in [image_size] if image_size is None or isinstance(image_size, int) else image_size:
            in_range("extractor.backbone.image_size", side, 1, GREATEST_SIDE)
        self.trained_on: TrainedOn = trained_on  # type: ignore[assignment]
        self.resize, self.position_resize = resize, position_resize
        self._image_size, self._mean, self._std, self._labels = image_size, mean, std, labels
        self.about = about  # licence, memory need, provenance notes: printed, never read
        self.forward_passes = 0

    def identity(self) -> dict[str, Any]:
        """Return the settings of this backbone that change numbers, for the run id. The device is not one of them."""
        return {
            "class": self.family, **self.checkpoint.identity(), "dtype": str(self.dtype), "image_size": self._image_size,
            "resize": self.resize, "position_resize": self.position_resize, "mean": self._mean, "std": self._std,
            "labels": self._labels,
        }  # fmt: skip

    # ------------------------------------------------------------ what the checkpoint says

    @property
    @abstractmethod
    def native_size(self) -> tuple[int, int]:
        """(height, width) that the checkpoint was trained at."""

    @property
    @abstractmethod
    def native_normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation by colour."""

    @property
    @abstractmethod
    def native_labels(self) -> Sequence[str] | None:
        """Class names that the checkpoint comes with."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that the model is shown."""
        if self._image_size is None:
            return self.native_size
        size = (self._image_size,) * 2 if isinstance(self._image_size, int) else tuple(self._image_size)
        if len(size) != 2:
            raise ConfigError(f"extractor.backbone.image_size is {list(size)}; wanted one number or [height, width].")
        return int(size[0]), int(size[1])

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Raises ConfigError where neither the checkpoint nor the config has any."""
        if self._labels == "imagenet":
            from open_clip import IMAGENET_CLASSNAMES

            return tuple(IMAGENET_CLASSNAMES)
        if self._labels == "scenes":
            from conceptseg.data.drawings import OBJECTS

            return OBJECTS
        named = self._labels or self.native_labels
        if not named:
            raise ConfigError(
                f'extractor.backbone.labels is empty and "{self.checkpoint.path}" names no classes, so nothing can be predicted '
                f"or looked up: give a list of names, or one of {', '.join(LABEL_LISTS)}."
            )
        return tuple(checked_word(name, f"extractor.backbone.labels.{k}") for k, name in enumerate(named))

    # ------------------------------------------------------------ the model

    def check_tiling(self, rows: int, columns: int) -> None:
        """Raises ConfigError where patches of rows x columns pixels don't tile the image."""
        if self.image_size[0] % rows or self.image_size[1] % columns:
            raise ConfigError(
                f"extractor.backbone.image_size is {list(self.image_size)}; this model's patches are {rows} x {columns} pixels, "
                f"so multiples of them are wanted."
            )

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The stock module that images go through."""

    @property
    @abstractmethod
    def tower(self) -> Tower:
        """Its parts. Raises TapError for a model that is no plain pre-norm transformer with a class token."""

    @abstractmethod
    def predicted(self, output: Float[Tensor, "B k"]) -> Explained:
        """Return the most probable label of each image from the model's outputs, [B k]."""

    @abstractmethod
    def named(self, names: Sequence[str]) -> Explained:
        """One name a sample. Raises DataError for a name the model has no output for."""

    @abstractmethod
    def score(self, output: Float[Tensor, "B k"], explained: Explained) -> Float[Tensor, " B"]:
        """Return the explained output of each image, [B]: a logit before softmax, or the cosine of image and text."""

    @abstractmethod
    def class_logits(self, output: Float[Tensor, "B k"], words: Sequence[str] = ()) -> Float[Tensor, "B K"]:
        """Return a logit for each of K classes from the model's outputs: its labels, and zero-shot the words too."""

    @abstractmethod
    def class_of(self, word: str, words: Sequence[str]) -> int:
        """Return the place of a word among the classes of `class_logits`. Raises DataError for a word without one."""

    def images(self, tasks: Sequence[Task]) -> Float[Tensor, "B 3 H W"]:
        """Return the images shown to the model, normalised; resized in float64, so that every machine shows the same bits."""
        stacked = stack_images([task.image for task in tasks], self.image_size, self.resize, dtype=torch.float64).float()
        return self._normalised(stacked).to(self.device, self.dtype)

    def black(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Return black images, normalised as those shown to the model are."""
        return self._normalised(torch.zeros(images.shape)).to(images)

    def _normalised(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        native_mean, native_std = self.native_normalisation
        mean, std = (torch.tensor(v)[:, None, None] for v in (self._mean or native_mean, self._std or native_std))
        return (images - mean) / std

    def run(self, images: Float[Tensor, "B 3 H W"], taps: TapSet | None = None) -> Float[Tensor, "B ..."]:
        """Run one forward pass on normalised images and return the model's output, [B k].

        Taps that stop the pass early lose the output; [B 0] comes back.
        """
        self.forward_passes += 1
        if taps is None:
            return self.model(images)
        output = taps.run(lambda: self.model(images))
        return images.new_zeros(len(images), 0) if output is None else output


def checkpoint_file(checkpoint: Checkpoint, name: str) -> Path:
    """A file of a checkpoint: in its folder, or downloaded at the pinned revision. Raises ConfigError if there is none."""
    folder = checkpoint.folder()
    if folder is not None:
        if not (folder / name).exists():
            there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise ConfigError(f'extractor.backbone.path "{checkpoint.path}": wanted {name} in {folder}, which holds {there}.')
        return folder / name
    revision = checkpoint.source()["revision"]  # refuses a repository without a pinned one
    from huggingface_hub import hf_hub_download

    with checkpoint.loading(name):
        return Path(hf_hub_download(checkpoint.path, name, revision=revision))


def checkpoint_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint."""
    path = checkpoint_file(checkpoint, name)
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f'extractor.backbone.path "{checkpoint.path}": {path} is not JSON ({error}).') from error


def checkpoint_weights(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a pickled one (.pth, .bin) without running code.

    Returns tensors [...] by parameter name, each shaped like its parameter. Raises ConfigError for a file that can't be read.
    Of a pickled checkpoint, the teacher of a self-distilled pair is taken, and the prefixes of wrappers are dropped.
    """
    path = checkpoint_file(checkpoint, name)
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with announced(f"reading {name} of {checkpoint.path}", checkpoint.path.startswith("lab:")):
            if path.suffix == ".safetensors":
                return load_file(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise ConfigError(
            f'extractor.backbone.path "{checkpoint.path}": {path} can\'t be read: {str(error).splitlines()[0]}'
        ) from error
    for wrapper in ("teacher", "state_dict"):
        state = state.get(wrapper, state)
    return {key.removeprefix("module.").removeprefix("backbone."): value for key, value in state.items()}


def load_strictly(model: nn.Module, state: dict[str, Tensor], checkpoint: Checkpoint, config: str) -> None:
    """Copy tensors [...] by parameter name, each shaped like its parameter. Raises ConfigError if names or shapes differ.

    Pages of a mapped file leave memory once they were copied, so that weights are not in memory twice.
    """

    def leave(prefix: str, module: nn.Module, keys: Any) -> None:
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if f"{prefix}{name}" in state:
                give_back(state[f"{prefix}{name}"])

    hooks = [
        module.register_load_state_dict_post_hook(partial(leave, f"{name}." if name else ""))
        for name, module in model.named_modules()
    ]
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ConfigError(
            f'extractor.backbone.path "{checkpoint.path}": its weights are not those of the {type(model).__name__} that its '
            f"{config} describes: {' '.join(lines[1:3])}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
