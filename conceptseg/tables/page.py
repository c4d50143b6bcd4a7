"""From a finished table and its run folders to an HTML page with pictures. Reads photos through the run's own data set."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptseg.config import instantiate, resolved
from conceptseg.errors import ConceptSegError, printable
from conceptseg.files import write_atomically
from conceptseg.metrics.breakdowns import by_class, by_word
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.report.html import Gallery, RunBehind, Section, charts_of, render
from conceptseg.report.panels import colour_map
from conceptseg.report.results import Behind, Block, Results, TableRow
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.types import Task

log = logging.getLogger(__name__)

EMBED_BELOW = 4_000_000
"""Bytes of pictures that are put into the page itself; more are linked beside it."""
SIDE = 112
"""Longest side of a thumbnail in pixels."""
BLOCK = 16
"""Pixels of WebP's blocks: tiles of a strip that begin with one don't bleed into each other."""
METHODS, METHODS_OF_MANY, MANY = 4, 2, 1500
"""Methods with pictures in a block, the best ones; fewer where a block has many images, so that the folder stays below 30 MB."""
RESAMPLES = 1000
"""Behind the intervals of words and classes, which are many."""
TRUTH, PREDICTION, COVER = (0, 200, 130), (240, 120, 0), 140


@dataclass(frozen=True, slots=True)
class _Shown:
    """A row with its run folder."""

    row: TableRow
    run: Behind
    store: RunStore

    @property
    def maps(self) -> MapKeeper:
        return MapKeeper(self.store.folder / "maps", frozenset(), self.store.samples)


def write_html(table: Results, runs: Path, folder: Path, pictures: int | None = None) -> Path:
    """Write <table>.html, and <table>-pictures/ beside it where pictures are too many to be put into the page.

    pictures: at most so many samples of a block; None shows all. Rows whose run folders are not under `runs` keep their
    numbers and lose their bars and pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keeper = _Thumbnails(folder, f"{table.table}-pictures")
    sections = []
    for number, block in enumerate(table.blocks):
        shown = _shown(block, runs)
        parts, kind, metric = _parts(shown)
        gallery = _gallery(block, table, shown, keeper, number, pictures)
        sections.append(Section(block, charts_of(block, table.columns), parts, kind, metric, gallery))
    keeper.settle(sections)
    path = folder / f"{table.table}.html"
    write_atomically(path, render(table, sections, _runs(table, runs)).encode())
    return path


def _shown(block: Block, runs: Path) -> list[_Shown]:
    """Rows that were run, with the run that stands for them: the standard protocol's where there are two."""
    found = []
    for row in block.ordered_rows:
        if row.status == "ok" and row.x is None:
            run = next((one for one in row.runs if one.kind == "standard"), row.runs[0])
            if (runs / run.run_id / "manifest.json").exists():
                found.append(_Shown(row, run, RunStore(runs / run.run_id)))
    return found


def _records(one: _Shown) -> list[Mapping[str, Any]]:
    key = (one.run.view, one.run.segmenter)
    return [row for row in one.store.rows().values() if row["status"] == "ok" and (row["view"], row["segmenter"]) == key]


def _parts(shown: Sequence[_Shown]) -> tuple[dict[str, list[dict[str, Any]]], str, str]:
    """Numbers by class where images have several, else by word."""
    found: dict[str, list[dict[str, Any]]] = {}
    kind, metric = "word", DEFINITIONS["miou_dataset"].label
    for one in shown:
        rows = Rows.from_records(_records(one))
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

    def settle(self, sections: Sequence[Section]) -> None:
        """Put addresses of data into every gallery, or write the files that they name."""
        if sum(map(len, self.held.values())) > EMBED_BELOW:
            for address, content in self.held.items():
                write_atomically(self.folder / address, content)
            return
        inside = {
            address: f"data:image/webp;base64,{base64.b64encode(content).decode()}" for address, content in self.held.items()
        }
        for section in sections:
            for sample in section.gallery.samples:
                assert isinstance(sample, dict)
                sample["strip"] = inside[sample["strip"]]


