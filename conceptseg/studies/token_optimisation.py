"""Token optimisation of OVAM: two text states whose map fits one annotated image, to be used for a class on any other.

The U-Net runs once, with its queries kept. The states of "everything else" and of the object are then changed by gradient descent
so that their maps, a softmax over the two, come close to the annotation.
Source: Marcos-Manchón et al. 2024 (arXiv:2403.14291) and vpulab/ovam at 12afd87, ovam/optimize/optimize.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import Attended, CrossAttentionTap, cross_attentions
from conceptseg.backbones.word_tokens import exact_positions
from conceptseg.errors import ConfigError, DataError
from conceptseg.studies.entanglement import image_change
from conceptseg.studies.folders import Generation, file_of
from conceptseg.studies.generator import Generator
from conceptseg.studies.nouns import iou
from conceptseg.trace import WordMap

ROWS = ("unconditional", "conditional")
"""Whose queries are read under guidance; the released code reads the unconditional pass."""


SAME_IMAGE = 3.0  # grey levels on average: another kernel or thread count moves an image by less


@dataclass
class LayerQueries:
    """Queries of one layer in every call of the U-Net, [A N d] each, and what turns text states into its keys."""

    to_k: nn.Module
    scale: float
    grid: tuple[int, int]
    calls: list[Float[Tensor, "A N d"]] = field(default_factory=list)


QueryRecord = dict[int, LayerQueries]
"""By layer; up and down blocks."""


@contextmanager
def recording_queries(unet: Any, record: QueryRecord, row: str = "unconditional") -> Iterator[None]:
    """Keep the queries of one image's row of all cross-attention that runs inside; a fresh recording replaces an older one."""
    if row not in ROWS:
        raise ConfigError(f'recording queries of "{row}": wanted one of {", ".join(ROWS)}.')
    record.clear()

    def on_layer(attended: Attended) -> None:
        index = attended.layer.index
        if index not in record:
            record[index] = LayerQueries(attended.attention.get_submodule("to_k"), attended.scale, attended.grid)
        record[index].calls.append(attended.queries[0 if row == "unconditional" else -1].detach().float())

    layers = [one for one in cross_attentions(unet.config) if not one.path.startswith("mid")]
    with TapSet(unet) as taps:
        CrossAttentionTap(layers, on_layer).attach(taps)
        yield


def open_vocabulary_maps(
    record: QueryRecord, states: Float[Tensor, "T d"], size: tuple[int, int] | None = None
) -> Float[Tensor, "T X Y"]:
    """OVAM's maps of a text's states: softmax over them, summed over heads, steps and (bilinearly enlarged) layers.

    size: what they are enlarged to at the end; the largest grid if None. Gradients reach the states.
    """
    largest = max(layer.grid for layer in record.values())
    total = states.new_zeros((1, len(states), *largest))
    for layer in record.values():
        heads = len(layer.calls[0])
        weight = next(layer.to_k.parameters())
        keys = rearrange(layer.to_k(states.to(weight)).to(states), "T (A d) -> A T d", A=heads)
        maps = states.new_zeros((layer.grid[0] * layer.grid[1], len(states)))
        for queries in layer.calls:
            maps = maps + torch.einsum("and,atd->ant", queries.to(states) * layer.scale, keys).softmax(-1).sum(0)
        maps = rearrange(maps, "(h w) T -> 1 T h w", h=layer.grid[0])
        total = total + interpolate(maps, size=largest, mode="bilinear")
    return total[0] if size is None else interpolate(total, size=size, mode="bilinear")[0]


def annotation_loss(maps: Float[Tensor, "2 H W"], truth: Bool[Tensor, "H W"]) -> Float[Tensor, ""]:
    """Cross-entropy of the two maps, scaled together to 0..1, against the annotation; its least value is about 0.31."""
    scaled = (maps - maps.min()) / (maps.max() - maps.min())
    target = torch.stack([~truth, truth]).to(scaled)
    return cross_entropy(scaled[None], target[None])


@dataclass(frozen=True)
class OptimisedToken:
    """The states with the least loss, and the loss before every change of them."""

    states: Float[Tensor, "2 d"]
    losses: tuple[float, ...]


def optimise_token(
    record: QueryRecord,
    start: Float[Tensor, "2 d"],
    truth: Bool[Tensor, "H W"],
    epochs: int = 800,
    rate: float = 100.0,
    step: int = 120,
    decay: float = 0.7,
) -> OptimisedToken:
    """Gradient descent from a word's own states, [start token, object]; the rate is multiplied by `decay` every `step` epochs.

    Defaults are those of the released script; elsewhere it names rates to 300, steps of 80 and 500 to 1,000 epochs.
    """
    states = start.detach().clone().requires_grad_(True)
    optimiser = torch.optim.SGD([states], lr=rate)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, step_size=step, gamma=decay)
    losses: list[float] = []
    best = states.detach().clone()
    for _ in range(epochs):
        optimiser.zero_grad()
        loss = annotation_loss(open_vocabulary_maps(record, states, (truth.shape[0], truth.shape[1])), truth)
        value = float(loss.detach())
        if not losses or value < min(losses):
            best = states.detach().clone()
        losses.append(value)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        optimiser.step()
        schedule.step()
    return OptimisedToken(best, tuple(losses))


def annotated(
    generator: Generator, one: Generation, word: str, row: str
) -> tuple[QueryRecord, Float[Tensor, "2 d"], Bool[Tensor, "H W"]]:
    """Queries of a generation that is made again, the word's own states in its prompt, and its truth mask.

    Raises DataError if there is no mask, or if another image comes out than the one that was annotated.
    """
    truths = one.truths()
    if word not in truths:
        raise DataError(
            f"{one.folder}: no truth mask of {word}; wanted {file_of(word)}.gt.png. It has: {sorted(truths) or 'none'}."
        )
    record: QueryRecord = {}
    made = generator.generate(one.prompt, one.seed, around=recording_queries(generator.backbone.unet, record, row))
    if made.image.size != one.image.size or image_change(made.image, one.image) > SAME_IMAGE:
        raise DataError(
            f"{one.folder}: another image comes out of its prompt and seed than output.png. Give the model, --steps, --guidance "
            f"and --size with which it was made."
        )
    states = generator.backbone.unpadded_text(one.prompt).clone().float()
    return (
        record,
        states[[0, exact_positions(generator.backbone.tokenizer, one.prompt, word)[-1]]],
        torch.from_numpy(truths[word]),
    )


def judged(
    record: QueryRecord, states: Float[Tensor, "2 d"], truth: Bool[Tensor, "H W"], word: str, threshold: float
) -> tuple[WordMap, float]:
    """The object's map and the IoU of its mask (at least threshold times its greatest value) with the annotation."""
    with torch.no_grad():
        held = WordMap(word, open_vocabulary_maps(record, states)[1])
    mask = held.mask((truth.shape[0], truth.shape[1]), threshold).numpy() > 0
    return held, iou(mask, truth.numpy())
