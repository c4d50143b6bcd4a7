"""conceptseg-compare: finished runs against a baseline, image by image, and what lies behind their numbers. Needs no model."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError, StoreError, did_you_mean, guarded
from conceptseg.metrics.breakdowns import Part, by_class, by_size, by_word, clusters_by_word, worst_images
from conceptseg.metrics.comparisons import Comparison, compare
from conceptseg.metrics.definitions import DEFINITIONS, Definition, Rows
from conceptseg.metrics.intervals import Interval, bootstrap_all
from conceptseg.metrics.seeds import Spread, seed_spread
from conceptseg.metrics.thresholds import Sensitivity, curve, sensitivity
from conceptseg.store.run import RunStore
from conceptseg.store.schema import Manifest

METRICS = ("accuracy", "miou_dataset", "miou_image", "ap_image")
SEPARATOR = "::"


@dataclass(frozen=True, slots=True)
class Finished:
    """One reading of one run: what a column of numbers stands on."""

    name: str
    """run id, and where a run was named with one, its view and segmenter."""
    view: str
    segmenter: str
    manifest: Manifest
    rows: Rows

    @property
    def method(self) -> str:
        """The extractor's class."""
        return str(self.manifest["identity"]["method"]["class"])


def read(spec: str, runs: Path) -> Finished:
    """The reading that `spec` names: a run id or folder, with ::view and ::segmenter where a run has several.

    Without them the view and segmenter that were written first. Raises ConfigError or StoreError.
    """
    place, *chosen = spec.split(SEPARATOR)
    store = _store(place, runs)
    offered = _readings(store)
    wanted = next(iter(offered))
    if chosen:
        views = list(dict.fromkeys(view for view, _ in offered))
        if chosen[0] not in views:
            raise ConfigError(f'{spec}: unknown view "{chosen[0]}". {did_you_mean(chosen[0], views)}')
        segmenters = [segmenter for view, segmenter in offered if view == chosen[0]]
        segmenter = chosen[1] if len(chosen) > 1 else segmenters[0]
        if segmenter not in segmenters:
            raise ConfigError(f'{spec}: unknown segmenter "{segmenter}". {did_you_mean(segmenter, segmenters)}')
        wanted = chosen[0], segmenter
    name = SEPARATOR.join([store.folder.name, *chosen])
    return Finished(name, *wanted, store.manifest(), offered[wanted])


def cuts(spec: str, runs: Path) -> dict[str, Rows]:
    """Segmenter -> rows of the view that `spec` names: what a threshold study reads."""
    view = read(spec, runs).view
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
        method = {key: seedless(identity[key]) for key in ("extractor", "method")}
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


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="conceptseg-compare", description=__doc__)
    found.add_argument("runs", nargs="+", metavar="run", help="run id or folder, with ::view and ::segmenter if it has several")
    found.add_argument("--folder", type=Path, default=Path("runs"), help="where run ids are looked for (runtime.runs)")
    found.add_argument("--baseline", help="the run that others are tested against; the first one unless said")
    found.add_argument("--metric", action="append", choices=sorted(DEFINITIONS), help="may be given several times")
    found.add_argument("--by", choices=("word", "class", "size"), help="numbers of parts of the data, for each run")
    found.add_argument("--worst", type=float, metavar="PERCENT", help="mean over the worst images of each run")
    found.add_argument("--thresholds", action="store_true", help="fixed, best and quantile cuts (experiment=thresholds)")
    found.add_argument("--draw", choices=("images", "words"), default="images", help="what bootstrap and tests draw")
    found.add_argument("--resamples", type=int, default=10_000)
    found.add_argument("--level", type=float, default=0.95)
    found.add_argument("--json", type=Path, metavar="FILE", help="write everything that was printed")
    return found


@guarded
def main() -> int:
    """Print tests against the baseline, spreads of seeds, and the breakdowns that were asked for."""
    said = parser().parse_args()
    definitions = [DEFINITIONS[name] for name in said.metric or METRICS]
    specs = list(dict.fromkeys([*([said.baseline] if said.baseline else []), *said.runs]))
    found = [read(spec, said.folder) for spec in specs]
    check_comparable(found)
    groups = same_but_for_seeds(found)
    heads = [members[0] for members in groups.values()]
    clusters = None
    if said.draw == "words":
        clusters = {sample: label for one in heads for sample, label in clusters_by_word(one.rows).items()}
    body: dict[str, Any] = {"baseline": heads[0].name, "interval": _interval_words(said.level, said.resamples, said.draw)}
    body["readings"] = values_of(heads, definitions, said.resamples, said.level, clusters)
    if len(heads) > 1:
        others = {one.name: one.rows for one in heads[1:]}
        body["comparisons"] = compare(definitions, heads[0].rows, others, said.resamples, level=said.level, clusters=clusters)
    several = {name: members for name, members in groups.items() if len(members) > 1}
    body["seeds"] = {name: seed_spread(definitions, {m.name: m.rows for m in members}) for name, members in several.items()}
    if said.by:
        body["parts"] = {one.name: parts_of(one.rows, said.by, definitions, said.resamples, said.level) for one in heads}
    if said.worst is not None:
        body["worst"] = {one.name: {d.name: worst_images(one.rows, d, said.worst / 100) for d in definitions} for one in heads}
    if said.thresholds:
        body["thresholds"] = {
            one.name: thresholds_of(cuts(spec, said.folder), definitions, said.resamples, said.level)
            for one, spec in zip(found, specs, strict=True)
            if one in heads
        }
    print_comparison(body, heads)
    if said.json:
        said.json.write_text(json.dumps(_plain(body), indent=1) + "\n", encoding="utf-8")
        print(f"written: {said.json}")
    return 0


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
        if not d.name.startswith(("ap_", "published_ap"))
    }


