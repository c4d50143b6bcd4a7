"""Base classes of methods on an image encoder: their declarations, and the step from one map per class to one per concept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, normalize

from conceptseg.backbones.encoders.image_encoder import Explained, ImageEncoder
from conceptseg.backbones.encoders.image_text import ImageTextEncoder
from conceptseg.backbones.encoders.tower import tap_attended, tap_input, tap_normed
from conceptseg.backbones.encoders.transformers_model import TransformersBackbone
from conceptseg.backbones.in_memory import Loaded, backbone_from
from conceptseg.backbones.sheets import CLIP
from conceptseg.backbones.taps import TapSet
from conceptseg.errors import ConfigError, one_of
from conceptseg.extractors.base import OneView
from conceptseg.types import BACKGROUND, Batch, Concepts, Told

POOLED = "extractor=maskclip, sclip, clearclip, naclip, legrad or integrated_gradients_clip"
"""Methods that read models with a pooling head, for messages."""
TOLD_BY_CLASS: dict[str, Told] = {"predicted": "own prediction", "given": "true name"}


class ModelMethod(OneView):
    """A method on one model: its numbers rest on what that model was trained on."""

    def __init__(self, backbone: ImageEncoder | TransformersBackbone | Loaded) -> None:
        self.backbone = backbone_from(backbone)
        if self.backbone.denoises:
            raise ConfigError(
                f"extractor.backbone is a {type(self.backbone).__name__}, and {type(self).__name__} shows images to a vision "
                f"encoder. Choose one of its sheets, such as backbone@extractor.backbone=lab_clip."
            )
        self.trained_on = self.backbone.trained_on


class ImageModelMethod(ModelMethod):
    """A method that shows images, as they are, to one encoder.

    reads_class_token: whether it needs the class token, or a block's attention of one. A method that does not may be given a
    model that pools its patches by attention, whose pooling head is the tower's last block.
    """

    backbone: ImageEncoder
    reads_class_token: ClassVar[bool] = True

    def __init__(self, backbone: ImageEncoder | Loaded) -> None:
        super().__init__(backbone)
        if self.reads_class_token and not getattr(self.backbone, "has_class_token", True):
            raise ConfigError(
                f"extractor.backbone is a {type(self.backbone).__name__}, which pools its patches by attention and has no class "
                f"token, and {type(self).__name__} reads that token in the blocks. Choose a method that reads the pooling head "
                f"({POOLED}), or a CLIP model (backbone@extractor.backbone=lab_clip or clip_vit_b_16_laion2b)."
            )


def on_every_channel(batch: Batch, maps: Float[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
    """Repeat a map that depends on no word for each of the C words."""
    return repeat(maps, "B h w -> B C h w", C=len(batch.concepts[0]))


class ClassMethod(ImageModelMethod):
    """A method that explains one class score, and says of which class.

    explained_class: "predicted" explains the model's own most probable label, independent of the words, and shows that map on
        every channel; "given" explains each class word and leaves background channels at 0. Maps of two
        classes have no common scale, so channels are not compared.
    """

    comparable = False
    explains_absent: ClassVar[bool] = False
    """Whether names whose class is not in the image have maps too, though no protocol of one class decides by them."""

    def __init__(self, backbone: ImageEncoder | Loaded, explained_class: str = "predicted") -> None:
        super().__init__(backbone)
        one_of("extractor.explained_class", explained_class, TOLD_BY_CLASS)
        self.explained_class, self.told = explained_class, TOLD_BY_CLASS[explained_class]

    def asked_for_words(self) -> ClassMethod:
        """With explained_class "given": whoever names classes asks for them."""
        if self.explained_class == "given":
            return self
        given = copy(self)
        given.explained_class, given.told = "given", TOLD_BY_CLASS["given"]
        return given

    def named(self, names: Sequence[str], batch: Batch) -> Explained:
        """One word of each image, as the score that is explained; a method may change the words' vectors here."""
        return self.backbone.named(names)

    def by_class(
        self, batch: Batch, output: Float[Tensor, "B k"], explain: Callable[[Explained], Float[Tensor, "B h w"]]
    ) -> Float[Tensor, "B C h w"]:
        """Maps of `explain` on the channels they belong to. It is called once a class word that some image asks for."""
        if self.explained_class == "predicted":
            return on_every_channel(batch, explain(self.backbone.predicted(output)).detach())
        channels: list[Tensor | None] = []
        wanted = torch.tensor([self._have_maps(c) for c in batch.concepts], device=output.device)
        for channel in range(wanted.shape[1]):
            asked = wanted[:, channel]
            if not asked.any():
                channels.append(None)
                continue
            # An image for which this channel is background lends its first class word, and the map is put to 0 below.
            names = [
                c.names[channel if label else next(i for i, v in enumerate(c.labels) if v)]
                for c, label in zip(batch.concepts, asked.tolist(), strict=True)
            ]
            maps = explain(self.named(names, batch)).detach()
            channels.append(torch.where(asked[:, None, None], maps, torch.zeros_like(maps)))
        shown = next(m for m in channels if m is not None)
        return torch.stack([torch.zeros_like(shown) if m is None else m for m in channels], dim=1)

    def _have_maps(self, concepts: Concepts) -> list[bool]:
        """Whether each channel has a map of its own."""
        absent = concepts.distractors if self.explains_absent else ()
        return [label != BACKGROUND or channel in absent for channel, label in enumerate(concepts.labels)]


