"""conceptseg-study: the DAAM paper's experiments on any Stable Diffusion checkpoint, or on the lab's ("lab:sd")."""

from __future__ import annotations

import argparse
import csv
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conceptseg import __version__
from conceptseg.errors import DataError, guarded
from conceptseg.logs import quiet_libraries
from conceptseg.reading import read_lines

log = logging.getLogger(__name__)


@guarded
def main() -> int:
    """conceptseg-study <name>: noun segmentation, word attribution, head-dependent interactions, entanglement of words."""
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(study(), indent=1, ensure_ascii=False))
    return 0


def study(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the study of a command line (by default the process's own), and return the printed numbers."""
    parser = argparse.ArgumentParser(prog="conceptseg-study", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="study", required=True, metavar="study")
    for add in (_generate, _nouns, _annotate, _sheets, _ratings, _interactions, _cohyponyms, _adjectives, _optimise_token):
        add(commands)
    said = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], dict[str, Any]] = said.run
    return run(said)


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], dict[str, Any]]) -> Any:
    command = commands.add_parser(name, help=(run.__doc__ or "").split(".")[0], description=run.__doc__)
    command.set_defaults(run=run)
    return command


def _generation(command: Any, seeded: bool = True) -> None:
    command.add_argument("--model", default="lab:sd", help='a folder in diffusers layout, "owner/name", or "lab:<name>"')
    command.add_argument("--revision", default=None, help="commit of a hub repository; needed for one")
    command.add_argument("--device", default="cpu")
    command.add_argument("--dtype", default="float32")
    command.add_argument("--steps", type=int, default=30, help="denoising steps (the paper's: 30)")
    command.add_argument("--guidance", type=float, default=7.5)
    command.add_argument("--size", type=int, nargs=2, default=None, metavar=("HEIGHT", "WIDTH"))
    if seeded:
        command.add_argument("--seed", type=int, default=0)


def _generator(said: argparse.Namespace) -> Any:
    from conceptseg.backbones.unets.unet import UNetBackbone
    from conceptseg.studies.generator import Generator

    backbone = UNetBackbone(said.model, said.revision, said.dtype, said.device)
    return Generator(backbone, said.steps, said.guidance, None if said.size is None else (said.size[0], said.size[1]))


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]) if rows else ["none"])
        writer.writeheader()
        writer.writerows(rows)


def _vocabulary(said: argparse.Namespace) -> Sequence[str]:
    from conceptseg.studies.nouns import COCO80

    if said.nouns is None:
        return COCO80
    return [line for line in read_lines(said.nouns) if line]


# ---------------------------------------------------------------- noun segmentation


