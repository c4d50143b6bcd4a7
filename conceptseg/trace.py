"""Heat maps of a prompt's words while a stock Stable Diffusion pipeline generates (DAAM, Tang et al. 2023, arXiv:2210.04885).

    with trace(pipe) as tr:
        image = pipe("a dog chases a ball").images[0]
    tr.word_map("dog").overlay(image).save("dog.png")

Any pipeline that denoises with a UNet2DConditionModel can be traced: text-to-image, image-to-image, in-painting, with given
embeddings, several prompts, several images, any aspect ratio. Its attention stays as it is; everything is put back on leaving.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from conceptseg.backbones.cross_attention import (
    CFG_ROWS,
    UPSAMPLINGS,
    Attended,
    CrossAttentionTap,
    cross_attentions,
    grid_factor,
    kept_rows,
    map_size,
    reference_half,
    upsample,
)
from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unet import REFERENCE_SIDES
from conceptseg.backbones.word_tokens import POSITION_RULES, prompt_length, reference_positions, word_spans
from conceptseg.errors import ConfigError, TapError, ViewError, did_you_mean

MaskRule = Literal["paper", "released", "mean"]


# ---------------------------------------------------------------- what comes out


@dataclass(frozen=True)
class WordMap:
    """The heat map of one word. values: float [X Y], larger where the word is; the scale grows with the number of steps."""

    word: str
    values: Float[Tensor, "X Y"]

    def expanded(self, size: tuple[int, int], absolute: bool = False, threshold: float | None = None) -> Float[Tensor, "H W"]:
        """The map at another size (rows, columns), bicubic and not cut at 0; scaled to 0..1 unless `absolute`; 0 or 1 with a cut.

        Source: castorini/daam 0.2.0, by spec §1.7, which hands (width, height) to (rows, columns); a cut of 0 is no cut there.
        """
        flat = self.values[None, None].float()
        wide = torch.nn.functional.interpolate(flat, size=size, mode="bicubic")[0, 0]
        if not absolute:
            wide = (wide - wide.min()) / (wide.max() - wide.min() + 1e-8)
        return (wide > threshold).float() if threshold else wide

    def mask(self, size: tuple[int, int], threshold: float = 0.4, rule: MaskRule = "paper") -> Float[Tensor, "H W"]:
        """Where the word is, 0 or 1. "paper": at least threshold · greatest value; "released": above it after min-max scaling;
        "mean": above the map's own mean.
        """
        wide = self.expanded(size, absolute=True)
        if rule == "released":
            return self.expanded(size, threshold=threshold)
        return (wide > wide.mean() if rule == "mean" else wide >= threshold * wide.max()).float()

    def overlay(self, image: Image.Image | np.ndarray) -> Image.Image:
        """The map in colours, the picture over it, the more opaque the less the word is there."""
        from matplotlib import colormaps

        photo = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image, dtype=np.float32)
        heat = self.expanded((photo.shape[0], photo.shape[1])).cpu().numpy()[..., None]
        colours = 255 * colormaps["jet"](heat[..., 0])[..., :3].astype(np.float32)
        return Image.fromarray(np.clip((1 - heat) * photo + heat * colours, 0, 255).astype(np.uint8))

    def intersection_share(self, other: WordMap) -> float:
        """Soft share of this map's mass that lies in the other: sum(a · b) / sum(a). The reference's compute_ioa."""
        return float((self.values * other.values).sum() / (self.values.sum() + 1e-8))


@dataclass(frozen=True)
class PromptMaps:
    """Heat maps of a prompt's tokens for one image. maps: float [K X Y], start token first, then tokens, then the end token."""

    maps: Float[Tensor, "K X Y"]
    prompt: str | None
    tokenizer: Any
    token_match: str = "exact"

    def token_map(self, positions: Sequence[int], name: str = "") -> WordMap:
        """Mean of the maps of some token positions (0 is the start token). Raises ViewError for a position without a map."""
        if beyond := [p for p in positions if not 0 <= p < len(self.maps)]:
            raise ViewError(f"token position {beyond[0]} has no map: there are {len(self.maps)}, start and end token included.")
        if not positions:
            raise ViewError("token_map: no position given.")
        return WordMap(name, self.maps[list(positions)].mean(0))

    def word_map(self, word: str, occurrence: int | None = None) -> WordMap:
        """Mean over a word's tokens and occurrences, or one occurrence, from 0. Raises DataError if it is not there."""
        if self.prompt is None:
            raise ViewError(
                f'word_map("{word}"): the pipeline was given embeddings, so words are not known. Say trace(pipe, prompt="...") '
                f"with the text that was embedded, or ask by position: token_map([...])."
            )
        if self.token_match == "reference":
            return self.token_map(reference_positions(self.tokenizer, self.prompt, word), word)
        spans = word_spans(self.tokenizer, self.prompt, word)
        if occurrence is not None and not 0 <= occurrence < len(spans):
            raise ViewError(f'word_map("{word}", occurrence={occurrence}): it occurs {len(spans)} times; count from 0.')
        chosen = spans if occurrence is None else spans[occurrence : occurrence + 1]
        return self.token_map(sorted({p for span in chosen for p in span}), word)

    def cut_to(self, prompt: str) -> PromptMaps:
        """Only as many rows as a (shorter) prompt has tokens, and two: what the reference does when told another prompt."""
        return replace(self, maps=self.maps[: prompt_length(self.tokenizer, prompt) + 2], prompt=prompt)

    def normalized(self) -> PromptMaps:
        """Every map over the sum of those of the words' tokens (start and end token not counted), plus 1e-6."""
        return replace(self, maps=self.maps / (self.maps[1:-1].sum(0, keepdim=True) + 1e-6))


