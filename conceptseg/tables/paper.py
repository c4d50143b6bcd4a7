"""A paper's table, three ways side by side: as printed, by the released protocol, and by the standard one.

Rows whose weights or data are not on this machine are not run; they say what they need and by which command they are had.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from conceptseg import __version__
from conceptseg.backbones.base import Checkpoint
from conceptseg.backbones.repositories import missing_files, repository_of
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.evaluation.assemble import Evaluation
from conceptseg.evaluation.readings import Reading, interval_text
from conceptseg.evaluation.weights import checkpoints
from conceptseg.given_names import GivenNames
from conceptseg.metrics.definitions import definition_of
from conceptseg.report.blocks import Behind, Block, TableRow
from conceptseg.report.columns import Column, Value
from conceptseg.report.quoted import Claim, load_claim, shipped
from conceptseg.report.results import Results
from conceptseg.tables.pictures import draw_sheet
from conceptseg.tables.row import COSTS, Compose, Done, Evaluations, chosen, costs_of, declared, value_of
from conceptseg.tables.sheet import PaperBlock, PaperRow, PaperTable, PerProtocol, Protocol

MARKS = {"released_miou_from_accuracy": "†", "unknown": "?"}
"""Marks of quoted numbers that do not obey the definition in their column heading."""
NOT_VERIFIED = "*"
LEGEND = (
    "Quoted numbers: † is acc/(2-acc), never below the mean IoU; ? obeys no definition that is known; * was not seen in its "
    "source but in notes of third parties or from memory. The three groups of columns are never to be subtracted."
)


@dataclass(frozen=True, slots=True)
class _Filling:
    """State that all rows of a table share while they are computed."""

    table: PaperTable
    claim: Claim
    evaluations: Evaluations


def compute_paper_table(
    name: str, table: PaperTable, compose: Compose, extra: Sequence[str], folder: Path, command: str
) -> Results:
    """Compute what can be computed here, quote what is printed, and say what the rest needs."""
    report = compose([])["report"]
    claim, columns = load_claim(shipped(table.claim)), columns_of_paper(table, report)
    filling = _Filling(table, claim, Evaluations(compose, extra))
    filling.evaluations.plan(
        setting.config
        for block in table.blocks
        for row in block.rows
        for setting in _settings_of(row, block, filling)
        if not setting.needs
    )
    pictures: list[tuple[str, Evaluation, str, str]] = []
    blocks = []
    for block in table.blocks:
        rows, protocols = [], []
        for row in block.rows:
            made, found, labels = _rows_of(row, block, filling)
            if table.protocol_column:
                made = [replace(one, protocol=" and ".join(dict.fromkeys(labels)) or "none") for one in made]
            rows += made
            protocols += labels
            report = found[0][1].config["report"] if found else report
            if row.picture:
                pictures += [(row.name, e, r.view, r.segmenter) for kind, e, r in found if kind == "standard" and r.n][:1]
        data = "drawn scenes of split val, in place of " + block.data if table.on_lab else block.data
        label = " and ".join(dict.fromkeys(protocols))
        blocks.append(Block(block.name, data, label, block.text, tuple(rows), block.axis))
    sheet = draw_sheet(folder / "sheet.png", pictures, report["pictures"]) if pictures else None
    notes = [LEGEND, *_quoted_notes(table, claim), *table.notes]
    if table.on_lab:
        notes.insert(0, "Numbers of provenance lab are of tiny models on drawn scenes: do not compare them with quoted ones.")
    return Results(
        name, table.title, command, __version__, columns, tuple(blocks), tuple(notes),
        interval_text(report), None if sheet is None or sheet.is_absolute() or ".." in sheet.parts else sheet.as_posix(),
    )  # fmt: skip


def columns_of_paper(table: PaperTable, report: Mapping[str, Any]) -> tuple[Column, ...]:
    """Columns of a paper's table. Raises ConfigError for one that its claim does not quote, or a metric that is not defined."""
    claim, found = load_claim(shipped(table.claim)), []
    cites = "; ".join(dict.fromkeys(row.source.cite for row in claim.rows))
    for name in table.quoted:
        if name not in claim.columns:
            raise ConfigError(f'table.quoted: {claim.name} has no column "{name}". {did_you_mean(name, claim.columns)}')
        column = claim.columns[name]
        found.append(Column(f"quoted/{name}", column.label, True, column.text, cites, "quoted", 2))
    for kind, part in table.parts.items():
        for name in part.columns:
            d = definition_of(name, f"table.{kind}.columns")
            label = d.label.removeprefix("released ")  # its group says so
            found.append(Column(f"{kind}/{name}", label, d.percent, d.text, d.source, kind))
    return (*found, *(COSTS if report["costs"] else ()))


