"""What a pipeline is asked, learnt by shadowing two of its methods: which rows of the U-Net's batch hold which prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from conceptseg.backbones.unets.word_tokens import prompt_length
from conceptseg.errors import TapError, ViewError

REMEMBERED = 8  # texts whose embeddings are recognised when they are handed to the pipeline


@dataclass(frozen=True)
class Call:
    """What is known of one call of the pipeline."""

    prompts: tuple[str, ...] | None
    rows: int
    """Images that come out: prompts times images per prompt."""
    guided: bool
    tokens: int | None
    """Token positions worth holding: start token, the longest prompt's and one end token; all if the prompts are not known."""

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
        self._embedded: list[tuple[Tensor, tuple[str, ...]]] = []
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
        if prompts is None:
            prompts = next((known for tensor, known in self._embedded if tensor is embeds), self.given)
        images = (len(embeds) if embeds is not None else len(prompts or ())) * int(said.get("num_images_per_prompt") or 1)
        tokens = None if prompts is None else max(prompt_length(self.tokenizer, one) for one in prompts) + 2
        self.on_call(Call(prompts, images, bool(said.get("do_classifier_free_guidance", True)), tokens))
        result = original(*args, **kwargs)
        if prompts is not None:
            first = result[0] if isinstance(result, tuple) else result
            self._embedded = [*self._embedded[1 - REMEMBERED :], (first, prompts)]
        return result

    def _progress_bar(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._bar = original(*args, **kwargs)
        return self._bar
