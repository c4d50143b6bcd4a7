"""From a finished table and its run folders to an HTML page with pictures. Reads photos through the run's own data set."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from fnmatch import fnmatchcase
from html import unescape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptseg.config import resolved
from conceptseg.errors import ConceptSegError, ConfigError, did_you_mean, printable
from conceptseg.files import write_atomically
from conceptseg.metrics.breakdowns import by_class, by_word
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.report.blocks import Behind, Block, TableRow
from conceptseg.report.html import (
    INDEX_TITLE,
    Gallery,
    Page,
    RunBehind,
    Section,
    charts_of,
    charts_of_sweep,
    heats_of,
    render,
    render_index,
)
from conceptseg.report.panels import colour_map
from conceptseg.report.results import Results
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.tables.sweeps import sweeps_of
from conceptseg.targets import instantiate
from conceptseg.types import Task

log = logging.getLogger(__name__)

EMBED_BELOW = 6_000_000
"""Bytes of pictures that are put into the page itself; more are linked beside it."""
SIDE = 112
"""Longest side of a thumbnail in pixels."""
BLOCK = 16
"""Pixels of WebP's blocks: tiles of a sheet that begin with one don't bleed into each other."""
MOST_PAIRS = 9000
"""Maps with predictions that a block shows unless methods were named: the folder of ImageNet-Segmentation's stays below 30 MB."""
FIRST = ("ConceptAttention", "DAAM")
"""Methods that a gallery opens with, where the table has them."""
RESAMPLES = 1000
"""Behind the intervals of words and classes, which are many."""
TRUTH, PREDICTION, COVER = (86, 180, 233), (213, 94, 0), 150
"""Okabe and Ito's sky blue and vermilion, which colour-blind readers can tell apart."""


@dataclass(frozen=True, slots=True)
class _Shown:
    """A row with its run folder."""

    row: TableRow
    run: Behind
    store: RunStore
    records: Sequence[Mapping[str, Any]]
    """The run's scored rows of this view and segmenter."""

    @property
    def maps(self) -> MapKeeper:
        return MapKeeper(self.store.folder / "maps", frozenset(), self.store.samples)


