"""Find which rows of the denoiser's batch hold which prompt, by shadowing two methods of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from conceptseg.backbones.word_tokens import token_ids
from conceptseg.errors import TapError, ViewError

REMEMBERED = 8  # texts whose embeddings are recognised when they are handed to the pipeline


@dataclass(frozen=True)
class EncodedText:
    """The text that was encoded for a prompt: a textual inversion of several vectors stands in it as several tokens."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, special ones included, before any are cut off."""
    start: int = field(default=0, compare=False)
    """Where they begin among the tokens that the text encoder was given: after padding, if the tokenizer pads on the left."""


@dataclass(frozen=True)
class Call:
    """Prompts and settings of one call of the pipeline, as far as they are known."""

    prompts: tuple[str, ...] | None
    rows: int
    """Images that come out: prompts times images per prompt."""
    guided: bool
    tokens: int | None
    """Token positions worth holding: those of the longest prompt with its special tokens; all if the prompts are not known."""
    encoded: tuple[EncodedText, ...] | None = None
    """Text that was encoded for each prompt."""

    def check(self, rows: int, pipeline: str) -> None:
        """Raises TapError if the U-Net runs with other rows than this call's images, once or (under guidance) twice."""
        expected = self.rows * (2 if self.guided else 1)
        if rows != expected:
            raise TapError(
                f"tracing {pipeline}: its U-Net runs with {rows} rows, wanted {expected} ({self.rows} images, "
                f"{'with' if self.guided else 'without'} guidance). Pipelines with a third pass (perturbed attention, image "
                f"guidance) or with separate passes for guidance can't be traced."
            )
        if self.prompts is not None and self.rows % len(self.prompts):
            raise ViewError(f"trace(prompt=...): {len(self.prompts)} prompts were named for {self.rows} images.")