# ---------------------------------------------------------------- one row


def _rows_of(
    row: PaperRow, block: PaperBlock, filling: _Filling
) -> tuple[list[TableRow], list[tuple[Protocol, Evaluation, Reading]], list[str]]:
    """A row (several if each of its views is a point of a curve), what was computed for it, and its protocols."""
    table, evaluations = filling.table, filling.evaluations
    quotes = _quotes(row, block, filling)
    if table.on_lab and row.lab and row.lab.note:
        row = replace(row, note=_notes(row, row.lab.note))
    if not _has_settings(row, table):
        why = "no model of the lab does this" if table.on_lab and not row.needs else ""
        known = _with_quoted_names("", row, filling.claim) or ("not known" if table.protocol_column else "")
        return [replace(_not_run(row, None, quotes, _notes(row, why), [] if why else [row.needs]), names=known)], [], []
    found: list[tuple[Protocol, Evaluation, Reading]] = []
    finished: dict[Protocol, Done] = {}
    labels: list[str] = []
    wants: list[tuple[list[str], str]] = []
    config: dict[str, Any] = {}
    asked = _settings_of(row, block, filling)
    for kind, config, needs, command in asked:
        labels.append(_protocol_label(config["protocol"]))
        if needs:
            wants.append((needs, command))
            continue
        metrics = [name for setting in asked for name in table.parts[setting.kind].columns]
        finished[kind] = evaluations.carried_out(config, metrics, f"{row.name} ({kind})")
        reading = chosen(finished[kind], _under(row.view, kind), _segmenter(row, table, kind), row.name)
        found.append((kind, finished[kind].evaluation, reading))
    names = _with_quoted_names(" and ".join(dict.fromkeys(_names_label(setting.config) for setting in asked)), row, filling.claim)
    if not found:
        return [replace(_not_run(row, config, quotes, _notes(row), *wants[0]), names=names)], [], labels
    if row.each_view:
        return _points(row, table, finished), found, labels
    computed = _run(row, found, quotes, table)
    return [computed if computed.names == "none" else replace(computed, names=names)], found, labels


def _protocol_label(protocol: Mapping[str, Any]) -> str:
    """Name and version, and the windows in which images are shown; the names that are given have a column."""
    windows = f", windows of {protocol['window']}, stride {protocol['window_stride']}" if protocol.get("window") else ""
    return f"{protocol['name']} v{protocol['version']}{windows}"


def _names_label(config: Mapping[str, Any]) -> str:
    """The rule by which a row's protocol gives names."""
    protocol = config["protocol"]
    settings = {key: protocol.get(key) for key in ("names", "names_total", "names_seed", "names_file")}
    given = GivenNames(
        settings["names"] or "truth", settings["names_total"] or 0, settings["names_seed"] or 0, settings["names_file"]
    )
    return given.label


def _with_quoted_names(names: str, row: PaperRow, claim: Claim) -> str:
    """The names that are given here, and those that the quoted numbers were given where they are others."""
    quoted = claim.row(row.quoted).names if row.quoted is not None else ""
    if not names or quoted in ("", names):
        return names or quoted
    return f"{names} (quoted: {quoted})"


class _Setting(NamedTuple):
    """A row under one protocol."""

    kind: Protocol
    config: dict[str, Any]
    needs: list[str]
    """Weights and data that this machine lacks for it."""
    command: str
    """Runs it once that is there."""