def write_html(
    table: Results,
    runs: Path,
    folder: Path,
    pictures: int | None = None,
    methods: Sequence[str] = (),
    stem: str = "",
    content: str = "",
) -> Path:
    """Write <stem>.html, and <stem>-pictures/ beside it where pictures are too many to be put into the page.

    pictures: at most so many samples of a block; None shows all. methods: names or patterns of the methods with pictures; ()
    takes headline methods first and as many as a page carries. stem: the table's name unless said. content: see `render`. Rows
    whose run folders are not under `runs` keep their numbers and lose their bars and pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = stem or table.table
    names = [row.name for block in table.blocks for row in block.rows if row.group == "methods"]
    for pattern in methods:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f'--gallery: table {table.table} has no method "{pattern}". {did_you_mean(pattern, names)}')
    keeper = _Thumbnails(folder, f"{stem}-pictures")
    sections = []
    for number, block in enumerate(table.blocks):
        shown = _shown(block, runs)
        sweeps = sweeps_of(table, block)
        parts, kind, metric = _parts([] if sweeps else shown)
        gallery = _gallery(table, shown, keeper, number, pictures, methods)
        charts, heats = charts_of(block, table.columns), {}
        for sweep in sweeps[:1]:
            charts, heats = charts_of_sweep(sweep), heats_of(sweep, [tuple(c) for c in colour_map().tolist()])
        scales, panels = tuple(ends for ends, _ in heats.values()), tuple((k, grids) for k, (_, grids) in heats.items())
        sections.append(Section(block, charts, parts, kind, metric, gallery, panels, scales))
    addresses = keeper.settle()
    sections = [replace(one, gallery=_addressed(one.gallery, addresses)) for one in sections]
    scale = ["#" + bytes(colour_map()[place]).hex() for place in range(0, 256, 51)]
    path = folder / f"{stem}.html"
    write_atomically(path, render(table, sections, _runs(table, runs), scale, content).encode())
    return path


def write_index(folder: Path) -> Path | None:
    """Write index.html over the pages in `folder` and the folders in it, or bring it up to date.

    None where there are no pages, and where index.html is another program's, which is left alone with a warning.
    """
    path = folder / "index.html"
    if path.exists() and f"<title>{INDEX_TITLE}</title>" not in path.read_text(encoding="utf-8", errors="replace")[:4000]:
        log.warning("%s is not a list of conceptseg's pages and stays as it is; choose another folder for a list", path)
        return None
    pages = []
    for page in sorted({*folder.glob("*.html"), *folder.glob("*/*.html"), *folder.glob("tables/*/*.html")}):
        with page.open(encoding="utf-8", errors="replace") as file:
            head = file.read(4000)
        said = dict(re.findall(r'<meta name="conceptseg-(table|blocks)" content="([^"]*)">', head))
        if page != path and "table" in said:
            title = re.search("<title>(.*?)</title>", head)
            written = datetime.fromtimestamp(page.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            beside = [page.with_suffix(ending) for ending in (".csv", ".tex")]
            files = [one.relative_to(folder).as_posix() for one in (page, *(one for one in beside if one.exists()))]
            name = unescape(title[1]) if title else page.stem
            pages.append(Page(files, name, unescape(said["table"]), unescape(said.get("blocks", "")), written))
    if not pages:
        path.unlink(missing_ok=True)
        return None
    pages.sort(key=lambda page: page.written, reverse=True)
    write_atomically(path, render_index(pages).encode())
    return path


def free_stem(table: Results, folder: Path, content: str) -> str:
    """A name for an export that no other export in `folder` has: the table's, with `content` behind it where that is taken."""
    page = folder / f"{table.table}.html"
    mine = f'<meta name="conceptseg-content" content="{content}">'
    taken = [one for one in (page, page.with_suffix(".csv"), page.with_suffix(".tex")) if one.exists()]
    if not taken or (page.exists() and mine in page.read_text(encoding="utf-8", errors="replace")[:4000]):
        return table.table
    return f"{table.table}-{content}"


def _addressed(gallery: Gallery, addresses: Mapping[str, str]) -> Gallery:
    photos = tuple(addresses[one] for one in gallery.photos)
    return replace(gallery, photos=photos, maps=tuple(tuple(addresses[one] for one in sheets) for sheets in gallery.maps))