class LastBlockGradient(ClassMethod):
    """A method that weights the last block by the gradient of a class score. One forward and, per word, one backward pass.

    The gradient is that at the class token's heads, before the output projection. Implement `weighted`.
    """

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        normed: list[Tensor] = []
        attended: list[Tensor] = []
        with torch.enable_grad(), TapSet(self.backbone.model) as taps:
            tap_normed(taps, tower, last, normed.append)
            tap_attended(taps, tower, last, attended.append)
            output = self.backbone.run(needs_gradient(self.backbone.images(batch.tasks)), taps)

        def explain(explained: Explained) -> Float[Tensor, "B h w"]:
            (arriving,) = torch.autograd.grad(self.backbone.score(output, explained).sum(), attended, retain_graph=True)
            return tower.maps(self.weighted(normed[0].detach(), arriving))

        return self.by_class(batch, output, explain)

    @abstractmethod
    def weighted(self, normed: Float[Tensor, "B T d"], arriving: Float[Tensor, "B T d"]) -> Float[Tensor, "B L"]:
        """Return one weight per patch. normed: what enters the block's attention; arriving: the gradient at its heads."""


class PatchTextMethod(ImageModelMethod):
    """Cosine of patch vectors with the vector of each word: implement `patch_vectors`."""

    told = "true name"
    windowed = True
    family = CLIP
    reads_class_token = False
    backbone: ImageTextEncoder

    def __init__(self, backbone: ImageEncoder | Loaded) -> None:
        super().__init__(needs_text(backbone))

    def last_query_key_value(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "B A T k"], Float[Tensor, "B A T k"], Float[Tensor, "B A T k"]]:
        """Return queries, keys and values of every head in the last block."""
        _, normed = self.before_last_block(batch)
        return self.backbone.tower.query_key_value(-1, normed)

    def before_last_block(self, batch: Batch) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
        """Return the residual stream that enters the last block, and the same after the block's first norm.

        Of a pooling head, the last block of a model that has one, both are the patches after the final norm.
        """
        tower, last = self.backbone.tower, len(self.backbone.tower.blocks) - 1
        stream: list[Tensor] = []
        normed: list[Tensor] = []
        with TapSet(self.backbone.model) as taps:
            tap_input(taps, tower, last, stream.append)
            tap_normed(taps, tower, last, normed.append)
            self.backbone.run(self.backbone.images(batch.tasks), taps)
        return stream[0], normed[0]

    def read_out(
        self, mixed: Float[Tensor, "B A T k"], entering: Float[Tensor, "B T d"] | None = None
    ) -> Float[Tensor, "B h w r"]:
        """Return patch vectors from what the last block's attention gathered, through its output projection.

        entering: the residual stream before the block, which is then added, and the MLP applied; None leaves both out. A pooling
        head has no such residual, so there the MLP alone is kept.
        """
        tower, block = self.backbone.tower, self.backbone.tower.blocks[-1]
        x = linear(rearrange(mixed, "B A T k -> B T (A k)"), block.proj.weight, block.proj.bias)
        if entering is not None:
            x = x if block.pools else entering + x
            hidden = block.activation(linear(block.second_norm(x), block.up.weight, block.up.bias))
            x = x + linear(hidden, block.down.weight, block.down.bias)
        return rearrange(self.backbone.project(x[:, tower.prefix :]), "B (h w) r -> B h w r", h=tower.grid[0])

    @abstractmethod
    def patch_vectors(self, batch: Batch) -> Float[Tensor, "B h w k"]:
        """Return one vector per patch in the common space of image and text."""

    def saliency(self, batch: Batch) -> Float[Tensor, "B C h w"]:
        with torch.no_grad():
            vectors = normalize(self.patch_vectors(batch), dim=-1)
            words = word_vectors(self.backbone, batch)
            return torch.einsum("bhwk,bck->bchw", vectors, words)


def word_vectors(backbone: ImageTextEncoder, batch: Batch) -> Float[Tensor, "B C k"]:
    """Return unit vectors of the words of each image."""
    flat = [name for concepts in batch.concepts for name in concepts.names]
    return rearrange(backbone.text_vectors(flat), "(B C) k -> B C k", B=len(batch))


def needs_text(backbone: ImageEncoder | Loaded) -> ImageTextEncoder:
    """The encoder itself. Raises ConfigError for one that reads no text."""
    backbone = backbone_from(backbone)
    if not isinstance(backbone, ImageTextEncoder):
        raise ConfigError(
            f"extractor.backbone is a {type(backbone).__name__}, which reads no text, and this method compares patches with "
            f"words. Choose a CLIP model (backbone@extractor.backbone=lab_clip or clip_vit_b_16_laion2b)."
        )
    return backbone


def needs_gradient(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Return the images as the root of a graph; the model's own weights take no gradient."""
    return images.detach().clone().requires_grad_()


def last_layers(count: int, depth: int, key: str) -> range:
    """The last `count` blocks. Raises ConfigError where there are fewer."""
    if not 0 < count <= depth:
        raise ConfigError(f"extractor.{key} is {count}, but this model has {depth} blocks: wanted 1 to {depth}.")
    return range(depth - count, depth)
