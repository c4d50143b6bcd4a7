"""Taps: hooks on a stock model that are checked when attached, may stop the forward pass early, and always come off."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from conceptseg.errors import TapError, did_you_mean


class StopForward(Exception):
    """Raised inside a tap when nothing that follows is needed; `TapSet.run` swallows it."""


class TapSet:
    """A context manager that holds hooks on one model.

    >>> with TapSet(nn.Sequential(nn.Linear(2, 2))) as taps:
    ...     taps.after("0", lambda module, args, kwargs, output: None)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[RemovableHandle] = []
        self._tapped: dict[str, nn.Module] = {}

    def __enter__(self) -> TapSet:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._tapped.clear()

    def check(self) -> None:
        """Raises TapError if a tapped module was compiled, or replaced: it may still run, inside what replaced it."""
        for path, module in self._tapped.items():
            self.refuse_compiled(path)
            now = self.module(path)
            if now is not module:
                raise TapError(
                    f"tapping {type(self.model).__name__}: {path} was {_kind(module)} when it was hooked and is now "
                    f"another module, {_kind(now)}: adapters (LoRA) were loaded or unloaded, or a block was replaced. "
                    f"Do that before the trace begins."
                )

    def module(self, path: str) -> nn.Module:
        """The sub-module at a dotted path. Raises TapError naming what the host has instead."""
        found: nn.Module = self.model
        for depth, name in enumerate(path.split(".")):
            children = dict(found.named_children())
            if "_orig_mod" in children:
                raise _compiled(".".join(path.split(".")[:depth]) or type(self.model).__name__)
            if name not in children:
                at = ".".join(path.split(".")[:depth]) or "its top level"
                raise TapError(
                    f'tapping {type(self.model).__name__}: wanted "{path}", but at {at} there is no "{name}". '
                    f"{did_you_mean(name, children)} Tested with diffusers 0.36 to 0.42; is this another version or a subclass?"
                )
            found = children[name]
        return found

    def refuse_compiled(self, path: str) -> None:
        """Raises TapError if the module at a path, or one around it, was compiled: that runs past hooks that come later."""
        steps = path.split(".")
        for depth in range(len(steps) + 1):
            module = self.module(".".join(steps[:depth])) if depth else self.model
            if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
                raise _compiled(".".join(steps[:depth]) or type(self.model).__name__)

    def before(self, path: str, tap: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Call `tap(module, args, kwargs)` before the module at `path` runs; its inputs are not changed."""
        self._handles.append(self._hooked(path).register_forward_pre_hook(tap, with_kwargs=True))

    def after(self, path: str, tap: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]) -> None:
        """Call `tap(module, args, kwargs, output)` after the module at `path` ran; its output is not changed."""
        self._handles.append(self._hooked(path).register_forward_hook(tap, with_kwargs=True))

    def _hooked(self, path: str) -> nn.Module:
        self._tapped[path] = module = self.module(path)
        return module

    def run(self, forward: Callable[[], Any]) -> Any:
        """Run the host. Returns its output, or None if a tap stopped it."""
        try:
            return forward()
        except StopForward:
            return None


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _compiled(name: str) -> TapError:
    return TapError(
        f"tapping {name}: it was compiled by torch.compile, which runs past hooks. Trace it before compiling it, or take one "
        f"that is not compiled (of torch.compile(model), the module inside is its _orig_mod)."
    )
