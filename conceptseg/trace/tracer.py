"""The trace: hooks on a pipeline's denoiser that collect heat maps, call by call."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import (
    UPSAMPLINGS,
    Attended,
    CrossAttention,
    grid_factor,
    map_size,
    reference_half,
)
from conceptseg.errors import TapError, ViewError, one_of
from conceptseg.trace.calls import Call, PipelineCalls
from conceptseg.trace.hosts import Host, Pass, UNetHost, host_of
from conceptseg.trace.maps import PromptMaps, WordMap
from conceptseg.trace.sums import RunningMap, RunningSums, SpaceReduce


class Trace:
    """Collects heat maps of whatever its pipeline generates; a new call of the pipeline starts afresh.

    keep: "pairs" holds raw sums of every (layer, head), exact as in the reference and open to any selection afterwards; "map"
        holds one map of the chosen layers and cuts at 0 in every step instead of once (not the reference's order).
    steps: also hold one map per step. layers: indices as in `cross_attentions`, those of up and down blocks unless given;
        include_mid: the mid block as well. Of a transformer that text enters by cross-attention alone (PixArt, Sana, Wan, LTX,
        Lumina-Next, HunyuanDiT) layers are its blocks, and maps have the grid of the image's tokens unless map_side is given.
    prompt: the text behind given embeddings. The rest as in `extractors.daam.DAAM`; exclude_factor is for U-Nets.
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
        self.host = host = host_of(pipe)
        for value, key, choices in (
            (keep, "keep", ("pairs", "map")), (cfg_rows, "cfg_rows", host.cfg_rows), (upsampling, "upsampling", UPSAMPLINGS),
            (token_match, "token_match", host.token_match),
        ):  # fmt: skip
            one_of(f"trace({key}=...)", value, choices)
        self.pipe, self.keep, self.holds_steps = pipe, keep, steps
        self.layers, self.cfg_rows = _chosen_layers(host, layers, include_mid), cfg_rows
        self.exclude_factor = exclude_factor if isinstance(host, UNetHost) else None
        self.upsampling, self.token_match = upsampling, token_match
        self.map_side = map_side or host.map_side
        given = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
        self.calls = PipelineCalls(pipe, given, self._begin)
        self._taps, self._handles = TapSet(host.module), list[Any]()
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
            self.host.attach(self._taps, self.layers, self._on_layer)
            module = self.host.module
            self._handles.append(module.register_forward_pre_hook(self._before_pass, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after_pass, with_kwargs=True))
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
        """A call of the pipeline begins. Raises TapError if its denoiser is no longer the one that was hooked."""
        if (now := getattr(self.pipe, self.host.part)) is not self._taps.model:
            raise TapError(
                f"tracing {type(self.pipe).__name__}: since the trace began its {self.host.name} was replaced by another "
                f"module, a {type(now).__name__} (torch.compile does so). Replace it before the trace."
            )
        self._taps.check()
        self._start(call)

    def _start(self, call: Call | None) -> None:
        self.call = call
        self.sums = RunningSums()
        self.map = RunningMap(self.keep == "map", self.holds_steps)
        self.steps_done = 0
        self.size: tuple[int, int] = (0, 0)
        self.text_length: int | None = None
        self._pass = Pass(None, (0, 0))
        self._seen: set[int] = set()

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call is None:
            raise TapError(
                f"tracing the {self.host.name}: it runs, but the pipeline encoded no prompt before, so its rows have no prompts. "
                f"Call the pipeline, not the {self.host.name}."
            )
        self._pass = self.host.begin(self.call, self.calls, self.cfg_rows, args, kwargs)
        self._taps.check()
        grid = self._pass.grid
        self.size = grid if self.map_side is None else map_size(grid, self.map_side)
        self._seen = set()

    def _on_layer(self, attended: Attended) -> None:
        call, rows, count = self.call, self._pass.rows, attended.layer.heads
        assert call is not None
        self._seen.add(attended.layer.index)
        self.text_length = attended.keys.shape[2]
        if rows is None or grid_factor(self.size, attended.queries.shape[2]) == self.exclude_factor:
            return
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
        sides = {"f": attended.frames, "h": attended.grid[0]}
        maps = rearrange(found[..., : self.call.tokens], "I a (f h w) K -> (I f) a K h w", **sides)
        if self.keep == "pairs":
            self.sums.add(attended.layer.index, maps, heads, count)
        self.map.add(maps, self.size, self.upsampling)

    def _after_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if missed := [layer.path for layer in self.layers if layer.index not in self._seen]:
            self._taps.check()
            processor = type(getattr(self._taps.module(missed[0]), "processor", None)).__name__
            raise TapError(
                f"tracing {type(self.pipe).__name__}: {missed[0]} did not project queries and keys in this step. A cache between "
                f"steps or another attention processor (it has {processor}) runs past it; switch it off while tracing."
            )
        if self._pass.rows is None:
            return
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
        frame: int | None = None,
    ) -> PromptMaps:
        """Maps of all tokens for one image of the last call, of all steps or of one, of all layers and heads or of some.

        factors: keep layers whose grid is that many times narrower than the map (the reference leaves out factors that are no
        power of two: pass RELEASED_FACTORS to do so). space_reduce: every (layer, head) has one weight ("pairs", the reference),
        or every grid size ("grids"). time_reduce: the reference's sum over steps, or their mean. frame: one frame of a video's
        latents, from 0; their mean if None. Raises ViewError for what this trace does not hold.
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
        frames = self._pass.frames
        if frame is not None and not 0 <= frame < frames:
            raise ViewError(f"frame {frame}: the latents of the last call have {frames}; count from 0.")
        if (step is not None or self.keep == "map") and (
            space_reduce != "pairs" or any(one is not None for one in (layers, heads, factors))
        ):
            raise ViewError("layers, heads, factors and grids can be chosen afterwards only over all steps and with keep=pairs.")
        first = 0 if self.cfg_rows == "legacy_half_of_heads" else image * frames
        found = []
        for row in range(first, first + frames) if frame is None else [first + frame]:
            if step is not None or self.keep == "map":
                found.append(self._one_map(step)[row])
            else:
                found.append(self.sums.mean(self.size, row, layers, heads, factors, self.upsampling, space_reduce))
        maps = found[0] if len(found) == 1 else torch.stack(found).mean(0)
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
            maps = maps[encoded.start :][: len(encoded.ids)]
        return PromptMaps(maps, prompt, self.calls.tokenizer, self.token_match, self._converted, self.text_length)

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


def _chosen_layers(host: Host, layers: Sequence[int] | None, include_mid: bool) -> tuple[CrossAttention, ...]:
    """The layers to be traced. Raises ViewError for one that is not there, TapError if there is none at all."""
    offered = host.layers()
    if absent := sorted(set(layers or ()) - {one.index for one in offered}):
        raise ViewError(f"trace(layers=...): there is no layer {absent[0]}; this {host.name} has 0 to {len(offered) - 1}.")
    if layers is None:
        chosen = [one for one in offered if include_mid or not one.path.startswith("mid")]
    else:
        chosen = [one for one in offered if one.index in set(layers)]
    if not chosen:
        raise TapError(f"tracing {type(host.pipe).__name__}: none of its layers has cross-attention.")
    return tuple(chosen)


trace = Trace
"""`with trace(pipe) as tr:`"""
