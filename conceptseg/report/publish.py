"""Publish a finished table to benchmarks/<table>/ and RESULTS.md, in digits that other machines reproduce."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from conceptseg.files import write_atomically
from conceptseg.report.digits import settled, values_of
from conceptseg.report.results import Results, load, save
from conceptseg.report.results_md import write


def publish(results: Results, folder: Path, benchmarks: Path, results_md: Path) -> list[str]:
    """Write a table that was computed into `folder` to benchmarks/<table>/ and to results_md, and say in lines what was written.

    Numbers are rounded (`rounded`), and a number that lies within its column's tolerance of the published one keeps the published
    digits (`settled`). Where no number moved, the published picture sheet is kept, unless the new one has another size.
    """
    place = benchmarks / results.table
    published = load(place / "results.json") if (place / "results.json").exists() else None
    sheet, old_sheet = folder / "sheet.png", place / "sheet.png"
    link = Path(os.path.relpath(old_sheet, results_md.parent)).as_posix() if sheet.exists() else None
    made, moved = settled(replace(results, sheet=None if link is None or link.startswith("..") else link), published)
    save(place / "results.json", made)
    written = [f"published: {place / 'results.json'}, {results_md}: {moved} of {len(values_of(made))} numbers moved"]
    if sheet.exists() and (moved or not old_sheet.exists() or _size(old_sheet) != _size(sheet)):
        write_atomically(old_sheet, sheet.read_bytes())
        written.append(f"published: {old_sheet}")
    elif sheet.exists():
        written.append(f"kept: {old_sheet}, since no number moved; delete it to have it replaced")
    write(results_md, benchmarks)
    return written


def _size(sheet: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(sheet) as picture:
        return picture.size