def _gallery(
    block: Block, table: Results, shown: Sequence[_Shown], keeper: _Thumbnails, number: int, pictures: int | None
) -> Gallery:
    methods = _ranked(table, shown)
    pictured = [one for one in methods if _keeps_maps(one)]
    if not pictured:
        return Gallery()
    first = pictured[0]
    keys = [row["sample"] for row in _records(first)]
    if pictures is not None and len(keys) > pictures:
        keys = [keys[i * len(keys) // pictures] for i in range(pictures)]
    pictured = pictured[: METHODS_OF_MANY if len(keys) > MANY else METHODS]
    score = DEFINITIONS["miou_image"]
    scores = [
        dict(zip(r.samples, score.finish(score.statistics(r)), strict=True))
        for r in (Rows.from_records(_records(m)) for m in methods)
    ]
    samples = [
        {
            "key": printable(key),
            "words": [printable(w) for w, label in zip(task.concepts.names, task.concepts.labels, strict=True) if label],
            "scores": [_rounded(found.get(key)) for found in scores], "size": task.truth.shape[::-1],
            "strip": keeper.keep(f"{number}-{place}.webp", _strip(task, [_kept(one, key) for one in pictured])),
        }
        for place, (key, task) in enumerate(_tasks(first, keys))
    ]  # fmt: skip
    words = sorted({word for sample in samples for word in sample["words"]})
    return Gallery(tuple(m.row.name for m in methods), tuple(map(methods.index, pictured)), tuple(words), tuple(samples))


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(float(value), 3)


def _ranked(table: Results, shown: Sequence[_Shown]) -> list[_Shown]:
    """Methods, the best first by the first standard column with a mean IoU."""
    column = next((c.name for c in table.columns if c.kind == "standard" and "miou" in c.name), table.columns[0].name)
    methods = [one for one in shown if one.row.group == "methods"]
    return sorted(methods, key=lambda one: -(one.row.values[column].value if column in one.row.values else 0.0))


def _keeps_maps(one: _Shown) -> bool:
    return any(_kept(one, row["sample"]) is not None for row in _records(one)[:1])


def _kept(one: _Shown, key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Map and labels of a sample, None where the run kept none."""
    return one.maps.read(key, one.run.view, one.run.segmenter)


def _tasks(one: _Shown, keys: Sequence[str]) -> Iterator[tuple[str, Task]]:
    """Samples as the run's protocol sets them. None where the run's data are not on this machine: said once, in the log."""
    config = resolved(one.store.manifest()["config"])
    try:
        dataset, protocol = instantiate(config["dataset"], "dataset"), instantiate(config["protocol"], "protocol")
        for key in keys:
            task = protocol.prepare(dataset.read(key))
            if isinstance(task, Task):
                yield key, task
    except ConceptSegError as error:
        log.warning("no pictures of %s: %s", one.run.run_id, error)


def _strip(task: Task, kept: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> bytes:
    """WebP of tiles of one size side by side: the photo, the truth, and a map and a prediction of each of `kept`."""
    size = _tile_size(task.truth.shape)
    tiles = [
        _opaque(np.round(255 * task.image).astype(np.uint8), size),
        _cover((task.truth > 0) & (task.truth != 255), size, TRUTH),
    ]
    for one in kept:
        if one is None:
            tiles += [np.zeros((*size, 4), np.uint8)] * 2
        else:
            tiles += [_opaque(colour_map()[one[0]], size), _cover(one[1] > 0, size, PREDICTION)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(tiles, axis=1), "RGBA").save(buffer, "WEBP", quality=50, method=4)
    return buffer.getvalue()


def _tile_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width with the longest side at most SIDE, the width a whole number of blocks: the page stretches it back."""
    scale = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(shape[0] * scale)), BLOCK * max(1, round(shape[1] * scale / BLOCK))


def _opaque(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.dstack([np.asarray(image), np.full(size, 255, np.uint8)])


def _cover(inside: np.ndarray, size: tuple[int, int], colour: tuple[int, int, int]) -> np.ndarray:
    """One colour, see-through, where `inside`."""
    small = np.asarray(Image.fromarray(inside.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return np.array([*colour, COVER], np.uint8) * small[..., None]


# ---------------------------------------------------------------- runs


def _runs(table: Results, runs: Path) -> list[RunBehind]:
    import yaml

    rows: dict[str, list[str]] = {}
    for block in table.blocks:
        for row in block.ordered_rows:
            for run in row.runs:
                rows.setdefault(run.run_id, []).append(f"{block.name}, {row.name} ({run.view}, {run.segmenter})")
    found = []
    for run_id, names in rows.items():
        store = RunStore(runs / run_id)
        manifest = dict(store.manifest()) if (store.folder / "manifest.json").exists() else None
        config = yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True) if manifest else ""
        found.append(RunBehind(run_id, tuple(names), manifest, config))
    return found