def _has_settings(row: PaperRow, table: PaperTable) -> bool:
    """Whether the row can be run on the table's backbones."""
    return row.overrides is not None and (row.lab is not None if table.on_lab else not row.needs)


def _settings_of(row: PaperRow, block: PaperBlock, filling: _Filling) -> list[_Setting]:
    """A row under each of its protocols; nothing for one that can't be run."""
    table, evaluations, found = filling.table, filling.evaluations, []
    for kind in table.parts if _has_settings(row, table) else ():
        if kind in row.kinds:
            overrides = overrides_of(row, block, table, kind)
            config = evaluations.config(overrides)
            found.append(_Setting(kind, config, *_needs(config, row, overrides, evaluations.extra)))
    return found


def overrides_of(row: PaperRow, block: PaperBlock, table: PaperTable, kind: Protocol) -> list[str]:
    """Return the command-line overrides of one row under one protocol. The later of two settings of one key wins."""
    listed = [*block.overrides, *table.parts[kind].overrides, *(row.overrides or ()), *row.of(kind)]
    if table.on_lab:
        listed += [*table.lab, *(row.lab.under(kind) if row.lab else ())]
    return list({override.partition("=")[0]: override for override in listed}.values())


def _settings(extra: Sequence[str]) -> list[str]:
    return [o for o in extra if not o.startswith(("runtime.", "report."))]


def _under(setting: str | PerProtocol | None, kind: Protocol) -> str | None:
    """A row's setting, which may differ between the protocols."""
    return setting.under(kind) if isinstance(setting, PerProtocol) else setting


def _segmenter(row: PaperRow, table: PaperTable, kind: Protocol) -> str:
    return _under(row.segmenter, kind) or table.parts[kind].segmenter


def _quotes(row: PaperRow, block: PaperBlock, filling: _Filling) -> dict[str, Value]:
    """The numbers that are quoted for a row of a block, by column."""
    table = filling.table
    if row.quoted is None or not table.quoted:
        return {}
    quoted, found = filling.claim.row(row.quoted), {}
    for name in block.quoted or table.quoted:
        if name in quoted.values:
            mark = MARKS.get(quoted.obeys[name], "") + ("" if quoted.verified else NOT_VERIFIED)
            found[f"quoted/{name}"] = Value(quoted.values[name] / 100, None, None, None, mark)
    return found


def _not_run(
    row: PaperRow, config: Mapping[str, Any] | None, quoted: Mapping[str, Value], note: str, needs: Sequence[str],
    command: str = "",
) -> TableRow:  # fmt: skip
    backbone = config["extractor"].get("backbone") or {} if config else {}
    return TableRow(
        name=row.name, group=row.group, extractor=_name_of(config), backbone=backbone.get("path"),
        provenance="control" if row.group == "controls" else "weights", run_id="", view="", segmenter="", n=0, excluded=0,
        failed=0, values=quoted, status="not run", note=note, needs=tuple(needs), command=command,
    )  # fmt: skip


def _notes(row: PaperRow, first: str = "") -> str:
    return ". ".join(part.rstrip(".") for part in (first, row.note) if part)


def _quoted_notes(table: PaperTable, claim: Claim) -> list[str]:
    """Return the notes on quoted rows. Rows that share a note are listed together."""
    shown = {row.quoted for block in table.blocks for row in block.rows}
    grouped: dict[str, list[str]] = {}
    for row in claim.rows:
        if row.note:
            grouped.setdefault(row.note, []).append(row.row if row.row in shown else f"{row.row} (not a row here)")
    return [f"Quoted, {', '.join(names)}: {note}" for note, names in grouped.items()]


def _name_of(config: Mapping[str, Any] | None) -> str:
    """The extractor's class; empty where this version has none for the row."""
    return str(config["extractor"]["_target_"]).rpartition(".")[2] if config else ""


