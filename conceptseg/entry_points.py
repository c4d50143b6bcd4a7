"""Entry points by which installed packages add to this one. Read once a process: a scan opens a file of every package."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib import metadata

PACKAGES = "conceptseg.packages"
"""Group of modules that may be named by _target_ and whose conf/ is searched for sheets."""
METRICS = "conceptseg.metrics"
"""Group of metrics; see `metrics.installed`."""
BACKBONES = "conceptseg.backbones"
"""Group of families: the stock transformer's class -> module:class; see `backbones.sheets`."""


def entry_points(group: str) -> metadata.EntryPoints:
    """The entry points of a group, looked for again only if a folder of sys.path has changed."""
    return _found(group, tuple((place, _changed(place)) for place in sys.path))


@lru_cache(maxsize=8)
def _found(group: str, places: tuple[tuple[str, int], ...]) -> metadata.EntryPoints:
    return metadata.entry_points(group=group)


def _changed(place: str) -> int:
    try:
        return os.stat(place or ".").st_mtime_ns
    except OSError:
        return 0
