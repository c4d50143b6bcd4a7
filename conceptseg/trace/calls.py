"""Find which rows of the U-Net's batch hold which prompt, by shadowing two methods of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from conceptseg.backbones.unets.word_tokens import prompt_length
from conceptseg.errors import TapError, ViewError

REMEMBERED = 8  # texts whose embeddings are recognised when they are handed to the pipeline


@dataclass(frozen=True)
class EncodedText:
    """The text that was encoded for a prompt: a textual inversion of several vectors stands in it as several tokens."""

    text: str
    ids: tuple[int, ...]
    """Its tokens, special ones included, before any are cut off."""


@dataclass(frozen=True)
class Call:
    """Prompts and settings of one call of the pipeline, as far as they are known."""

    prompts: tuple[str, ...] | None
    rows: int
    """Images that come out: prompts times images per prompt."""
    guided: bool
    tokens: int | None
    """Token positions worth holding: start token, the longest prompt's and one end token; all if the prompts are not known."""
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
        self._embedded, self._bar = [], None

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
        images = (len(embeds) if embeds is not None else len(prompts or ())) * int(said.get("num_images_per_prompt") or 1)
        tokens = None if encoded is None else max(prompt_length(self.tokenizer, one.text) for one in encoded) + 2
        self.on_call(Call(prompts, images, bool(said.get("do_classifier_free_guidance", True)), tokens, encoded))
        with self._reading_ids() as read:
            result = original(*args, **kwargs)
        if prompt is not None and encoded is not None:
            self._check_ids(encoded, read)
        if prompts is not None and encoded is not None:
            first = result[0] if isinstance(result, tuple) else result
            self._embedded = [*self._embedded[1 - REMEMBERED :], (first, prompts, encoded)]
        return result

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
        return EncodedText(text, tuple(self.tokenizer(text, truncation=False, verbose=False).input_ids))

    def converted(self, text: str, tokenizer: Any) -> str:
        """A text with every textual inversion of several vectors written out, as the pipeline does before it encodes."""
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
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

    def _check_ids(self, encoded: Sequence[EncodedText], read: Sequence[Tensor]) -> None:
        """Raises TapError if the text encoder was given other tokens than the prompts': words would be read at wrong places."""
        if not read or len(read[0]) != len(encoded):
            return
        for one, row in zip(encoded, read[0].tolist(), strict=True):
            kept = min(len(one.ids), len(row)) - 1  # the last one may be an end mark that took a word's place
            if list(one.ids[:kept]) != row[:kept]:
                raise TapError(
                    f'tracing {type(self.pipe).__name__}: its text encoder was given other tokens than those of "{one.text}", so '
                    f"where the words stand is not known. Pass embeddings and say trace(pipe, prompt=...) with the text that was "
                    f"encoded, or ask by position: token_map([...])."
                )

    def _progress_bar(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bar = original(*args, **kwargs)
        return self._bar