def _run(
    row: PaperRow, found: Sequence[tuple[Protocol, Evaluation, Reading]], quotes: Mapping[str, Value], table: PaperTable
) -> TableRow:
    found = sorted(found, key=lambda one: not one[2].n)  # a protocol under which every sample failed stands last
    _, evaluation, reading = found[0]
    values = {**quotes, **costs_of(evaluation)}
    for which, _, one in found:
        values |= {f"{which}/{m}": value_of(i) for m, i in one.values.items() if m in table.parts[which].columns}
    also = tuple(
        Behind(which, e.protocol.label, e.run_id, r.view, r.segmenter, r.n, r.excluded, r.failed) for which, e, r in found[1:]
    )
    late = f"{reading.waiting} samples are not computed yet" if reading.waiting else ""
    return TableRow(
        name=row.name, group=row.group, extractor=_name_of(evaluation.config),
        backbone=_backbone(evaluation), provenance=evaluation.extractor.provenance, run_id=evaluation.run_id,
        view=reading.view, segmenter=reading.segmenter, n=reading.n, excluded=reading.excluded, failed=reading.failed,
        values=values, status="ok" if reading.n else "failed", note=_notes(row, late), also=also,
        **declared(evaluation),
    )  # fmt: skip


def _points(row: PaperRow, table: PaperTable, finished: Mapping[Protocol, Done]) -> list[TableRow]:
    """A row for every view that stands at one layer or one timestep."""
    views = next(iter(finished.values())).evaluation.views
    several = len({view.space for view in views.values()}) > 1
    made = []
    for name, view in views.items():
        places = view.layers if row.each_view == "layer" else view.timesteps
        if len(places) != 1:
            continue
        found = [
            (kind, one.evaluation, chosen(one, name, _segmenter(row, table, kind), row.name)) for kind, one in finished.items()
        ]
        series = f"{row.name}, {view.space}" if several else row.name
        whole = _run(replace(row, name=f"{series}, {row.each_view} {places[0]:g}"), found, {}, table)
        made.append(replace(whole, series=series, x=float(places[0])))
    return made


def _backbone(evaluation: Evaluation) -> str | None:
    checkpoint = getattr(getattr(evaluation.extractor, "backbone", None), "checkpoint", None)
    return checkpoint.path if checkpoint else None


# ---------------------------------------------------------------- what a row needs


def _needs(config: Mapping[str, Any], row: PaperRow, overrides: Sequence[str], extra: Sequence[str]) -> tuple[list[str], str]:
    """Return the requirements of a row that this machine lacks (empty if it can run), and the command that fills it."""
    missing = lacking(config, row.memory)
    models = [one.removeprefix("lab:") for one in missing if one.startswith("lab:")]
    if models:
        return [f"lab weights of {model}" for model in models], f"conceptseg-lab train {models[0]} --ship"
    command = shlex.join(["conceptseg", *overrides, *_settings(extra)])
    return ([row.needs] if missing and row.needs else missing), command


def lacking(config: Mapping[str, Any], memory: str = "") -> list[str]:
    """Weights and data that this machine does not hold, each with its size or the script that fetches it; lab models by path.

    memory: of all of them, where their sheets do not say it.
    """
    needs = []
    for _, part in checkpoints(config["extractor"]):
        path = str(part["path"])
        if not _at_hand(part, config["runtime"]["download"]):
            needs.append(", ".join(filter(None, [path.rpartition("/")[2], part.get("memory")])))
    needs = list(dict.fromkeys(needs))  # one model may serve twice
    if needs and memory:
        needs[-1] += f", {memory}"
    root = config["dataset"].get("root")
    if root is not None and not Path(root).exists():
        script = {"ImageNetSegmentation": "fetch_imagenet_segmentation.py", "PascalVOC": "fetch_voc.py"}.get(
            str(config["dataset"]["_target_"]).rpartition(".")[2], ""
        )
        needs.append(f"{Path(root).name}" + (f" (scripts/{script})" if script else ""))
    return needs


def _at_hand(part: Mapping[str, Any], download: bool) -> bool:
    """Whether a checkpoint is a lab model, a folder, in the hub's cache, or may be downloaded when its row is run."""
    checkpoint = Checkpoint(str(part["path"]), part.get("revision"))
    try:
        if checkpoint.folder() is not None:
            return True
    except ConfigError:  # no such folder, no such lab model
        return False
    return checkpoint.revision is not None and (download or not missing_files(checkpoint, repository_of(part).files))
