"""conceptseg-compare: test finished runs against a baseline, image by image. Needs no model."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conceptseg import __version__
from conceptseg.errors import ConfigError, guarded, printable
from conceptseg.metrics.breakdowns import Part, clusters_by_word, worst_images
from conceptseg.metrics.comparisons import Comparison, compare
from conceptseg.metrics.definitions import DEFINITIONS, definition_of
from conceptseg.metrics.intervals import Interval
from conceptseg.metrics.measured import names
from conceptseg.metrics.power import images_needed, paired_deviation
from conceptseg.metrics.seeds import Spread, seed_spread
from conceptseg.metrics.thresholds import Sensitivity
from conceptseg.tables.compared import (
    Finished,
    check_comparable,
    cuts,
    parts_of,
    read,
    same_but_for_seeds,
    thresholds_of,
    values_of,
)
from conceptseg.tables.shared_results import Held, hold, is_table, read_table

METRICS = ("accuracy", "miou_dataset", "miou_image", "ap_image")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="conceptseg-compare", description=__doc__)
    found.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    found.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="run id or folder, with ::view and ::segmenter if it has several; or two tables: results.json files, https:// or hf://",
    )
    found.add_argument("--folder", type=Path, default=Path("runs"), help="folder that holds the run ids (runtime.runs)")
    found.add_argument("--view", help="key or name of the view that is read where a run has several and names none")
    found.add_argument("--baseline", help="the run that others are tested against; by default the first")
    found.add_argument(
        "--metric",
        action="append",
        type=lambda name: definition_of(name, "--metric").name,
        metavar="METRIC",
        help=f"one of {', '.join(sorted([*DEFINITIONS, *names()]))}; may be given several times",
    )
    found.add_argument("--by", choices=("word", "class", "size"), help="numbers for parts of the data, per run")
    found.add_argument("--worst", type=float, metavar="PERCENT", help="mean over the worst images of each run")
    found.add_argument("--thresholds", action="store_true", help="fixed, best and quantile cuts (experiment=thresholds)")
    found.add_argument(
        "--power", type=float, action="append", metavar="POINTS",
        help="images that a difference of so many points needs (80 %% power, two-sided 5 %%); may be given several times",
    )  # fmt: skip
    found.add_argument("--draw", choices=("images", "words"), default="images", help="unit of the bootstrap and the tests")
    found.add_argument("--resamples", type=int, default=10_000)
    found.add_argument("--level", type=float, default=0.95)
    found.add_argument("--json", type=Path, metavar="FILE", help="write the output as JSON")
    return found


@guarded
def main() -> int:
    """Print tests against the baseline, spreads of seeds, and the selected breakdowns."""
    said = parser().parse_args()
    if any(map(is_table, said.runs)):
        return _compare_tables(said)
    definitions = [definition_of(name, "--metric") for name in said.metric or METRICS]
    specs = list(dict.fromkeys([*([said.baseline] if said.baseline else []), *said.runs]))
    found = [read(spec, said.folder, said.view) for spec in specs]
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
        if said.power:
            deviations = {
                n: {d.name: paired_deviation(d, rows, heads[0].rows) for d in definitions} for n, rows in others.items()
            }
            body["power"] = {
                name: {m: {f"{p:g}": images_needed(sd, p / _unit(m)[0]) for p in said.power} for m, sd in by_metric.items()}
                for name, by_metric in deviations.items()
            }
    elif said.power:
        few = "those named differ in their seeds alone" if len(found) > 1 else "one run was named"
        raise ConfigError(f"--power compares methods, and {few}. Name the baseline and a run of another method.")
    several = {name: members for name, members in groups.items() if len(members) > 1}
    body["seeds"] = {name: seed_spread(definitions, {m.name: m.rows for m in members}) for name, members in several.items()}
    if said.by:
        body["parts"] = {one.name: parts_of(one.rows, said.by, definitions, said.resamples, said.level) for one in heads}
    if said.worst is not None:
        body["worst"] = {one.name: {d.name: worst_images(one.rows, d, said.worst / 100) for d in definitions} for one in heads}
    if said.thresholds:
        body["thresholds"] = {
            one.name: thresholds_of(cuts(spec, said.folder, said.view), definitions, said.resamples, said.level)
            for one, spec in zip(found, specs, strict=True)
            if one in heads
        }
    print_comparison(body, heads)
    if said.json:
        said.json.write_text(json.dumps(_plain(body), indent=1) + "\n", encoding="utf-8")
        print(f"written: {said.json}")
    return 0


TABLES_TAKE = {"runs", "metric", "json"}
"""Options that mean something where tables are compared."""


def _compare_tables(said: argparse.Namespace) -> int:
    """Print two tables' numbers side by side."""
    if len(said.runs) != 2 or not all(map(is_table, said.runs)):
        raise ConfigError(
            f"comparing tables: {', '.join(said.runs)} were named; wanted two results.json files, each a path, an https:// "
            f"address or hf://owner/name/path. A run and a table can't be compared: a table has no numbers of single images."
        )
    unused = [key for key, value in vars(said).items() if key not in TABLES_TAKE and value != parser().get_default(key)]
    if unused:
        raise ConfigError(f"comparing tables: --{unused[0]} needs the rows of runs, and a results.json has none. Leave it out.")
    mine, theirs = map(read_table, said.runs)
    held = [one for one in hold(mine, theirs) if not said.metric or one.column.name.rpartition("/")[2] in said.metric]
    if not held:
        raise ConfigError(f"comparing tables: they share no number of {', '.join(said.metric)}. Leave --metric out to see all.")
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 140)
    print(printable(f"{mine.title} ({said.runs[0]}) and {theirs.title} ({said.runs[1]}); intervals: {mine.interval}"))
    print("Differences are not paired: these tables hold no single images, so only large ones stand out.")
    lines = [
        [one.block, one.row, one.column.heading, *(" ".join(one.column.written(v)) for v in (one.mine, one.theirs)), _gap(one)]
        for one in held
    ]
    _print(console, "first minus second", ["block", "row", "metric", "first", "second", "difference"], lines)
    if said.json:
        plain = [
            {
                "block": one.block, "row": one.row, "metric": one.column.name, "first": asdict(one.mine),
                "second": asdict(one.theirs), "difference": one.difference, "half_width_if_independent": one.spread,
            }
            for one in held
        ]  # fmt: skip
        said.json.write_text(json.dumps({"tables": said.runs, "numbers": plain}, indent=1) + "\n", encoding="utf-8")
        print(f"written: {said.json}")
    return 0


