"""Denoisers that a trace can hook: a U-Net, or a transformer that text enters by cross-attention alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.transformers.cross_attention import (
    HOSTS,
    TextCrossAttentionTap,
    is_host,
    text_cross_attentions,
    token_grid,
)
from conceptseg.backbones.unets.attention_maps import (
    CFG_ROWS,
    Attended,
    CrossAttention,
    CrossAttentionTap,
    cross_attentions,
    kept_rows,
    reference_side,
)
from conceptseg.backbones.word_tokens import POSITION_RULES
from conceptseg.errors import TapError
from conceptseg.trace.calls import Call, PipelineCalls


@dataclass(frozen=True)
class Pass:
    """One forward pass of the denoiser. rows: those of its batch that maps are read from; None if it has none of the prompts."""

    rows: slice | None
    grid: tuple[int, int]
    """Rows and columns of the latents (U-Net) or of the image's tokens (transformer)."""
    frames: int = 1


class Host(ABC):
    """The denoiser of a pipeline."""

    part: str
    """Attribute of the pipeline that holds it."""
    name: str
    cfg_rows: tuple[str, ...] = CFG_ROWS
    token_match: tuple[str, ...] = POSITION_RULES
    map_side: int | None = None
    """Shorter side of the maps unless one is named; None for that of the grid."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.module: nn.Module = getattr(pipe, self.part)
        self.config: Mapping[str, Any] = self.module.config

    @abstractmethod
    def layers(self) -> tuple[CrossAttention, ...]:
        """Every cross-attention to the text."""

    @abstractmethod
    def attach(self, taps: TapSet, layers: tuple[CrossAttention, ...], on_layer: Callable[[Attended], None]) -> None:
        """Hook the layers."""

    @abstractmethod
    def begin(self, call: Call, calls: PipelineCalls, rule: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        """Read a forward pass off its arguments, before it runs. Raises TapError for rows that are not those of the call."""


class UNetHost(Host):
    """A UNet2DConditionModel."""

    part, name = "unet", "U-Net"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.map_side = reference_side(int(self.config["sample_size"]), int(pipe.vae_scale_factor))

    def layers(self) -> tuple[CrossAttention, ...]:
        return cross_attentions(self.config)

    def attach(self, taps: TapSet, layers: tuple[CrossAttention, ...], on_layer: Callable[[Attended], None]) -> None:
        CrossAttentionTap(layers, on_layer).attach(taps)

    def begin(self, call: Call, calls: PipelineCalls, rule: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        sample = args[0] if args else kwargs["sample"]
        call.check(len(sample), type(self.pipe).__name__)
        return Pass(kept_rows(len(sample), call.guided, rule), (sample.shape[-2], sample.shape[-1]))


class TransformerHost(Host):
    """A transformer of `HOSTS`. Its maps have the grid of the image's tokens, unless a side is named."""

    part, name = "transformer", "transformer"
    cfg_rows, token_match = ("conditional",), ("exact",)  # the reference's slips are defined for its U-Nets alone

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if getattr(pipe, "transformer_2", None) is not None:
            raise TapError(
                f"tracing {type(pipe).__name__}: it has a second transformer for its last steps (Wan 2.2), which one trace would "
                f"miss. Pipelines with one transformer can be traced."
            )
        self._without = 0

    def layers(self) -> tuple[CrossAttention, ...]:
        return text_cross_attentions(self.module)

    def attach(self, taps: TapSet, layers: tuple[CrossAttention, ...], on_layer: Callable[[Attended], None]) -> None:
        self._tap = TextCrossAttentionTap(layers, on_layer)
        self._tap.attach(taps)

    def begin(self, call: Call, calls: PipelineCalls, rule: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        given = {**({"hidden_states": args[0]} if args else {}), **kwargs}
        count, text, pipeline = len(given["hidden_states"]), given.get("encoder_hidden_states"), type(self.pipe).__name__
        if count not in (call.rows, call.rows * (2 if call.guided else 1)) or text is None or len(text) != count:
            raise TapError(
                f"tracing {pipeline}: its transformer runs with {count} rows of images and {0 if text is None else len(text)} of "
                f"text, wanted {call.rows}{f' or {2 * call.rows}' if call.guided else ''} ({call.rows} images, "
                f"{'with' if call.guided else 'without'} guidance). Pipelines with a third pass (perturbed attention) can't be "
                f"traced."
            )
        rows = calls.conditional_rows(text)
        self._without = 0 if rows is not None else self._without + 1
        if self._without > (1 if call.guided and count == call.rows else 0):
            raise TapError(
                f"tracing {pipeline}: its transformer is given other text than encode_prompt returned, so which rows hold the "
                f"prompt is not known. Embeddings must go from encode_prompt to the transformer as they are."
            )
        frames, height, width = self._tap.grid = token_grid(self.config, given)
        return Pass(rows, (height, width), frames)


def host_of(pipe: Any) -> Host:
    """The denoiser of a pipeline. Raises TapError for a pipeline that can't be traced."""
    unet: Any = getattr(pipe, "unet", None)
    is_unet = isinstance(unet, nn.Module) and "down_block_types" in getattr(unet, "config", {})
    transformer = getattr(pipe, "transformer", None)
    if not is_unet and not is_host(transformer):
        held = "" if transformer is None else f" but a {type(transformer).__name__}"
        raise TapError(
            f"tracing {type(pipe).__name__}: it has no UNet2DConditionModel, nor a transformer that text enters by "
            f"cross-attention alone ({', '.join(HOSTS)}){held}. "
            f"Flux and SD3 denoise with joint attention: see the extractor concept_attention."
        )
    if not callable(getattr(pipe, "encode_prompt", None)):
        raise TapError(
            f"tracing {type(pipe).__name__}: it has no encode_prompt, so which rows of a batch hold the prompt is not known."
        )
    return UNetHost(pipe) if is_unet else TransformerHost(pipe)
