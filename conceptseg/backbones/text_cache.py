"""Embedded texts by string, in memory and, where a folder is named, on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from conceptseg.files import written_aside

TextRecord = dict[str, Tensor]
"""Encoding of one string: named tensors without a batch axis, such as "tokens" [N d] and "length" []."""


class TextCache:
    """Every distinct string is encoded once: by a process, or once and for all where there is a folder.

    folder: None keeps records in memory only. identity: what names the encoders and their settings; called once, when the
    folder is first used, since digesting weights takes time. Files are safetensors, named by a digest of the string.
    """

    def __init__(self, folder: str | None, identity: Callable[[], Mapping[str, Any]]) -> None:
        self._memory: dict[str, TextRecord] = {}
        self._identity, self._root = identity, Path(folder) if folder else None
        self._place: Path | None = None

    def _file(self, string: str) -> Path | None:
        if self._root is None:
            return None
        if self._place is None:
            named = json.dumps(self._identity(), sort_keys=True, default=str)
            self._place = self._root / hashlib.sha256(named.encode()).hexdigest()[:16]
        return self._place / f"{hashlib.sha256(string.encode()).hexdigest()}.safetensors"

    def __contains__(self, string: str) -> bool:
        if string in self._memory:
            return True
        file = self._file(string)
        if file is None or not file.exists():
            return False
        try:
            self._memory[string] = load_file(file)
        except SafetensorError:  # a disk that was full leaves half a file: it is written again
            return False
        return True

    def __getitem__(self, string: str) -> TextRecord:
        return self._memory[string]

    def __setitem__(self, string: str, record: TextRecord) -> None:
        self._memory[string] = record
        file = self._file(string)
        if file is not None:
            with written_aside(file) as part:
                save_file({k: v.contiguous().cpu().clone() for k, v in record.items()}, part, metadata={"text": string})
