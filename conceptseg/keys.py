"""Identity: canonical JSON, run ids and the digest of the source that makes the numbers. The only place that hashes them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from conceptseg import __version__

# Packages whose versions stand beside a number.
LIBRARIES = (
    "torch", "diffusers", "transformers", "torchmetrics", "numpy", "pillow", "datasets", "h5py", "timm", "open_clip_torch",
)  # fmt: skip

# Folders and files whose code decides what a row says. Reports, launchers and the command line are left out on purpose.
NUMBER_MAKERS: tuple[str, ...] = (
    "backbones", "data", "evaluation/loop.py", "extractors", "metrics/average_precision.py", "metrics/counts.py",
    "metrics/released.py", "protocols.py", "saliency", "segment", "types.py",
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
    """Names what the model did: method, weights, data, what it was shown and told, seed. Read-outs are not part of it."""
    return digest(dict(identity))


def source_digests() -> dict[str, str]:
    """Path inside the package -> digest, for every file that makes numbers."""
    root = Path(str(resources.files("conceptseg")))
    files: list[Path] = []
    for name in NUMBER_MAKERS:
        files += sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]
    return {f.relative_to(root).as_posix(): _file_digest(f, f.stat().st_mtime_ns, f.stat().st_size) for f in files}


@lru_cache(1024)
def _file_digest(path: Path, changed: int, size: int) -> str:
    """Read again only where the file says that it was written since: a table asks for each of its runs."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


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
