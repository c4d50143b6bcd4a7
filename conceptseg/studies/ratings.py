"""Word attribution by part of speech, judged by people: sheets for raters, and what their scores say.

Every item is one word of one prompt: the image, the word's map over it, and a scale from 1 (bad) to 5 (excellent).
Source: Tang et al. 2023, arXiv:2210.04885, section 3 (14 most common tags of COCO, 200 words each, three raters
per item; means per part of speech).
"""

from __future__ import annotations

import base64
import html
import io
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from conceptseg.errors import DataError
from conceptseg.reading import read_rows
from conceptseg.studies.folders import Generation, generations
from conceptseg.studies.nouns import mean_and_half_width

SCALE = {1: "bad", 2: "poor", 3: "fair", 4: "good", 5: "excellent"}
FAIR = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One word to be judged."""

    id: str
    generation: str
    word: str
    tag: str


def choose_items(root: Path, tags: Mapping[tuple[str, str], str], per_tag: int, seed: int = 0) -> list[Item]:
    """Up to `per_tag` words of every tag, drawn at random; tags by (generation id, word). Raises DataError if none has a map."""
    by_tag: dict[str, list[Item]] = defaultdict(list)
    for one in generations(root):
        for word in one.maps():
            if (tag := tags.get((one.id, word))) is not None:
                by_tag[tag].append(Item(f"{one.id}/{word}", one.id, word, tag))
    if not by_tag:
        raise DataError(f"{root}: no (generation, word) of the tags has a heat map. Tags are lines of id<tab>word<tab>tag.")
    rng = random.Random(seed)
    return [item for tag in sorted(by_tag) for item in rng.sample(by_tag[tag], min(per_tag, len(by_tag[tag])))]


def assign(items: Sequence[Item], raters: int, per_item: int, seed: int = 0) -> list[list[Item]]:
    """Items of every rater: each item goes to `per_item` raters, loads differ by one at most, everyone's order is their own."""
    if not 1 <= per_item <= raters:
        raise DataError(f"{per_item} raters an item are wanted of {raters}: choose from 1 to {raters}.")
    rng = random.Random(seed)
    shuffled = rng.sample(list(items), len(items))
    shares: list[list[Item]] = [[] for _ in range(raters)]
    for number, item in enumerate(shuffled):
        for turn in range(per_item):
            shares[(number * per_item + turn) % raters].append(item)
    return [rng.sample(share, len(share)) for share in shares]


def write_sheet(root: Path, items: Sequence[Item], rater: str, file: Path) -> None:
    """One rater's sheet: a page that works without a network and saves the scores as a CSV file."""
    blocks = []
    for number, item in enumerate(items, 1):
        one = Generation(root / item.generation)
        image, held = one.image, one.maps()[item.word]
        choices = "".join(
            f'<label><input type="radio" name="{html.escape(item.id)}" value="{value}"> {value} {name}</label>'
            for value, name in SCALE.items()
        )
        blocks.append(
            f'<section data-item="{html.escape(item.id)}"><h2>{number}. <q>{html.escape(item.word)}</q></h2>'
            f"<p>{html.escape(one.prompt)}</p>{_picture(image)}{_picture(held.overlay(image))}<p>{choices}</p></section>"
        )
    file.write_text(_PAGE.format(rater=html.escape(rater), count=len(items), blocks="\n".join(blocks)), encoding="utf-8")


def _picture(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}" alt="">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Rating sheet of {rater}</title>
<style>body{{font:16px sans-serif;max-width:60em;margin:auto;padding:1em}}section{{border-top:1px solid #bbb}}
img{{height:256px;margin-right:8px;image-rendering:auto}}label{{margin-right:1em}}</style>
<h1>Does the coloured map show where the word is?</h1>
<p>Rater {rater}, {count} words. Left the image, right the map: red where the computer sees the word. Judge the map, not the
image; leave a word open if it has no place in a picture.</p>
{blocks}
<p><button onclick="save()">Save scores</button></p>
<script>
function save() {{
  const quoted = text => '"' + text.replaceAll('"', '""') + '"';
  const rows = ["item,rater,score"];
  for (const part of document.querySelectorAll("section")) {{
    const chosen = part.querySelector("input:checked");
    if (chosen) rows.push([quoted(part.dataset.item), quoted("{rater}"), chosen.value].join(","));
  }}
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.join("\\n") + "\\n"], {{type: "text/csv"}}));
  link.download = "scores-{rater}.csv";
  link.click();
}}
</script></html>
"""


def read_scores(files: Sequence[Path]) -> dict[str, dict[str, int]]:
    """Scores by item and rater from the CSV files that sheets save.

    Raises DataError for a score off the scale, and where a rater has given an item two scores.
    """
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for file in files:
        for line, row in read_rows(file, ("item", "rater", "score")):
            score = int(row["score"]) if row["score"].strip().isdecimal() else 0
            if score not in SCALE:
                raise DataError(f'{file}, line {line}: the score is "{row["score"]}"; wanted scores from 1 to 5.')
            if found[row["item"]].setdefault(row["rater"], score) != score:
                raise DataError(f"{file}, line {line}: {row['rater']} has judged {row['item']} before, with another score.")
    return dict(found)


def read_items(file: Path) -> list[Item]:
    """Items from the items.csv that the sheets came with. Raises DataError, also for an item that stands twice."""
    names = tuple(field.name for field in fields(Item))
    items = [Item(**{name: row[name] for name in names}) for _, row in read_rows(file, names)]
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f'{file}: the item "{item.id}" stands twice; it would count twice.')
        seen.add(item.id)
    return items


def ordinal_alpha(ratings: Sequence[Sequence[int]]) -> float | None:
    """Krippendorff's alpha for ordinal scores: 1 is full agreement, 0 is chance; ratings of each item, of any number.

    None where nothing varies or no item has two ratings. Source: Krippendorff 2004, Content Analysis, chapter 11 (ordinal).

    >>> ordinal_alpha([[1, 1], [3, 3], [5, 5]])
    1.0
    """
    pairs: dict[tuple[int, int], float] = defaultdict(float)
    for item in ratings:
        for i, a in enumerate(item):
            for j, b in enumerate(item):
                if i != j:
                    pairs[a, b] += 1 / (len(item) - 1)
    values = sorted({a for a, _ in pairs})
    totals = {a: sum(pairs[a, b] for b in values) for a in values}
    n = sum(totals.values())

    def distance(a: int, b: int) -> float:
        low, high = sorted((a, b))
        return (sum(totals[g] for g in values if low <= g <= high) - (totals[a] + totals[b]) / 2) ** 2

    observed = sum(pairs[a, b] * distance(a, b) for a in values for b in values)
    expected = sum(totals[a] * totals[b] * distance(a, b) for a in values for b in values)
    return None if expected == 0 else 1 - (n - 1) * observed / expected


def opinion_scores(items: Sequence[Item], scores: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Per tag: mean opinion score (over items, of their means) with interval, share of items fair or better, agreement."""
    table: dict[str, Any] = {"tags": {}}
    for tag in [*sorted({item.tag for item in items}), None]:
        chosen = [list(scores[item.id].values()) for item in items if tag in (None, item.tag) and scores.get(item.id)]
        means = np.array([float(np.mean(one)) for one in chosen])
        mean, half = mean_and_half_width(means)
        row = {
            "items": len(chosen), "mean": mean, "half_width": half, "alpha": ordinal_alpha(chosen),
            "fair_or_better": float((means >= FAIR).mean()) if len(means) else None,
        }  # fmt: skip
        if tag is None:
            table["all"] = row
        else:
            table["tags"][tag] = row
    return table