def _interval_words(level: float, resamples: int, draw: str) -> str:
    drawn = {"images": "images", "words": "groups of images with the same words"}[draw]
    return f"{100 * level:g} % percentile bootstrap over {drawn}, {resamples:,} resamples"


def _plain(value: Any) -> Any:
    """JSON of everything printed; undefined numbers become null."""
    if isinstance(value, Comparison):
        return {**_plain(asdict(value)), "win_rate": _plain(value.win_rate)}
    if isinstance(value, Spread):
        return {"values": _plain(value.values), "mean": value.mean, "standard_deviation": _plain(value.standard_deviation)}
    if isinstance(value, (Interval, Part, Sensitivity)):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# ---------------------------------------------------------------- printing


def print_comparison(body: Mapping[str, Any], heads: Sequence[Finished]) -> None:
    """Everything in `body`, each part a table of its own, with what its numbers mean."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140)
    first = heads[0].manifest["identity"]
    print(f"{first['dataset']['name']}, protocol {first['protocol']['name']} v{first['protocol']['version']}; {body['interval']}")
    for one in heads:
        print(
            f"  {one.name}: {one.method}, view {one.view}, {one.segmenter}, {len(one.rows)} images, {one.manifest['provenance']}"
        )
    metrics = list(next(iter(body["readings"].values())))
    labels = [f"{DEFINITIONS[m].label} %" for m in metrics]
    _print(console, "values", ["run", *labels], [[name, *map(_number, v.values())] for name, v in body["readings"].items()])
    if "comparisons" in body:
        head = ["run", "metric", "difference", "p bootstrap", "p sign flip", "Holm (boot.)", "Holm (flip)", "win rate", "n"]
        lines = [
            [
                name, DEFINITIONS[c.metric].label, _number(c.difference), _p(c.p_bootstrap), _p(c.p_sign_flip),
                _p(c.p_bootstrap_holm), _p(c.p_sign_flip_holm), f"{c.win_rate:.2f}", str(c.difference.n),
            ]
            for name, comparisons in body["comparisons"].items()
            for c in comparisons
        ]  # fmt: skip
        _print(console, f"minus {body['baseline']}, paired image by image (points)", head, lines)
    for name, spreads in body["seeds"].items():
        lines = [
            [DEFINITIONS[m].label, f"{100 * s.mean:.2f}", f"{100 * s.standard_deviation:.2f}", f"{100 * s.range:.2f}"]
            for m, s in spreads.items()
        ]
        title = f"{len(next(iter(spreads.values())).values)} seeds of {name}"
        _print(console, title, ["metric", "mean %", "SD between seeds", "range"], lines)
    for name, parts in body.get("parts", {}).items():
        columns = list(dict.fromkeys(metric for part in parts for metric in part.values))
        head = ["part", "n", *(f"{DEFINITIONS[c].label if c in DEFINITIONS else 'IoU'} %" for c in columns)]
        lines = [[p.name, str(p.n), *(_number(p.values[c]) if c in p.values else "–" for c in columns)] for p in parts]
        _print(console, f"parts of {name}", head, lines)
    if "worst" in body:
        lines = [[name, *(f"{100 * v:.1f} (n={n})" for v, n in worst.values())] for name, worst in body["worst"].items()]
        _print(console, "mean over the worst images", ["run", *labels], lines)
    for name, studies in body.get("thresholds", {}).items():
        for metric, (rules, points) in studies.items():
            label = DEFINITIONS[metric].label
            lines = [[r.rule, _number(r.value), r.cut or "its own for each image"] for r in rules]
            _print(console, f"{label} of {name} by cut (the best ones have seen the truth)", ["rule", f"{label} %", "cut"], lines)
            shown = ", ".join(f"{q:g}: {100 * v.value:.1f}" for q, v in points)
            if shown:
                print(f"{label} % by quantile: {shown}")


def _print(console: Any, title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for place, heading in enumerate(head):
        table.add_column(Text(heading), justify="left" if place == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(table)


def _number(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    bounds = "" if math.isnan(interval.low) else f" [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"
    return f"{100 * interval.value:.1f}{bounds}"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.4f}"
