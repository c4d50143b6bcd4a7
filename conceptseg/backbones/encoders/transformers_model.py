"""Models of transformers that segment a named object: GroupViT, CLIPSeg, Grounding DINO, and SAM 2, which takes boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from conceptseg.backbones.base import RESIZES, Backbone, Checkpoint, stack_images
from conceptseg.backbones.encoders.image_encoder import checkpoint_file
from conceptseg.backbones.planned_weights import load_part
from conceptseg.backbones.random_weights import RandomWeights
from conceptseg.backbones.settings import check_length, device_of, dtype_of
from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of
from conceptseg.types import Task, TrainedOn

ARCHITECTURES = ("GroupViTModel", "CLIPSegForImageSegmentation", "GroundingDinoForObjectDetection", "Sam2Model")


class TransformersBackbone(Backbone):
    """A stock model of transformers in its hub layout, on images of one square size.

    architecture: the class. text_tokens: padded length of a text. prompt: what a name is put into, "{}" standing for it.
    mean, std: of the normalisation, by colour. randomise: a control, see `RandomWeights`.
    """

    def __init__(
        self,
        path: str,
        architecture: str,
        trained_on: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        resize: str = "bicubic",
        text_tokens: int = 77,
        prompt: str = "a photo of a {}.",
        randomise: Mapping[str, Any] | None = None,
        **about: Any,
    ) -> None:
        one_of("extractor.backbone.architecture", architecture, ARCHITECTURES)
        one_of("extractor.backbone.trained_on", trained_on, get_args(TrainedOn))
        one_of("extractor.backbone.resize", resize, RESIZES)
        if "{}" not in prompt:
            raise ConfigError(f'extractor.backbone.prompt is "{prompt}"; wanted a text with "{{}}" for the name.')
        self.checkpoint = Checkpoint(path, revision, RandomWeights.of(randomise))
        self.architecture, self.image_size, self.resize = architecture, image_size, resize
        self.trained_on: TrainedOn = trained_on  # type: ignore[assignment]
        self.mean, self.std, self.text_tokens, self.prompt = tuple(mean), tuple(std), text_tokens, prompt
        self.dtype, self.device = dtype_of(dtype, "dtype"), device_of(device)
        self.about = about  # licence, memory need, provenance notes: printed, never read
        self.forward_passes = 0

    def identity(self) -> dict[str, Any]:
        """Return the settings of this backbone that change numbers, for the run id. The device is not one of them."""
        return {
            "class": self.architecture, **self.checkpoint.identity(), "dtype": str(self.dtype), "image_size": self.image_size,
            "resize": self.resize, "mean": list(self.mean), "std": list(self.std), "text_tokens": self.text_tokens,
            "prompt": self.prompt,
        }  # fmt: skip

    @cached_property
    def model(self) -> nn.Module:
        import transformers

        checkpoint_file(self.checkpoint, "config.json")
        kind = getattr(transformers, self.architecture)
        # GroupViT's masks are its attention, which fused attention does not give back.
        how = {"attn_implementation": "eager"} if self.architecture == "GroupViTModel" else {}
        model = load_part(self.checkpoint, "model", kind, torch_dtype=self.dtype, use_safetensors=True, **how)
        return self.checkpoint.drawn(model).to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        checkpoint_file(self.checkpoint, "tokenizer_config.json")
        with self.checkpoint.loading("tokenizer"):
            return AutoTokenizer.from_pretrained(**self.checkpoint.source())

    def token_ids(self, names: Sequence[str]) -> tuple[Int[Tensor, "n N"], Int[Tensor, "n N"]]:
        """Return token ids of the prompts, padded to length N, and masks. Raises DataError for an unknown word or a cut text."""
        texts = [self.prompt.replace("{}", name) for name in names]
        check_length(self.tokenizer, texts, self.text_tokens, "extractor.backbone.text_tokens")
        length = {"padding": "max_length", "truncation": True, "max_length": self.text_tokens, "return_tensors": "pt"}
        found = self.tokenizer(texts, **length)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown != self.tokenizer.eos_token_id and bool((found.input_ids == unknown).any()):
            words = [w for w in self.tokenizer.get_vocab() if w.isalpha()]
            word = next(w for text in texts for w in text.split() if unknown in self.tokenizer(w).input_ids)
            raise DataError(f'the word "{word}" is unknown to this backbone\'s tokenizer. {did_you_mean(word, words)}')
        return found.input_ids.to(self.device), found.attention_mask.to(self.device)

    def images(self, tasks: Sequence[Task]) -> Float[Tensor, "B 3 H W"]:
        """Return the images shown to the model, normalised."""
        stacked = stack_images([task.image for task in tasks], (self.image_size, self.image_size), self.resize)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return ((stacked - mean) / std).to(self.device, self.dtype)

    def run(self, **inputs: Any) -> Any:
        """One forward pass."""
        self.forward_passes += 1
        with torch.no_grad():
            return self.model(**inputs)