class PipelineCalls:
    """Tells `on_call` of every call of a pipeline. given: the prompts behind embeddings."""

    def __init__(self, pipe: Any, given: tuple[str, ...] | None, on_call: Callable[[Call], None]) -> None:
        self.pipe, self.given, self.on_call = pipe, given, on_call
        self._undo: list[Callable[[], None]] = []
        self._embedded: list[tuple[Tensor, tuple[str, ...], tuple[EncodedText, ...]]] = []
        self._returned: list[tuple[Call, Tensor]] = []
        self._bar: Any = None

    @property
    def tokenizer(self) -> Any:
        """The pipeline's (first) tokenizer; SDXL's two split words alike."""
        return getattr(self.pipe, "tokenizer", None) or self.pipe.tokenizer_2

    def attach(self) -> None:
        """Shadow the pipeline's methods. Raises TapError if that was done already."""
        if getattr(self.pipe.__dict__.get("encode_prompt"), "traced_by", None) is not None:
            raise TapError(f"tracing {type(self.pipe).__name__}: it is being traced already; leave that trace first.")
        self._shadow("encode_prompt", self._encode_prompt)
        self._shadow("progress_bar", self._progress_bar)

    def remove(self) -> None:
        """Put everything back; safe to call twice."""
        while self._undo:
            self._undo.pop()()
        self._embedded, self._returned, self._bar = [], [], None

    def show(self, text: str) -> None:
        """Write into the pipeline's own progress bar, if it shows one."""
        if hasattr(self._bar, "set_postfix_str"):
            self._bar.set_postfix_str(text, refresh=False)

    def _shadow(self, name: str, around: Callable[..., Any]) -> None:
        """Put a function before a method of the pipeline, on the instance, and note how to undo it without leaving a trace."""
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

    def _encode_prompt(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        said = bound.arguments
        prompt, embeds = said.get("prompt"), said.get("prompt_embeds")
        prompts = (prompt,) if isinstance(prompt, str) else None if prompt is None else tuple(prompt)
        encoded = None
        if prompts is None:
            held = next((one for one in self._embedded if one[0] is embeds), None)
            prompts, encoded = (self.given, None) if held is None else held[1:]
        if prompts is not None and encoded is None:
            encoded = tuple(map(self.encoded, prompts))
            if embeds is not None:
                encoded = tuple(replace(one, start=self._start(one, embeds.shape[1])) for one in encoded)
        images = (len(embeds) if embeds is not None else len(prompts or ())) * _per_prompt(said)
        with self._reading_ids() as read:
            result = original(*args, **kwargs)
        if prompt is not None and encoded is not None:
            encoded = self._found(encoded, read)
        tokens = None if encoded is None else max(one.start + len(one.ids) for one in encoded)
        call = Call(prompts, images, bool(said.get("do_classifier_free_guidance", True)), tokens, encoded)
        first = result[0] if isinstance(result, tuple) else result
        if prompts is not None and encoded is not None:
            self._embedded = [*self._embedded[1 - REMEMBERED :], (first, prompts, encoded)]
        # HunyuanDiT encodes its prompts twice, by two encoders.
        self._returned = [*(held for held in self._returned[1 - REMEMBERED :] if held[0] == call), (call, first)]
        self.on_call(call)
        return result

    def conditional_rows(self, text: Float[Tensor, "R T d"]) -> slice | None:
        """Find the rows of a batch of encoded text that hold this call's prompts, not the negative ones; None if there are none.

        Pipelines differ: most stack the negative prompts first, Lumina's stacks them last, Wan's runs them by themselves.
        """
        for _, found in reversed(self._returned):
            count = len(found)
            for start in range(0, len(text) - count + 1, count):
                if found.shape[1:] == text.shape[1:] and torch.equal(text[start : start + count], found.to(text)):
                    return slice(start, start + count)
        return None

    def encoded(self, prompt: str) -> EncodedText:
        """Return the text that the pipeline encodes for a prompt.

        Raises TapError if its two tokenizers would make two texts of it, whose tokens have no common positions.
        """
        text = self.converted(prompt, self.tokenizer)
        other = getattr(self.pipe, "tokenizer_2", None)
        if other is not None and self.converted(prompt, other) != text:
            raise TapError(
                f'tracing {type(self.pipe).__name__}: its first tokenizer makes "{text}" of "{prompt}", its second another text: '
                f"their tokens are out of step. Load the textual inversion into both tokenizers."
            )
        return EncodedText(text, token_ids(self.tokenizer, text))

    def converted(self, text: str, tokenizer: Any) -> str:
        """The text that the pipeline encodes: every textual inversion of several vectors written out, or (PixArt) lower case."""
        convert, prepare = (getattr(self.pipe, name, None) for name in ("maybe_convert_prompt", "_text_preprocessing"))
        if callable(prepare):
            return str(prepare(text)[0])
        return str(convert(text, tokenizer)) if callable(convert) else text

    @contextmanager
    def _reading_ids(self) -> Iterator[list[Tensor]]:
        """Gathers the token ids that the text encoder of `tokenizer` is given."""
        name = "text_encoder" if getattr(self.pipe, "tokenizer", None) is not None else "text_encoder_2"
        encoder, read = getattr(self.pipe, name, None), list[Tensor]()

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs.get("input_ids")
            if isinstance(ids, Tensor):
                read.append(ids)

        hook = encoder.register_forward_pre_hook(note, with_kwargs=True) if isinstance(encoder, nn.Module) else None
        try:
            yield read
        finally:
            if hook is not None:
                hook.remove()

    def _found(self, encoded: tuple[EncodedText, ...], read: Sequence[Tensor]) -> tuple[EncodedText, ...]:
        """Prompts and where each begins among the tokens that the text encoder was given.

        Raises TapError if those are other tokens than the prompts': words would be read at wrong places.
        """
        if not read or len(read[0]) != len(encoded):
            return encoded
        found = []
        for one, row in zip(encoded, read[0].tolist(), strict=True):
            start = self._start(one, len(row))
            # Of a text that is cut, the last one may be an end mark that took a word's place.
            kept = len(one.ids) if len(one.ids) <= len(row) else len(row) - 1
            if list(one.ids[:kept]) != row[start : start + kept]:
                raise TapError(
                    f'tracing {type(self.pipe).__name__}: its text encoder was given other tokens than those of "{one.text}", so '
                    f"where the words stand is not known. Call Sana's pipeline with complex_human_instruction=None. Else pass "
                    f"embeddings and say trace(pipe, prompt=...) with the text that was encoded, or ask by position: "
                    f"token_map([...])."
                )
            found.append(replace(one, start=start))
        return tuple(found)

    def _start(self, encoded: EncodedText, length: int) -> int:
        """Where a text begins among `length` tokens that it was padded to."""
        left = getattr(self.tokenizer, "padding_side", "right") == "left"
        return max(0, length - len(encoded.ids)) if left else 0

    def _progress_bar(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bar = original(*args, **kwargs)
        return self._bar


def _per_prompt(said: Mapping[str, Any]) -> int:
    """Images or videos per prompt, by the arguments of encode_prompt."""
    return int(said.get("num_images_per_prompt") or said.get("num_videos_per_prompt") or 1)