def _generate(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Build a set from captions. An image per caption with the heat maps of its nouns; goes on where it stopped."""
        from conceptseg.studies.nouns import build, read_captions
        from conceptseg.studies.pictures import draw_rows

        made = build(_generator(said), read_captions(said.captions), said.root, _vocabulary(said), said.seed)
        rows = []
        for one in made[:6]:
            maps = one.maps()
            rows.append([(one.prompt, one.image), *((word, held.overlay(one.image)) for word, held in maps.items())])
        draw_rows(said.root / "sheet.png", rows)
        return {"generations": len(made), "nouns": sum(len(one.maps()) for one in made), "root": str(said.root)}

    command = _command(commands, "generate", run)
    command.add_argument("captions", type=Path, help='text file: a caption a line, or "id<tab>caption"')
    command.add_argument("root", type=Path, help="folder of the generations")
    command.add_argument("--nouns", type=Path, default=None, help="words to keep maps of, one per line (default: COCO's 80)")
    _generation(command)


def _nouns(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Noun segmentation. Truth masks against DAAM's masks at several cuts; mIoU over (image, noun) pairs with intervals."""
        from conceptseg.studies.nouns import as_rows, score, summary

        rows = score(said.root, said.taus, said.missing)
        _write_rows(said.root / "noun_pairs.csv", as_rows(rows))
        return {"cuts": summary(rows, _vocabulary(said)), "missing": said.missing, "rows": str(said.root / "noun_pairs.csv")}

    command = _command(commands, "nouns", run)
    command.add_argument("root", type=Path, help="folder of generations with <word>.gt.png masks")
    command.add_argument("--taus", type=float, nargs="+", default=[0.3, 0.4, 0.5])
    command.add_argument("--missing", choices=["zero", "skip"], default="zero", help="IoU of a noun without a prediction")
    command.add_argument("--nouns", type=Path, default=None, help="vocabulary of mIoU80, one per line (default: COCO's 80)")


def _annotate(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Annotation. Writes COCO JSON with DAAM's masks as proposals, or reads one back as <word>.gt.png masks."""
        from conceptseg.studies.annotations import export_coco, import_coco

        if said.back:
            return {"masks": import_coco(said.root, said.file)}
        body = export_coco(said.root, said.file, said.threshold, not said.bare)
        return {"images": len(body["images"]), "categories": len(body["categories"]), "proposals": len(body["annotations"])}

    command = _command(commands, "annotate", run)
    command.add_argument("root", type=Path)
    command.add_argument("file", type=Path, help="COCO JSON")
    command.add_argument("--back", action="store_true", help="read the file and write ground-truth masks")
    command.add_argument("--threshold", type=float, default=0.4)
    command.add_argument("--bare", action="store_true", help="without proposals, which may bias annotators")


# ---------------------------------------------------------------- word attribution


def _sheets(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Rating sheets. One HTML page a rater, with image and map of every word, and items.csv for the aggregation."""
        from conceptseg.studies.ratings import assign, choose_items, write_sheet

        tags: dict[tuple[str, str], str] = {}
        for number, line in enumerate(read_lines(said.tags), 1):
            parts = line.split("\t")
            if line and len(parts) != 3:
                raise DataError(f"{said.tags}, line {number}: wanted id<tab>word<tab>tag, found {parts}.")
            if line and tags.setdefault((parts[0], parts[1]), parts[2]) != parts[2]:
                raise DataError(f'{said.tags}, line {number}: "{parts[1]}" of {parts[0]} has another tag above.')
        items = choose_items(said.root, tags, said.per_tag, said.seed)
        said.out.mkdir(parents=True, exist_ok=True)
        _write_rows(said.out / "items.csv", [asdict(item) for item in items])
        for number, share in enumerate(assign(items, said.raters, said.per_item, said.seed), 1):
            write_sheet(said.root, share, f"r{number}", said.out / f"rater-{number}.html")
        return {"items": len(items), "sheets": said.raters, "out": str(said.out)}

    command = _command(commands, "sheets", run)
    command.add_argument("root", type=Path, help="folder of generations")
    command.add_argument("tags", type=Path, help="lines of id<tab>word<tab>part of speech")
    command.add_argument("out", type=Path)
    command.add_argument("--per-tag", type=int, default=200)
    command.add_argument("--raters", type=int, default=3)
    command.add_argument("--per-item", type=int, default=3, help="raters per item")
    command.add_argument("--seed", type=int, default=0)


def _ratings(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Ratings. Mean opinion scores per part of speech with intervals, share of fair or better, and agreement."""
        from conceptseg.studies.ratings import opinion_scores, read_items, read_scores

        return opinion_scores(read_items(said.items), read_scores(said.scores))

    command = _command(commands, "ratings", run)
    command.add_argument("items", type=Path, help="items.csv of the sheets")
    command.add_argument("scores", type=Path, nargs="+", help="CSV files that raters saved")


# ---------------------------------------------------------------- syntax and semantics


def _interactions(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Head-dependent interactions. Generates every parsed prompt and tabulates overlaps of related words' maps."""
        from conceptseg.studies.dependencies import (
            as_rows,
            map_of,
            pair_rows,
            parse_with_spacy,
            read_conllu,
            relation_table,
        )
        from conceptseg.studies.nouns import read_captions
        from conceptseg.studies.pictures import draw_rows

        if said.spacy:
            sentences = parse_with_spacy(read_captions(said.prompts), said.spacy)
        else:
            sentences = read_conllu(said.prompts, said.enhanced)
        generator = _generator(said)
        rows: list[Any] = []
        pictures: list[list[Any]] = []
        for number, sentence in enumerate(sentences):
            made = generator.generate(sentence.text, said.seed + number)
            rows += pair_rows(sentence, made.maps, said.threshold, said.absolute, said.soft, said.seed)
            if len(pictures) < 6:
                maps = [(f"{word.form}: {word.relation}", map_of(made.maps, word)) for word in sentence.words[:7]]
                shown = [(title, held.overlay(made.image)) for title, held in maps]
                pictures.append([(sentence.text, made.image), *shown])
        said.out.mkdir(parents=True, exist_ok=True)
        _write_rows(said.out / "pairs.csv", as_rows(rows))
        draw_rows(said.out / "sheet.png", pictures)
        return {
            "prompts": len(sentences),
            "relations": relation_table(rows, said.least, said.top),
            "rows": str(said.out / "pairs.csv"),
        }

    command = _command(commands, "interactions", run)
    command.add_argument("prompts", type=Path, help="CoNLL-U with # text, or captions with --spacy")
    command.add_argument("out", type=Path)
    command.add_argument("--spacy", default=None, metavar="MODEL", help="parse captions with this installed spaCy model")
    command.add_argument("--enhanced", action="store_true", help="relations from CoNLL-U's DEPS column")
    command.add_argument("--threshold", type=float, default=0.4, help="share of a map's greatest value")
    command.add_argument("--absolute", action="store_true", help="threshold is a value (the original's notebook: 0.15)")
    command.add_argument("--soft", action="store_true", help="products of maps in 0..1 instead of sets")
    command.add_argument("--least", type=int, default=1, help="least number of pairs of a printed relation")
    command.add_argument("--top", type=int, default=10, help="number of printed relations, most frequent first")
    _generation(command)


def _cohyponyms(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Cohyponym entanglement. Two nouns of one kind against two of different kinds: overlap of maps, presence of both."""
        from conceptseg.studies.entanglement import (
            GROUPS,
            LAB_GROUPS,
            cohyponym_table,
            noun_overlap,
            noun_pairs,
            read_presence,
        )
        from conceptseg.studies.folders import write_generation
        from conceptseg.studies.pictures import draw_rows

        judged = None if said.presence is None else read_presence(said.presence)
        pairs = noun_pairs(said.count, LAB_GROUPS if said.lab_words else GROUPS, said.seed, said.seed, plain=said.lab_words)
        generator = _generator(said)
        overlap: dict[str, float] = {}
        pictures: list[list[Any]] = []
        for pair in pairs:
            made = generator.generate(pair.prompt, pair.seed)
            maps = {word: made.maps.word_map(word) for word in (pair.first, pair.second)}
            overlap[pair.id] = noun_overlap(made, pair, said.threshold)
            write_generation(said.out, pair.id, made, maps)
            if len(pictures) < 8:
                shown = [(word, one.overlay(made.image)) for word, one in maps.items()]
                kinds = "one kind" if pair.same_kind else "two kinds"
                pictures.append([(f"{pair.prompt}, {kinds}: IoU of maps {overlap[pair.id]:.2f}", made.image), *shown])
        draw_rows(said.out / "sheet.png", pictures)
        blank = {"first": "", "second": ""}
        rows = [{"id": p.id, "first_word": p.first, "second_word": p.second, "iou": overlap[p.id], **blank} for p in pairs]
        _write_rows(said.out / "pairs.csv", rows)
        return {"table": cohyponym_table(pairs, overlap, judged), "rows": str(said.out / "pairs.csv")}

    command = _command(commands, "cohyponyms", run)
    command.add_argument("out", type=Path)
    command.add_argument("--count", type=int, default=100)
    command.add_argument("--lab-words", action="store_true", help="nouns of the drawn world instead of COCO's")
    command.add_argument("--threshold", type=float, default=0.4)
    command.add_argument("--presence", type=Path, default=None, help="pairs.csv with first and second filled in: 1 seen, 0 not")
    _generation(command)


def _adjectives(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Adjectival entanglement. One seed, several adjectives, freely and with the first one's attention replayed."""
        from conceptseg.studies.entanglement import adjective_rows, image_change
        from conceptseg.studies.pictures import draw_rows

        rows = adjective_rows(_generator(said), said.template, said.noun, said.adjectives, said.seed, said.threshold)
        said.out.mkdir(parents=True, exist_ok=True)
        draw_rows(
            said.out / "sheet.png",
            [
                [
                    (f"{row.adjective}, free", row.free.image),
                    (f"map of {row.adjective}", row.free.maps.word_map(row.adjective).overlay(row.free.image)),
                    (f"map of {said.noun}", row.free.maps.word_map(said.noun).overlay(row.free.image)),
                    (f"{row.adjective}, attention of {rows[0].adjective}", row.replayed.image),
                ]
                for row in rows
            ],
        )
        table = [
            {
                "adjective": row.adjective, "mass_outside_noun": row.outside,
                "change_free": image_change(rows[0].free.image, row.free.image),
                "change_replayed": image_change(rows[0].free.image, row.replayed.image),
            }
            for row in rows
        ]  # fmt: skip
        _write_rows(said.out / "adjectives.csv", table)
        return {"template": said.template, "adjectives": table}

    command = _command(commands, "adjectives", run)
    command.add_argument("template", help='for example "a {adjective} car driving down the streets"')
    command.add_argument("noun", help="the noun that the adjective goes with")
    command.add_argument("adjectives", nargs="+")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--threshold", type=float, default=0.4)
    _generation(command)


# ---------------------------------------------------------------- token optimisation


def _optimise_token(commands: Any) -> None:
    def run(said: argparse.Namespace) -> dict[str, Any]:
        """Token optimisation of OVAM. Makes an annotated image again and fits a word's token to its mask, for extractor=ovam."""
        from conceptseg.backbones.unets.optimised_tokens import write_tokens
        from conceptseg.studies.folders import Generation
        from conceptseg.studies.pictures import draw_rows, grey
        from conceptseg.studies.token_optimisation import annotated, judged, optimise_token

        generator, one = _generator(said), Generation(said.root / said.id)
        record, start, truth = annotated(generator, one, said.word, said.row)
        found = optimise_token(record, start, truth, said.epochs, said.rate)
        before, after = judged(record, start, truth, said.word, 0.4), judged(record, found.states, truth, said.word, 0.8)
        write_tokens(said.file, {said.word: found.states}, generator.backbone.checkpoint.identity())
        shown = [("before", before), ("optimised", after)]
        pictures = [(f"{said.word}, {name}: IoU {iou:.2f}", held.overlay(one.image)) for name, (held, iou) in shown]
        draw_rows(said.file.with_suffix(".png"), [[(one.prompt, one.image), ("annotation", grey(truth.numpy())), *pictures]])
        return {
            "word": said.word, "iou_before": before[1], "iou_optimised": after[1], "loss_before": found.losses[0],
            "loss_optimised": min(found.losses), "file": str(said.file),
        }  # fmt: skip

    command = _command(commands, "optimise-token", run)
    command.add_argument("root", type=Path, help="folder of generations with <word>.gt.png masks")
    command.add_argument("id", help="the annotated generation; its prompt and seed are used again")
    command.add_argument("word", help="word whose token is optimised")
    command.add_argument("file", type=Path, help="safetensors file; other words in it stay")
    command.add_argument("--epochs", type=int, default=800)
    command.add_argument("--rate", type=float, default=100.0, help="learning rate; times 0.7 every 120 epochs")
    command.add_argument(
        "--row", choices=["unconditional", "conditional"], default="unconditional", help="whose queries are read"
    )
    _generation(command, seeded=False)
