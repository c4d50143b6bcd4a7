"""Read finished runs, and compare them image by image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, StoreError, did_you_mean
from conceptseg.metrics.breakdowns import Part, by_class, by_size, by_word
from conceptseg.metrics.definitions import Definition, Rows
from conceptseg.metrics.intervals import Interval, bootstrap_all
from conceptseg.metrics.thresholds import Sensitivity, curve, sensitivity
from conceptseg.store.folders import readings_of
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Manifest

SEPARATOR = "::"
MOST_LISTED = 12
"""Views that a refusal lists."""


@dataclass(frozen=True, slots=True)
class Finished:
    """One reading of one run: what a column of numbers stands on."""

    name: str
    """run id, and where a run was named with one, its view and segmenter."""
    view: str
    segmenter: str
    manifest: Manifest
    rows: Rows
    others: tuple[str, ...] = ()
    """Further segmenters of the view, where none was named."""

    @property
    def method(self) -> str:
        """The extractor's class."""
        return str(self.manifest["identity"]["method"]["class"])


def read(spec: str, runs: Path, view: str | None = None) -> Finished:
    """The reading that `spec` names: a run id or folder, with ::view and ::segmenter where a run has several.

    view: key or name of the view where `spec` names none. A run with several views needs one of the two; without a segmenter the
    one that was written first is read, and `others` names the rest. Raises ConfigError or StoreError.
    """
    place, *chosen = spec.split(SEPARATOR)
    store = _store(place, runs)
    offered = _readings(store)
    views = list(dict.fromkeys(key for key, _ in offered))
    if view is not None and not chosen:
        chosen = [view]
    if not chosen and len(views) > 1:
        listed = "".join(f"\n  {store.folder.name}{SEPARATOR}{key}" for key in views[:MOST_LISTED])
        more = f"\n  and {len(views) - MOST_LISTED} more" if len(views) > MOST_LISTED else ""
        raise ConfigError(
            f"comparing {spec}: it has {len(views)} views. Name one, for all runs with --view or as one of{listed}{more}"
        )
    named = _named_views(store)
    key = views[0] if not chosen else chosen[0] if chosen[0] in views else named.get(chosen[0], chosen[0])
    begun = [one for one in views if one.startswith(f"{key}/")]
    if key not in views and len(begun) == 1:
        key = begun[0]
    if key not in views:
        offered_names = {*(begun or views), *named}
        why = f'{len(begun)} views begin with "{chosen[0]}"' if begun else f'unknown view "{chosen[0]}"'
        raise ConfigError(f"{spec}: {why}. {did_you_mean(chosen[0], offered_names)}")
    segmenters = [segmenter for of, segmenter in offered if of == key]
    segmenter = chosen[1] if len(chosen) > 1 else segmenters[0]
    if segmenter not in segmenters:
        raise ConfigError(f'{spec}: unknown segmenter "{segmenter}". {did_you_mean(segmenter, segmenters)}')
    others = () if len(chosen) > 1 else tuple(one for one in segmenters if one != segmenter)
    name = SEPARATOR.join([store.folder.name, *spec.split(SEPARATOR)[1:]])
    return Finished(name, key, segmenter, store.manifest(), offered[key, segmenter], others)


def _named_views(store: RunStore) -> dict[str, str]:
    """Name -> key of the views that readings.json names."""
    return {str(one["name"]): str(one["view"]) for one in readings_of(store.folder) if {"name", "view"} <= one.keys()}


def cuts(spec: str, runs: Path, view: str | None = None) -> dict[str, Rows]:
    """Segmenter -> rows of the view that `spec` or `view` names: what a threshold study reads."""
    view = read(spec, runs, view).view
    return {s: rows for (v, s), rows in _readings(_store(spec.split(SEPARATOR)[0], runs)).items() if v == view}


def _store(place: str, runs: Path) -> RunStore:
    folder = Path(place) if (Path(place) / "manifest.json").exists() else runs / place
    if not (folder / "manifest.json").exists():
        known = [path.parent.name for path in runs.glob("*/manifest.json")]
        raise ConfigError(f'no run "{place}" in {runs}. {did_you_mean(place, known)} Another folder: --folder.')
    return RunStore(folder)


def _readings(store: RunStore) -> dict[tuple[str, str], Rows]:
    """(view, segmenter) -> scored rows, in the order in which they were first written."""
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in store.rows().values():
        if row["status"] == "ok":
            grouped.setdefault((row["view"], row["segmenter"]), []).append(row)
    if not grouped:
        raise StoreError(f"{store.folder} holds no scored row: nothing to compare.")
    return {key: Rows.from_records(records) for key, records in grouped.items()}


def same_but_for_seeds(found: Sequence[Finished]) -> dict[str, list[Finished]]:
    """First name -> readings of one method under several seeds, the first of them in front."""

    def seedless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: seedless(v) for k, v in value.items() if k != "seed"}
        return [seedless(v) for v in value] if isinstance(value, list) else value

    groups: dict[str, list[Finished]] = {}
    for one in found:
        identity = one.manifest["identity"]
        method = [seedless(identity.get(key)) for key in ("extractor", "method")]  # manifests of earlier versions have both
        groups.setdefault(json.dumps([method, one.view, one.segmenter], sort_keys=True), []).append(one)
    return {members[0].name: members for members in groups.values()}


def check_comparable(found: Sequence[Finished]) -> None:
    """Raises ConfigError where two readings differ in data or protocol: their difference would say nothing of the methods."""
    for one in found[1:]:
        for key in ("dataset", "protocol"):
            mine, first = one.manifest["identity"][key], found[0].manifest["identity"][key]
            if mine != first:
                differing = [k for k in sorted({*mine, *first}) if mine.get(k) != first.get(k)]
                raise ConfigError(
                    f"{one.name} and {found[0].name} can't be compared: their {key} differs in "
                    + "; ".join(f"{k} ({mine.get(k)!r} and {first.get(k)!r})" for k in differing)
                )


def values_of(
    found: Sequence[Finished],
    definitions: Sequence[Definition],
    resamples: int,
    level: float,
    clusters: Mapping[str, str] | None,
) -> dict[str, dict[str, Interval]]:
    """Name -> metric -> value with its interval."""
    labels = None
    if clusters is not None:
        labels = [[clusters[s] for s in one.rows.samples] for one in found for _ in definitions]
    values = iter(bootstrap_all([(d, one.rows) for one in found for d in definitions], resamples, 0, level, labels))
    return {one.name: {d.name: next(values) for d in definitions} for one in found}


def parts_of(rows: Rows, by: str, definitions: Sequence[Definition], resamples: int, level: float) -> list[Part]:
    """A breakdown by "word", "class" or "size"."""
    if by == "class":
        return by_class(rows, resamples, level)
    return (by_word if by == "word" else by_size)(rows, definitions, resamples, level)


def thresholds_of(
    by_cut: Mapping[str, Rows], definitions: Sequence[Definition], resamples: int, level: float
) -> dict[str, tuple[list[Sensitivity], list[tuple[float, Interval]]]]:
    """Metric -> every rule, and the curve over quantiles. Average precision is left out: no cut changes it."""
    if len(by_cut) < 2:
        raise ConfigError(
            f"a threshold study needs rows of several cuts, but there is only {next(iter(by_cut))}. Add them to the same run, "
            f"without a forward pass for what is held: conceptseg ... experiment=thresholds"
        )
    return {
        d.name: (sensitivity(d, by_cut, resamples, level=level), curve(d, by_cut, resamples, level=level))
        for d in definitions
        if not d.name.startswith(("ap_", "released_ap"))
    }