def _shown(block: Block, runs: Path) -> list[_Shown]:
    """Rows that were run, with the run that stands for them: the standard protocol's where there are two."""
    found = []
    stores: dict[str, RunStore] = {}
    scored: dict[str, dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
    for row in block.ordered_rows:
        if row.status == "ok" and row.x is None:
            run = next((one for one in row.runs if one.kind == "standard"), row.runs[0])
            if run.run_id not in stores and (runs / run.run_id / "manifest.json").exists():
                stores[run.run_id] = RunStore(runs / run.run_id)
                held = scored.setdefault(run.run_id, {})
                for one in stores[run.run_id].rows().values():
                    if one["status"] == "ok":
                        held.setdefault((one["view"], one["segmenter"]), []).append(one)
            if run.run_id in stores:
                records = scored[run.run_id].get((run.view, run.segmenter), [])
                found.append(_Shown(row, run, stores[run.run_id], records))
    return found


def _parts(shown: Sequence[_Shown]) -> tuple[dict[str, list[dict[str, Any]]], str, str]:
    """Numbers by class where images have several, else by word."""
    found: dict[str, list[dict[str, Any]]] = {}
    kind, metric = "word", DEFINITIONS["miou_dataset"].label
    for one in shown:
        rows = Rows.from_records(one.records)
        if not len(rows) or not all(rows.words):
            continue
        if any(len(words) > 1 for words in rows.words):
            kind, metric = "class", "IoU"
            parts = by_class(rows, RESAMPLES, 0.95)
        else:
            parts = by_word(rows, [DEFINITIONS["miou_dataset"]], RESAMPLES, 0.95)
        found[one.row.name] = [
            {"name": p.name, "n": p.n, "value": _rounded(v.value), "low": _rounded(v.low), "high": _rounded(v.high)}
            for p in parts
            for v in p.values.values()
        ]
    return found, kind, metric


# ---------------------------------------------------------------- pictures


class _Thumbnails:
    """Holds small pictures, and writes them beside the page once it is known whether they fit into it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.held: dict[str, bytes] = {}

    def keep(self, name: str, content: bytes) -> str:
        """The address that stands for the picture until `settle`."""
        address = f"{self.name}/{name}"
        self.held[address] = content
        return address

    def settle(self) -> dict[str, str]:
        """Address -> that of its data, or itself once the files are written."""
        if sum(map(len, self.held.values())) > EMBED_BELOW:
            for address, content in self.held.items():
                write_atomically(self.folder / address, content)
            return {address: address for address in self.held}
        return {address: f"data:image/webp;base64,{base64.b64encode(content).decode()}" for address, content in self.held.items()}


def _gallery(
    table: Results, shown: Sequence[_Shown], keeper: _Thumbnails, number: int, pictures: int | None, named: Sequence[str]
) -> Gallery:
    ranked = _ranked(table, shown)
    pictured = [one for one in ranked if _keeps_maps(one)]
    if named:
        pictured = [one for one in pictured if any(fnmatchcase(one.row.name, pattern) for pattern in named)]
    if not pictured:
        return Gallery()
    first = max(pictured, key=lambda one: len(one.records))
    keys = [row["sample"] for row in first.records]
    if pictures is not None and len(keys) > pictures:
        keys = [keys[i * len(keys) // pictures] for i in range(pictures)]
    if not named:
        pictured = pictured[: max(2, MOST_PAIRS // len(keys))]
    methods = [*pictured, *(one for one in ranked if one not in pictured)]
    score = DEFINITIONS["miou_image"]
    scores = [
        dict(zip(r.samples, score.finish(score.statistics(r)), strict=True))
        for r in (Rows.from_records(m.records) for m in methods)
    ]
    held = list(_tasks(first, keys))
    if not held:
        return Gallery()
    side = _side([task.truth.shape for _, task in held])
    photos = _sheets(keeper, f"{number}-photos", side, (_photo_and_truth(task, side) for _, task in held))
    maps = tuple(
        _sheets(keeper, f"{number}-{place}", side, (_map_and_prediction(_kept(one, key), side) for key, _ in held))
        for place, one in enumerate(pictured)
    )
    samples = [
        {
            "key": printable(key),
            "words": [printable(w) for w, label in zip(task.concepts.names, task.concepts.labels, strict=True) if label],
            "scores": [_rounded(found.get(key)) for found in scores], "size": task.truth.shape[::-1],
        }
        for key, task in held
    ]  # fmt: skip
    words = sorted({word for sample in samples for word in sample["words"]})
    return Gallery(tuple(m.row.name for m in methods), tuple(words), tuple(samples), photos, maps, side=side)


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(float(value), 3)


def _ranked(table: Results, shown: Sequence[_Shown]) -> list[_Shown]:
    """ConceptAttention's and DAAM's first rows, then the sheet's headline methods, then the best, by mean IoU."""
    column = next((c.name for c in table.columns if c.kind == "standard" and "miou" in c.name), table.columns[0].name)
    methods = [one for one in shown if one.row.group == "methods"]
    opening = [next((one for one in methods if one.row.name.startswith(name)), None) for name in FIRST]

    def rank(one: _Shown) -> tuple[int, bool, float]:
        value = one.row.values.get(column)
        return opening.index(one) if one in opening else len(FIRST), not one.row.headline, -(value.value if value else 0.0)

    return sorted(methods, key=rank)


def _keeps_maps(one: _Shown) -> bool:
    """Whether a map of some sample is kept; a run that was extended may lack the first ones'."""
    return any(_kept(one, row["sample"]) is not None for row in one.records)


def _kept(one: _Shown, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Map and labels of a sample, None where the run kept none."""
    return one.maps.read(key, one.run.view, one.run.segmenter)


def _tasks(one: _Shown, keys: Sequence[str]) -> Iterator[tuple[str, Task]]:
    """Samples as the run's protocol sets them. None where the run's data are not on this machine: said once, in the log."""
    config = resolved(one.store.manifest()["config"])
    whole = dict(config["dataset"])  # of the command that began the run; later ones may have asked for more samples
    whole |= {"limit": None} if "limit" in whole else {}
    whole |= {"count": max(whole["count"], len(keys))} if isinstance(whole.get("count"), int) else {}
    try:
        dataset, protocol = instantiate(whole, "dataset"), instantiate(config["protocol"], "protocol")
        for key in keys:
            task = protocol.prepare(dataset.read(key))
            if isinstance(task, Task):
                yield key, task
    except ConceptSegError as error:
        log.warning("no pictures of %s: %s", one.run.run_id, error)


def _side(shapes: Sequence[tuple[int, ...]]) -> int:
    """Side of a block's tiles in pixels: SIDE, or what the largest picture fills, in whole blocks."""
    return BLOCK * max(1, min(SIDE, max(max(shape[:2]) for shape in shapes)) // BLOCK)


def _sheets(keeper: _Thumbnails, name: str, side: int, pairs: Iterator[np.ndarray]) -> tuple[str, ...]:
    """Addresses of WebP sheets of pairs of tiles, each uint8 [side 2*side RGBA]; see `Gallery`."""
    across, down = Gallery().across, Gallery().down
    addresses: list[str] = []
    while some := list(islice(pairs, across * down)):
        lines = -(-len(some) // across)
        sheet = np.zeros((lines * side, across * 2 * side, 4), np.uint8)
        for place, pair in enumerate(some):
            y, x = side * (place // across), 2 * side * (place % across)
            sheet[y : y + side, x : x + 2 * side] = pair
        buffer = io.BytesIO()
        Image.fromarray(sheet, "RGBA").save(buffer, "WEBP", quality=50, method=3)
        addresses.append(keeper.keep(f"{name}-{len(addresses)}.webp", buffer.getvalue()))
    return tuple(addresses)


def _photo_and_truth(task: Task, side: int) -> np.ndarray:
    photo = _opaque(np.round(255 * task.image).astype(np.uint8), side)
    return _beside(photo, _cover((task.truth > 0) & (task.truth != 255), side, TRUTH))


def _map_and_prediction(kept: tuple[np.ndarray, np.ndarray] | None, side: int) -> np.ndarray:
    if kept is None:
        return np.zeros((side, 2 * side, 4), np.uint8)
    return _beside(_opaque(colour_map()[kept[0]], side), _cover(kept[1] > 0, side, PREDICTION))


def _beside(picture: np.ndarray, cover: np.ndarray) -> np.ndarray:
    """Two tiles as one. See-through pixels take the colours of the picture's edge, which WebP's filter would darken otherwise."""
    colours = np.where(cover[..., 3:] > 0, cover[..., :3], picture[:, -1:, :3])
    return np.concatenate([picture, np.dstack([colours, cover[..., 3]])], axis=1)


def _opaque(picture: np.ndarray, side: int) -> np.ndarray:
    """A square; the page stretches it back."""
    image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    return np.dstack([np.asarray(image), np.full((side, side), 255, np.uint8)])


def _cover(inside: np.ndarray, side: int, colour: tuple[int, int, int]) -> np.ndarray:
    """One colour, see-through, where `inside`."""
    small = np.asarray(Image.fromarray(inside.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST))
    return np.array([*colour, COVER], np.uint8) * small[..., None]


# ---------------------------------------------------------------- runs


def _runs(table: Results, runs: Path) -> list[RunBehind]:
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, where it is there, writes the same text
    rows: dict[str, list[str]] = {}
    for block in table.blocks:
        for row in block.ordered_rows:
            for run in row.runs:
                rows.setdefault(run.run_id, []).append(f"{block.name}, {row.name} ({run.view}, {run.segmenter})")
    found = []
    for run_id, names in rows.items():
        store = RunStore(runs / run_id)
        manifest = dict(store.manifest()) if (store.folder / "manifest.json").exists() else None
        config = yaml.dump(manifest["config"], None, dumper, sort_keys=False, allow_unicode=True) if manifest else ""
        found.append(RunBehind(run_id, tuple(names), manifest, config))
    return found