def _gap(one: Held) -> str:
    """The difference, and half the width that its interval would have were the tables independent."""
    scale, places = (100, one.column.places) if one.column.percent else (1, 3)
    around = "" if one.spread is None else f" \u00b1 {scale * one.spread:.{places}f}"
    return f"{scale * one.difference:+.{places}f}{around}"


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


def _label(metric: str) -> str:
    return definition_of(metric, "--metric").label


def _unit(metric: str) -> tuple[float, int, str]:
    """The factor that a metric's values are printed times, their decimals, and the unit behind its label.

    "iou", of one class, is no metric of its own.
    """
    return (100, 1, " %") if metric == "iou" or definition_of(metric, "--metric").percent else (1, 3, "")


def _head(metric: str) -> str:
    return ("IoU" if metric == "iou" else _label(metric)) + _unit(metric)[2]


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
        if one.others:
            print(f"    its first cut; {one.name}::{one.view}::CUT takes another: {', '.join(one.others)}")
    metrics = list(next(iter(body["readings"].values())))
    labels = [_head(m) for m in metrics]
    lines = [[name, *(_number(m, v) for m, v in values.items())] for name, values in body["readings"].items()]
    _print(console, "values", ["run", *labels], lines)
    if "comparisons" in body:
        head = ["run", "metric", "difference", "p bootstrap", "p sign flip", "Holm (boot.)", "Holm (flip)", "win rate", "n"]
        lines = [
            [
                name, _head(c.metric), _number(c.metric, c.difference), _p(c.p_bootstrap), _p(c.p_sign_flip),
                _p(c.p_bootstrap_holm), _p(c.p_sign_flip_holm), f"{c.win_rate:.2f}", str(c.difference.n),
            ]
            for name, comparisons in body["comparisons"].items()
            for c in comparisons
        ]  # fmt: skip
        _print(console, f"minus {body['baseline']}, paired image by image", head, lines)
    for name, needs in body.get("power", {}).items():
        points = list(next(iter(needs.values())))
        lines = [[_label(m), *("–" if n is None else f"{n:,}" for n in by_point.values())] for m, by_point in needs.items()]
        title = f"images needed for {name} minus {body['baseline']}, by points of difference (80 % power, two-sided 5 %)"
        _print(console, title, ["metric", *points], lines)
    for name, spreads in body["seeds"].items():
        lines = [
            [_head(m), *(f"{_unit(m)[0] * v:.{_unit(m)[1] + 1}f}" for v in (s.mean, s.standard_deviation, s.range))]
            for m, s in spreads.items()
        ]
        title = f"{len(next(iter(spreads.values())).values)} seeds of {name}"
        _print(console, title, ["metric", "mean", "SD between seeds", "range"], lines)
    for name, parts in body.get("parts", {}).items():
        columns = list(dict.fromkeys(metric for part in parts for metric in part.values))
        head = ["part", "n", *map(_head, columns)]
        lines = [[p.name, str(p.n), *(_number(c, p.values[c]) if c in p.values else "–" for c in columns)] for p in parts]
        _print(console, f"parts of {name}", head, lines)
    if "worst" in body:
        lines = [
            [name, *(f"{_unit(m)[0] * v:.{_unit(m)[1]}f} (n={n})" for m, (v, n) in worst.items())]
            for name, worst in body["worst"].items()
        ]
        _print(console, "mean over the worst images", ["run", *labels], lines)
    for name, studies in body.get("thresholds", {}).items():
        for metric, (rules, points) in studies.items():
            scale, places, _ = _unit(metric)
            lines = [[r.rule, _number(metric, r.value), r.cut or "its own for each image"] for r in rules]
            title = f"{_label(metric)} of {name} by cut (the best ones have seen the truth)"
            _print(console, title, ["rule", _head(metric), "cut"], lines)
            shown = ", ".join(f"{q:g}: {scale * v.value:.{places}f}" for q, v in points)
            if shown:
                print(f"{_head(metric)} by quantile: {shown}")


def _print(console: Any, title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for place, heading in enumerate(head):
        table.add_column(Text(heading), justify="left" if place == 0 else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    console.print(table)


def _number(metric: str, interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    scale, places, _ = _unit(metric)
    value, low, high = (f"{scale * v:.{places}f}" for v in (interval.value, interval.low, interval.high))
    return value if math.isnan(interval.low) else f"{value} [{low}, {high}]"


def _p(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.4f}"
