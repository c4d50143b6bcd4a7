"""Composed configurations, kept between commands: composing those of a large table takes longer than all else of printing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conceptseg.files import write_atomically


class Compositions:
    """Overrides -> the plain configuration that they compose to; each is composed once, also over commands.

    path: where they are kept. source: digest of all else that composing reads (`config.composing_source`); what was kept under
    another is forgotten. With None nothing outlives this object.
    """

    def __init__(self, path: Path, source: str | None, compose: Callable[[Sequence[str]], dict[str, Any]]) -> None:
        self.path, self.source, self.compose = path, source, compose
        self._kept: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, dict[str, Any]] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if source is not None and kept["source"] == source:
                self._kept = kept["configs"]
        except (OSError, ValueError, TypeError, KeyError):  # there is none yet, or what is there can't be read: compose anew
            pass

    def __call__(self, *overrides: str) -> dict[str, Any]:
        key = json.dumps(overrides)
        if key not in self._asked:
            # An override may ask for the time or a variable of the environment, which no digest holds.
            kept = None if "${" in key else self._kept.get(key)
            self._asked[key] = kept if kept is not None else self.compose(overrides)
        return self._asked[key]

    def asked(self) -> list[dict[str, Any]]:
        """Every configuration that this command asked for."""
        return list(self._asked.values())

    def keep(self) -> None:
        """Write what was asked for, if any of it is new and can be written without loss."""
        stable = {key: config for key, config in self._asked.items() if "${" not in key}
        if self.source is None or stable.keys() <= self._kept.keys():
            return
        text = json.dumps({"source": self.source, "configs": stable})
        if json.loads(text)["configs"] == stable:
            write_atomically(self.path, text.encode())
