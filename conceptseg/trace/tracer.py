"""The trace: hooks on a pipeline's U-Net that collect heat maps, call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import (
    CFG_ROWS,
    UPSAMPLINGS,
    Attended,
    CrossAttention,
    CrossAttentionTap,
    cross_attentions,
    grid_factor,
    kept_rows,
    map_size,
    reference_half,
    reference_side,
)
from conceptseg.backbones.unets.word_tokens import POSITION_RULES, prompt_length
from conceptseg.errors import TapError, ViewError, one_of
from conceptseg.trace.calls import Call, PipelineCalls
from conceptseg.trace.maps import PromptMaps, WordMap
from conceptseg.trace.sums import RunningMap, RunningSums, SpaceReduce


class Trace:
    """Collects heat maps of whatever its pipeline generates; a new call of the pipeline starts afresh.

    keep: "pairs" holds raw sums of every (layer, head), exact as in the reference and open to any selection afterwards; "map"
        holds one map of the chosen layers and cuts at 0 in every step instead of once (not the reference's order).
    steps: also hold one map per step. layers: indices as in `cross_attentions`, those of up and down blocks unless given;
        include_mid: the mid block as well. prompt: the text behind given embeddings. The rest as in `extractors.daam.DAAM`.
    """

    def __init__(
        self,
        pipe: Any,
        keep: Literal["pairs", "map"] = "pairs",
        steps: bool = False,
        layers: Sequence[int] | None = None,
        include_mid: bool = False,
        cfg_rows: str = "conditional",
        exclude_factor: int | None = 8,
        upsampling: str = "bicubic_clamped",
        token_match: str = "exact",
        map_side: int | None = None,
        prompt: str | Sequence[str] | None = None,
    ) -> None:
        for value, key, choices in (
            (keep, "keep", ("pairs", "map")), (cfg_rows, "cfg_rows", CFG_ROWS), (upsampling, "upsampling", UPSAMPLINGS),
            (token_match, "token_match", POSITION_RULES),
        ):  # fmt: skip
            one_of(f"trace({key}=...)", value, choices)
        config = _unet_config(pipe)
        self.pipe, self.keep, self.holds_steps = pipe, keep, steps
        self.layers, self.cfg_rows, self.exclude_factor = (
            _chosen_layers(pipe, config, layers, include_mid),
            cfg_rows,
            exclude_factor,
        )
        self.upsampling, self.token_match = upsampling, token_match
        self.map_side = map_side or reference_side(int(config["sample_size"]), int(pipe.vae_scale_factor))
        given = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
        self.calls = PipelineCalls(pipe, given, self._begin)
        self._taps, self._handles = TapSet(pipe.unet), list[Any]()
        self._start(None)

    # ------------------------------------------------------------ coming and going

    def __enter__(self) -> Trace:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        """Hook the pipeline. Raises TapError if it is traced already or can't be."""
        self.calls.attach()
        try:
            CrossAttentionTap(self.layers, self._on_layer).attach(self._taps)
            unet = self.pipe.unet
            self._handles.append(unet.register_forward_pre_hook(self._before_unet, with_kwargs=True))
            self._handles.append(unet.register_forward_hook(self._after_unet, with_kwargs=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Put everything back; what was collected stays. Safe to call twice."""
        self._taps.remove()
        while self._handles:
            self._handles.pop().remove()
        self.calls.remove()

    # ------------------------------------------------------------ what the pipeline does

    def _begin(self, call: Call) -> None:
        """A call of the pipeline begins. Raises TapError if its U-Net is no longer the one that was hooked."""
        if self.pipe.unet is not self._taps.model:
            raise TapError(
                f"tracing {type(self.pipe).__name__}: since the trace began its U-Net was replaced by another module, a "
                f"{type(self.pipe.unet).__name__} (torch.compile does so). Replace it before the trace."
            )
        self._taps.check()
        self._start(call)

    def _start(self, call: Call | None) -> None:
        self.call = call
        self.sums = RunningSums()
        self.map = RunningMap(self.keep == "map", self.holds_steps)
        self.steps_done = 0
        self.size: tuple[int, int] = (0, 0)
        self._seen: set[int] = set()

    def _before_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        if self.call is None:
            raise TapError(
                "tracing the U-Net: it runs, but the pipeline encoded no prompt before, so its rows have no prompts. Call "
                "the pipeline, not the U-Net."
            )
        self.call.check(len(sample), type(self.pipe).__name__)
        self._taps.check()
        self.size = map_size((sample.shape[-2], sample.shape[-1]), self.map_side)
        self._seen = set()

    def _on_layer(self, attended: Attended) -> None:
        call = self.call
        assert call is not None
        self._seen.add(attended.layer.index)
        if grid_factor(self.size, attended.queries.shape[2]) == self.exclude_factor:
            return
        rows, count = kept_rows(len(attended.queries), call.guided, self.cfg_rows), attended.layer.heads
        if self.cfg_rows == "legacy_half_of_heads":
            half = reference_half(attended.probabilities(slice(None), slice(None)))[None]
            self._collect(attended, half, slice(0, half.shape[1]), half.shape[1])
            return
        both = call.guided and self.cfg_rows == "all"
        for chunk in attended.head_chunks(range(count), call.rows * (2 if both else 1)):
            found = attended.probabilities(rows, chunk)
            if both:
                for number, half in enumerate(found.chunk(2)):
                    at = slice(chunk.start + number * count, chunk.stop + number * count)
                    self._collect(attended, half, at, 2 * count)
            else:
                self._collect(attended, found, chunk, count)

    def _collect(self, attended: Attended, found: Float[Tensor, "I a N T"], heads: slice, count: int) -> None:
        assert self.call is not None
        maps = rearrange(found[..., : self.call.tokens], "I a (h w) K -> I a K h w", h=attended.grid[0])
        if self.keep == "pairs":
            self.sums.add(attended.layer.index, maps, heads, count)
        self.map.add(maps, self.size, self.upsampling)

    def _after_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if missed := [layer.path for layer in self.layers if layer.index not in self._seen]:
            self._taps.check()
            processor = type(getattr(self._taps.module(missed[0]), "processor", None)).__name__
            raise TapError(
                f"tracing {type(self.pipe).__name__}: {missed[0]} did not project queries and keys in this step. A cache between "
                f"steps or another attention processor (it has {processor}) runs past it; switch it off while tracing."
            )
        self.steps_done += 1
        self.map.end_step()
        self.calls.show(f"tracing {len(self._seen)} layers, {self.bytes / 2**20:.1f} MB")

    # ------------------------------------------------------------ what was collected

    @property
    def bytes(self) -> int:
        """Memory that maps take now."""
        return self.sums.bytes + self.map.bytes

    @property
    def images(self) -> int:
        """How many images the last call made."""
        return 0 if self.call is None else self.call.rows

    def prompt_maps(
        self,
        image: int = 0,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        factors: Sequence[int] | None = None,
        step: int | None = None,
        space_reduce: SpaceReduce = "pairs",
        time_reduce: Literal["sum", "mean"] = "sum",
    ) -> PromptMaps:
        """Maps of all tokens for one image of the last call, of all steps or of one, of all layers and heads or of some.

        factors: keep layers whose grid is that many times narrower than the map (the reference leaves out factors that are no
        power of two: pass RELEASED_FACTORS to do so). space_reduce: every (layer, head) has one weight ("pairs", the reference),
        or every grid size ("grids"). time_reduce: the reference's sum over steps, or their mean. Raises ViewError for what this
        trace does not hold.
        """
        for value, key, choices in (
            (space_reduce, "space_reduce", ("pairs", "grids")),
            (time_reduce, "time_reduce", ("sum", "mean")),
        ):
            one_of(f"prompt_maps({key}=...)", value, choices, ViewError)
        if self.call is None or not self.steps_done:
            raise ViewError("this trace holds no maps yet: run the pipeline inside `with trace(pipe) as tr:`.")
        if not 0 <= image < self.call.rows:
            raise ViewError(f"image {image}: the last call made {self.call.rows}; count from 0.")
        row = 0 if self.cfg_rows == "legacy_half_of_heads" else image
        if step is not None or self.keep == "map":
            if space_reduce != "pairs" or any(one is not None for one in (layers, heads, factors)):
                raise ViewError(
                    "layers, heads, factors and grids can be chosen afterwards only over all steps and with keep=pairs."
                )
            maps = self._one_map(step)[row]
        else:
            maps = self.sums.mean(self.size, row, layers, heads, factors, self.upsampling, space_reduce)
        if time_reduce == "mean" and step is None:
            maps = maps / self.steps_done
        prompt = None
        if self.call.prompts is not None and self.call.encoded is not None:
            number = image // (self.call.rows // len(self.call.prompts))
            prompt, encoded = self.call.prompts[number], self.call.encoded[number]
            if self.calls.encoded(prompt) != encoded:
                raise TapError(
                    f'reading maps of "{prompt}": the tokenizer makes other tokens of it now than when it was encoded. A textual '
                    f"inversion was loaded or unloaded since: read the maps before that."
                )
            maps = maps[: prompt_length(self.calls.tokenizer, encoded.text) + 2]
        return PromptMaps(maps, prompt, self.calls.tokenizer, self.token_match, self._converted)

    def _converted(self, text: str) -> str:
        return self.calls.converted(text, self.calls.tokenizer)

    def _one_map(self, step: int | None) -> Float[Tensor, "I K X Y"]:
        if step is None:
            assert self.map.total is not None
            return self.map.total
        if not 0 <= step < len(self.map.steps):
            raise ViewError(f"step {step}: this trace holds {len(self.map.steps)} single steps; say trace(pipe, steps=True).")
        return self.map.steps[step]

    def word_map(self, word: str, image: int = 0, occurrence: int | None = None, **chosen: Any) -> WordMap:
        """The map of a word or phrase of the prompt; `chosen` as in `prompt_maps`."""
        return self.prompt_maps(image, **chosen).word_map(word, occurrence)

    def token_map(self, positions: Sequence[int], image: int = 0, **chosen: Any) -> WordMap:
        """The mean map of token positions, for prompts given as embeddings."""
        return self.prompt_maps(image, **chosen).token_map(positions)


def _unet_config(pipe: Any) -> Mapping[str, Any]:
    """The U-Net's configuration. Raises TapError for a pipeline that can't be traced."""
    unet: Any = getattr(pipe, "unet", None)
    config: Any = getattr(unet, "config", {})
    if not isinstance(unet, nn.Module) or "down_block_types" not in config:
        raise TapError(
            f"tracing {type(pipe).__name__}: it has no UNet2DConditionModel. Pipelines of Flux or SD3 denoise with a "
            f"transformer of joint attention: see the extractor concept_attention."
        )
    if not callable(getattr(pipe, "encode_prompt", None)):
        raise TapError(
            f"tracing {type(pipe).__name__}: it has no encode_prompt, so which rows of a batch hold the prompt is not known."
        )
    found: Mapping[str, Any] = config
    return found


def _chosen_layers(
    pipe: Any, config: Mapping[str, Any], layers: Sequence[int] | None, include_mid: bool
) -> tuple[CrossAttention, ...]:
    """The layers to be traced. Raises ViewError for one that is not there, TapError if there is none at all."""
    offered = cross_attentions(config)
    if absent := sorted(set(layers or ()) - {one.index for one in offered}):
        raise ViewError(f"trace(layers=...): there is no layer {absent[0]}; this U-Net has 0 to {len(offered) - 1}.")
    if layers is None:
        chosen = [one for one in offered if include_mid or not one.path.startswith("mid")]
    else:
        chosen = [one for one in offered if one.index in set(layers)]
    if not chosen:
        raise TapError(f"tracing {type(pipe).__name__}: none of its layers has cross-attention.")
    return tuple(chosen)


trace = Trace
"""`with trace(pipe) as tr:`"""
