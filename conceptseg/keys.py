"""Identity: canonical JSON, digests of it, run ids, and the versions that stand beside a number."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

from conceptseg import __version__

# Packages whose versions stand beside a number.
LIBRARIES = (
    "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pillow", "datasets", "h5py", "timm", "open_clip_torch",
)  # fmt: skip


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; raises TypeError for anything that is not plain data."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 12) -> str:
    """A short hexadecimal digest of plain data.

    >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    True
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def run_id(identity: Mapping[str, Any]) -> str:
    """Name a run by everything that affects the model's output: method, weights, data, input, seed; not by read-outs."""
    return digest(dict(identity))


@cache  # of this process: nothing changes what was loaded
def versions() -> dict[str, str]:
    """Versions of what makes numbers; read without loading it."""
    found = {"conceptseg": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