# ---------------------------------------------------------------- what is held meanwhile


class RunningSums:
    """Raw maps of every (layer, head), summed over the U-Net's calls: float32 [I A K h w] a layer, I images, K tokens."""

    def __init__(self) -> None:
        self.layers: dict[int, Float[Tensor, "I A K h w"]] = {}

    def add(self, layer: int, maps: Float[Tensor, "I A K h w"], heads: slice, count: int) -> None:
        """Add the maps of some of a layer's `count` heads."""
        if layer not in self.layers:
            images, _, tokens, height, width = maps.shape
            self.layers[layer] = maps.new_zeros((images, count, tokens, height, width), dtype=torch.float32)
        self.layers[layer][:, heads] += maps

    @property
    def bytes(self) -> int:
        """Memory held."""
        return sum(maps.numel() * maps.element_size() for maps in self.layers.values())

    def mean(
        self,
        size: tuple[int, int],
        image: int,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        factors: Sequence[int] | None = None,
        upsampling: str = "bicubic_clamped",
    ) -> Float[Tensor, "K X Y"]:
        """Every pair's map at one size, averaged over the pairs that are chosen, one pair at a time.

        Raises ViewError if none is. Source: castorini/daam 0.2.0, by spec §1.5.
        """
        total, pairs = None, 0
        for layer, maps in self.layers.items():
            factor = grid_factor(size, maps.shape[-2] * maps.shape[-1])
            if (layers is not None and layer not in layers) or (factors is not None and factor not in factors):
                continue
            for head in range(maps.shape[1]) if heads is None else [h for h in heads if h < maps.shape[1]]:
                one = upsample(maps[image, head], size, upsampling)
                total, pairs = one if total is None else total.add_(one), pairs + 1
        if total is None:
            raise ViewError(
                f"no heat maps for layers {layers}, heads {heads}, factors {factors}: this trace holds layers "
                f"{sorted(self.layers) or 'none (has the pipeline run?)'}."
            )
        return total / pairs


@dataclass
class Call:
    """What is known of the pipeline call under way."""

    prompts: tuple[str, ...] | None
    rows: int
    """Images that come out: prompts times images per prompt."""
    guided: bool


# ---------------------------------------------------------------- the trace


