"""A control for explanations: a stock model whose weights are drawn at random, all of them or from one block to the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from conceptseg.errors import ConfigError
from conceptseg.keys import digest

BLOCKS = (
    "transformer_blocks", "single_transformer_blocks", "layers", "down_blocks", "mid_block", "up_blocks", "blocks",
    "visual.transformer.resblocks", "vision_model.encoder.layers",
)  # fmt: skip
"""Places of a model's blocks, in the order in which they compute; of CLIP and SigLIP the image tower's."""
SETTING = "extractor.backbone.randomise"


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Which weights are drawn anew, and how: from a normal distribution with the mean and standard deviation that each tensor
    had, so that activations keep their scale and nothing that was learnt is left in single values.

    seed: each tensor draws by (seed, its name), so that two depths of one seed share what both draw.
    from_block: the weights of this block to the last, counted from 0 or, below 0, from the end; None draws every weight.

    Source: Adebayo et al. 2018, Sanity Checks for Saliency Maps (arXiv:1810.03292), section 3, which draws by the initialiser.
    """

    seed: int
    from_block: int | None = None

    @classmethod
    def of(cls, setting: Any) -> RandomWeights | None:
        """From the setting `randomise`; None where it is not set. Raises ConfigError for anything but its two keys."""
        if setting is None:
            return None
        known = {"seed", "from_block"}
        if not isinstance(setting, Mapping) or not set(setting) <= known or not isinstance(setting.get("seed"), int):
            raise ConfigError(f"{SETTING} is {setting!r}; wanted null, {{seed: 0}}, or {{seed: 0, from_block: 2}}.")
        block = setting.get("from_block")
        if isinstance(setting["seed"], bool) or setting["seed"] < 0 or not (block is None or type(block) is int):
            raise ConfigError(f"{SETTING} is {dict(setting)}; wanted a seed of 0 or more, and a block's number or null.")
        return cls(setting["seed"], block)

    def identity(self) -> dict[str, Any]:
        """For the run id."""
        return {"seed": self.seed, "from_block": self.from_block}

    def draw(self, model: nn.Module) -> None:
        """Draw the weights in place. Raises ConfigError for a block that the model lacks."""
        places = self.places([name for name, _ in model.named_parameters()], type(model).__name__)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.is_meta or not (places is None or name.startswith(places)):
                    continue
                generator = torch.Generator().manual_seed(int(digest([self.seed, name], 15), 16))
                held = weight.detach().to("cpu", torch.float64)
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight.copy_(held.mean() + held.std(correction=0) * noise)

    def places(self, names: Sequence[str], model: str) -> tuple[str, ...] | None:
        """Beginnings of the names of the weights that are drawn; None for all. Raises ConfigError for a block that they lack.

        names: of a model's weights. model: what the message calls it.
        """
        first = self.from_block
        if first is None:
            return None
        blocks = blocks_of(names)
        if not -len(blocks) <= first < len(blocks):
            raise ConfigError(
                f"{SETTING}.from_block is {first}, but {model} has {len(blocks)} blocks that are known. "
                + (f"Choose {-len(blocks)} to {len(blocks) - 1}, or null for every weight." if blocks else "Set it to null.")
            )
        return tuple(blocks[first:])


def blocks_of(names: Sequence[str]) -> list[str]:
    """Beginnings of the names of a model's weights, block by block in the order in which they compute.

    >>> blocks_of(["down_blocks.1.conv.weight", "mid_block.norm.bias", "down_blocks.0.conv.weight", "head.weight"])
    ['down_blocks.0.', 'down_blocks.1.', 'mid_block.']
    """
    blocks = []
    for place in BLOCKS:
        within = [name.removeprefix(f"{place}.").partition(".")[0] for name in names if name.startswith(f"{place}.")]
        numbers = sorted({int(part) for part in within if part.isdecimal()})
        blocks += [f"{place}.{number}." for number in numbers] or [f"{place}."] * bool(within)
    return blocks
