"""Names that table sheets used before, so that sheets and commands written for them still work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conceptseg.metrics.definitions import current_name


def with_current_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """A plain sheet with today's names of metrics, and with `claim` for `published`.

    >>> with_current_names({"published": "later-voc_multi", "released": {"columns": ["published_miou_void_in_union"]}})
    {'claim': 'later-voc_multi', 'released': {'columns': ['released_miou_void_in_union']}}
    """
    found = {"claim" if key == "published" else key: value for key, value in table.items()}
    for part in (found, *(found.get(key) for key in ("released", "standard"))):
        if isinstance(part, dict) and isinstance(part.get("columns"), list):
            part["columns"] = [current_name(name) if isinstance(name, str) else name for name in part["columns"]]
    against = found.get("against")
    for entry in against if isinstance(against, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("metric"), str):
            entry["metric"] = current_name(entry["metric"])
    return found