class Trace:
    """Collects heat maps of whatever its pipeline generates; a new call of the pipeline starts afresh.

    keep: "pairs" holds raw sums of every (layer, head), exact as in the reference and open to any selection afterwards; "map"
        holds one map of the chosen layers and cuts at 0 in every step instead of once (not the reference's order).
    steps: also hold one map a step. layers: indices as in `cross_attentions`, those of up and down blocks unless given;
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
            (token_match, "token_match", tuple(POSITION_RULES)),
        ):  # fmt: skip
            if value not in choices:
                raise ConfigError(f'trace({key}="{value}"): unknown. {did_you_mean(value, choices)}')
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
        offered = cross_attentions(config)
        if layers is None:
            chosen = [one for one in offered if include_mid or not one.path.startswith("mid")]
        else:
            chosen = [one for one in offered if one.index in set(layers)]
        if absent := sorted(set(layers or ()) - {one.index for one in offered}):
            raise ViewError(f"trace(layers=...): there is no layer {absent[0]}; this U-Net has 0 to {len(offered) - 1}.")
        if not chosen:
            raise TapError(f"tracing {type(pipe).__name__}: none of its layers has cross-attention.")
        self.pipe, self.keep, self.holds_steps = pipe, keep, steps
        self.layers, self.cfg_rows, self.exclude_factor = tuple(chosen), cfg_rows, exclude_factor
        self.upsampling, self.token_match = upsampling, token_match
        native = int(config["sample_size"])
        self.map_side = map_side or REFERENCE_SIDES.get(native * int(pipe.vae_scale_factor), native)
        self.given = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
        self._taps, self._handles, self._undo = TapSet(unet), list[Any](), list[Callable[[], None]]()
        self._embedded: list[tuple[Tensor, tuple[str, ...]]] = []
        self._bar: Any = None
        self._start(None)

    # ------------------------------------------------------------ coming and going

    def __enter__(self) -> Trace:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def attach(self) -> None:
        """Hook the pipeline. Raises TapError if it is traced already or can't be."""
        if getattr(self.pipe.__dict__.get("encode_prompt"), "traced_by", None) is not None:
            raise TapError(f"tracing {type(self.pipe).__name__}: it is being traced already; leave that trace first.")
        try:
            CrossAttentionTap(self.layers, self._on_layer).attach(self._taps)
            unet = self.pipe.unet
            self._handles.append(unet.register_forward_pre_hook(self._before_unet, with_kwargs=True))
            self._handles.append(unet.register_forward_hook(self._after_unet, with_kwargs=True))
            self._wrap("encode_prompt", self._encode_prompt)
            self._wrap("progress_bar", self._progress_bar)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Put everything back; what was collected stays. Safe to call twice."""
        self._taps.remove()
        while self._handles:
            self._handles.pop().remove()
        while self._undo:
            self._undo.pop()()
        self._embedded, self._bar = [], None

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Shadow a method of the pipeline on the instance, and note how to undo it without leaving anything behind."""
        held, original = self.pipe.__dict__, getattr(self.pipe, name, None)
        if original is None:
            return
        before = held.get(name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        wrapped.traced_by = self  # type: ignore[attr-defined]
        held[name] = wrapped

        def undo() -> None:
            if before is None:
                del held[name]
            else:
                held[name] = before

        self._undo.append(undo)

    # ------------------------------------------------------------ what the pipeline does

    def _start(self, call: Call | None) -> None:
        self.call = call
        self.sums = RunningSums()
        self.steps_done = 0
        self.step_maps: list[Float[Tensor, "I K X Y"]] = []
        self.size: tuple[int, int] = (0, 0)
        self._step_map: Tensor | None = None
        self._map: Tensor | None = None
        self._pairs = 0
        self._seen: set[int] = set()

    def _encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        signature = inspect.signature(original)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        said = bound.arguments
        prompt, embeds = said.get("prompt"), said.get("prompt_embeds")
        prompts = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
        if prompts is None:
            prompts = next((known for tensor, known in self._embedded if tensor is embeds), self.given)
        count = len(embeds) if embeds is not None else len(prompts or ())
        images = count * int(said.get("num_images_per_prompt") or 1)
        self._start(Call(prompts, images, bool(said.get("do_classifier_free_guidance", True))))
        result = original(*args, **kwargs)
        if prompts is not None:
            first = result[0] if isinstance(result, tuple) else result
            self._embedded = [*self._embedded[-7:], (first, prompts)]
        return result

    def _progress_bar(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bar = original(*args, **kwargs)
        return self._bar

    def _before_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        if self.call is None:
            raise TapError(
                "tracing the U-Net: it runs, but the pipeline encoded no prompt before, so its rows can't be told apart. Call "
                "the pipeline, not the U-Net."
            )
        expected = self.call.rows * (2 if self.call.guided else 1)
        if len(sample) != expected:
            raise TapError(
                f"tracing {type(self.pipe).__name__}: its U-Net runs with {len(sample)} rows, wanted {expected} "
                f"({self.call.rows} images, {'with' if self.call.guided else 'without'} guidance). Pipelines with a third pass "
                f"(perturbed attention, image guidance) or with separate passes for guidance can't be traced."
            )
        if self.call.prompts is not None and self.call.rows % len(self.call.prompts):
            raise ViewError(f"trace(prompt=...): {len(self.call.prompts)} prompts were named for {self.call.rows} images.")
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
        tokens = self._tokens(found.shape[-1])
        maps = rearrange(found[..., :tokens], "I a (h w) K -> I a K h w", h=attended.grid[0])
        if self.keep == "pairs":
            self.sums.add(attended.layer.index, maps, heads, count)
        if self.keep == "map" or self.holds_steps:
            one = upsample(maps, self.size, self.upsampling).sum(1)
            self._step_map = one if self._step_map is None else self._step_map.add_(one)
            self._pairs += maps.shape[1]

    def _tokens(self, encoded: int) -> int:
        """How many token positions are worth holding: start token, the longest prompt's, and one end token."""
        if self.call is None or self.call.prompts is None:
            return encoded
        return min(encoded, max(prompt_length(self.tokenizer, prompt) for prompt in self.call.prompts) + 2)

    def _after_unet(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if missed := [layer.path for layer in self.layers if layer.index not in self._seen]:
            raise TapError(
                f"tracing {type(self.pipe).__name__}: {missed[0]} did not project queries and keys in this step. A cache between "
                f"steps or another attention processor runs past it; switch it off while tracing."
            )
        self.steps_done += 1
        if self._step_map is not None:
            mean = self._step_map / self._pairs
            if self.holds_steps:
                self.step_maps.append(mean)
            if self.keep == "map":
                self._map = mean if self._map is None else self._map + mean
            self._step_map, self._pairs = None, 0
        if self._bar is not None and hasattr(self._bar, "set_postfix_str"):
            self._bar.set_postfix_str(f"tracing {len(self._seen)} layers, {self.bytes / 2**20:.1f} MB", refresh=False)

    # ------------------------------------------------------------ what was collected

    @property
    def tokenizer(self) -> Any:
        """The pipeline's (first) tokenizer; SDXL's two split words alike."""
        return getattr(self.pipe, "tokenizer", None) or self.pipe.tokenizer_2

    @property
    def bytes(self) -> int:
        """Memory that maps take now."""
        held = [*self.step_maps, *([self._map] if self._map is not None else [])]
        return self.sums.bytes + sum(maps.numel() * maps.element_size() for maps in held)

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
    ) -> PromptMaps:
        """Maps of all tokens for one image of the last call, of all steps or of one, of all layers and heads or of some.

        factors: keep layers whose grid is that many times narrower than the map (the reference leaves out factors that are no
        power of two: pass RELEASED_FACTORS to do so). Raises ViewError for what this trace does not hold.
        """
        if self.call is None or not self.steps_done:
            raise ViewError("this trace holds no maps yet: run the pipeline inside `with trace(pipe) as tr:`.")
        if not 0 <= image < self.call.rows:
            raise ViewError(f"image {image}: the last call made {self.call.rows}; count from 0.")
        row = 0 if self.cfg_rows == "legacy_half_of_heads" else image
        chosen = any(one is not None for one in (layers, heads, factors))
        if step is not None or self.keep == "map":
            if chosen:
                raise ViewError("layers, heads and factors can be chosen afterwards only over all steps and with keep=pairs.")
            if step is not None and not (self.holds_steps and 0 <= step < len(self.step_maps)):
                raise ViewError(f"step {step}: this trace holds {len(self.step_maps)} single steps; say trace(pipe, steps=True).")
            held = self._map if step is None else self.step_maps[step]
            assert held is not None
            maps = held[row]
        else:
            maps = self.sums.mean(self.size, row, layers, heads, factors, self.upsampling)
        prompt = None
        if self.call.prompts is not None:
            prompt = self.call.prompts[image // (self.call.rows // len(self.call.prompts))]
            maps = maps[: prompt_length(self.tokenizer, prompt) + 2]
        return PromptMaps(maps, prompt, self.tokenizer, self.token_match)

    def word_map(self, word: str, image: int = 0, occurrence: int | None = None, **chosen: Any) -> WordMap:
        """The map of a word or phrase of the prompt; `chosen` as in `prompt_maps`."""
        return self.prompt_maps(image, **chosen).word_map(word, occurrence)

    def token_map(self, positions: Sequence[int], image: int = 0, **chosen: Any) -> WordMap:
        """The mean map of token positions, for prompts given as embeddings."""
        return self.prompt_maps(image, **chosen).token_map(positions)

    def save(self, path: Path, words: Mapping[str, WordMap]) -> None:
        """Write word maps as a safetensors file, float32 [X Y] each."""
        from safetensors.torch import save_file

        save_file({word: one.values.contiguous().cpu() for word, one in words.items()}, path)


trace = Trace
"""`with trace(pipe) as tr:`"""
