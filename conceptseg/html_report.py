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

from conceptseg.config import instantiate
from conceptseg.errors import ConceptSegError
from conceptseg.metrics.breakdowns import by_class, by_word
from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.report.html import Gallery, RunBehind, Section, charts_of, render
from conceptseg.report.panels import colour_map
from conceptseg.report.results import Behind, Block, Results, Row, write_atomically
from conceptseg.store.maps import MapKeeper
from conceptseg.store.run import RunStore
from conceptseg.store.schema import RowKey
from conceptseg.types import Task

log = logging.getLogger(__name__)

EMBED_BELOW = 4_000_000
"""Bytes of pictures that are put into the page itself; more are linked beside it."""
SIDE = 104
"""Longest side of a thumbnail in pixels."""
METHODS, METHODS_OF_MANY, MANY = 4, 2, 1500
"""Methods with pictures in a block, the best ones; fewer where a block has many images, so that the folder stays below 30 MB."""
RESAMPLES = 1000
"""Behind the intervals of words and classes, which are many."""
TRUTH, PREDICTION = (0, 200, 130), (240, 120, 0)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A row with its run folder."""

    row: Row
    run: Behind
    store: RunStore

    @property
    def maps(self) -> MapKeeper:
        return MapKeeper(self.store.folder / "maps", frozenset())


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
            {"name": p.name, "n": p.n, "value": v.value, "low": _number(v.low), "high": _number(v.high)}
            for p in parts
            for v in p.values.values()
        ]
    return found, kind, metric


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


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
            address: f"data:image/{address.rpartition('.')[2]};base64,{base64.b64encode(content).decode()}"
            for address, content in self.held.items()
        }
        for section in sections:
            for sample in section.gallery.samples:
                assert isinstance(sample, dict)
                for key in ("photo", "truth"):
                    sample[key] = inside[sample[key]]
                for key in ("maps", "predictions"):
                    sample[key] = [address and inside[address] for address in sample[key]]


def _gallery(
    block: Block, table: Results, shown: Sequence[_Shown], keeper: _Thumbnails, number: int, pictures: int | None
) -> Gallery:
    methods = _pictured(table, shown)
    if not methods:
        return Gallery()
    if min(methods[0].row.n, pictures or methods[0].row.n) > MANY:
        methods = methods[:METHODS_OF_MANY]
    held = [one.store.rows() for one in methods]
    keys = [
        key
        for key in _keys(methods[0])
        if any(RowKey(key, m.run.view, m.run.segmenter) in h for m, h in zip(methods, held, strict=True))
    ]
    if pictures is not None and len(keys) > pictures:
        keys = [keys[i * len(keys) // pictures] for i in range(pictures)]
    score = DEFINITIONS["miou_image"]
    scores = [
        dict(zip(r.samples, score.finish(score.statistics(r)), strict=True))
        for r in (Rows.from_records(_records(m)) for m in methods)
    ]
    samples: list[dict[str, Any]] = []
    for place, (key, task) in enumerate(_tasks(methods[0], keys)):
        stem = f"{number}-{place}"
        size = _fitted(task.truth.shape)
        maps, predictions = [], []
        for which, one in enumerate(methods):
            kept = one.maps.read(key, one.run.view, one.run.segmenter)
            maps.append(kept and keeper.keep(f"{stem}m{which}.webp", _webp(colour_map()[kept[0]], 60, _fitted(kept[0].shape))))
            predictions.append(kept and keeper.keep(f"{stem}p{which}.png", _mask(kept[1] > 0, size, PREDICTION)))
        photo = np.round(255 * task.image).astype(np.uint8)
        truth = (task.truth > 0) & (task.truth != 255)
        samples.append(
            {
                "key": key, "words": [w for w, label in zip(task.concepts.names, task.concepts.labels, strict=True) if label],
                "scores": [_rounded(found.get(key)) for found in scores],
                "photo": keeper.keep(f"{stem}.webp", _webp(photo, 55, size)),
                "truth": keeper.keep(f"{stem}t.png", _mask(truth, size, TRUTH)), "maps": maps, "predictions": predictions,
            }
        )  # fmt: skip
    words = sorted({word for sample in samples for word in sample["words"]})
    return Gallery(tuple(m.row.name for m in methods), tuple(words), tuple(samples))


def _rounded(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else round(float(value), 4)


def _pictured(table: Results, shown: Sequence[_Shown]) -> list[_Shown]:
    """The best methods that kept maps, by the first standard column they have."""
    column = next((c.name for c in table.columns if c.kind == "standard" and "miou" in c.name), table.columns[0].name)
    kept = [
        one for one in shown
        if one.row.group == "methods" and (one.store.folder / "maps").is_dir()
        and any(one.maps.read(r["sample"], one.run.view, one.run.segmenter) for r in _records(one)[:1])
    ]  # fmt: skip
    return sorted(kept, key=lambda one: -(one.row.values[column].value if column in one.row.values else 0.0))[:METHODS]


def _keys(one: _Shown) -> list[str]:
    return [row["sample"] for row in _records(one)]


def _tasks(one: _Shown, keys: Sequence[str]) -> Iterator[tuple[str, Task]]:
    """Samples as the run's protocol sets them. None where the run's data are not on this machine: said once, in the log."""
    config = one.store.manifest()["config"]
    try:
        dataset, protocol = instantiate(config["dataset"], "dataset"), instantiate(config["protocol"], "protocol")
        for key in keys:
            task = protocol.prepare(dataset.read(key))
            if isinstance(task, Task):
                yield key, task
    except ConceptSegError as error:
        log.warning("no pictures of %s: %s", one.run.run_id, error)


def _fitted(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width with the longest side at most SIDE."""
    scale = min(1.0, SIDE / max(shape[:2]))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _webp(picture: np.ndarray, quality: int, size: tuple[int, int]) -> bytes:
    image = Image.fromarray(picture)
    if size != picture.shape[:2]:
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _mask(inside: np.ndarray, size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    """A see-through PNG with one colour where `inside`."""
    small = np.asarray(Image.fromarray(inside.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.NEAREST))
    image = Image.fromarray(small, "P")
    image.putpalette([0, 0, 0, *colour])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 140]), bits=1, optimize=True)
    return buffer.getvalue()


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
