"""Heat maps of a prompt's words while a stock diffusers pipeline generates (DAAM, Tang et al. 2023, arXiv:2210.04885).

    with trace(pipe) as tr:
        image = pipe("a dog chases a ball").images[0]
    tr.word_map("dog").overlay(image).save("dog.png")

Any pipeline that denoises with a UNet2DConditionModel can be traced: text-to-image, image-to-image, in-painting, with given
embeddings, several prompts, several images, any aspect ratio. So can those of transformers that text enters by cross-attention
alone: PixArt, Sana, Wan 2.1, LTX-Video, Lumina-Next, HunyuanDiT. Its attention stays as it is; everything is put back on leaving.
"""

import sys
from types import ModuleType
from typing import Any

from conceptseg.trace.maps import MaskRule, PromptMaps, WordMap
from conceptseg.trace.tracer import Trace, trace

__all__ = ["MaskRule", "PromptMaps", "Trace", "WordMap", "trace"]


class _CallablePackage(ModuleType):
    """`from conceptseg import trace` gives this package, whose name it is; called, it opens a trace as `trace.trace` does."""

    def __call__(self, pipe: Any, **options: Any) -> Trace:
        return Trace(pipe, **options)


sys.modules[__name__].__class__ = _CallablePackage
