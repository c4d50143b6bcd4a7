"""Table sheets: what a file under conf/table may say. A sheet is read strictly, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from conceptseg.errors import ConfigError, did_you_mean, one_of
from conceptseg.metrics.definitions import definition_of
from conceptseg.report.blocks import Group
from conceptseg.report.strict_json import build

Protocol = Literal["released", "standard"]
PROTOCOLS: tuple[Protocol, ...] = ("released", "standard")


@dataclass(frozen=True, slots=True)
class RowSheet:
    """One evaluation, read through one view and one segmenter."""

    name: str
    overrides: tuple[str, ...]
    """Put after the block's own."""
    group: Group = "methods"
    view: str | None = None
    """Name of a view; null takes the first."""
    segmenter: str | None = None
    """Key of a segmenter of the protocol; null takes the block's."""
    picture: bool = False
    """Whether the row is on the picture sheet, if the block draws one."""
    headline: bool = False
    """Whether the row is on the first screen of RESULTS.md."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class BlockSheet:
    """Rows on the same data under the same protocol."""

    name: str
    data: str
    text: str
    segmenter: str
    rows: tuple[RowSheet, ...]
    overrides: tuple[str, ...] = ()
    pictures: bool = False


@dataclass(frozen=True, slots=True)
class Against:
    """A column of paired differences: each row less this row of the same block, by this metric."""

    row: str
    metric: str
    falls: bool = False
    """Whether every other row is to be worse than it: those that are not measurably so are marked with † (see `table.STANDS`)."""


@dataclass(frozen=True, slots=True)
class TableSheet:
    """A table of evaluations."""

    title: str
    columns: tuple[str, ...]
    blocks: tuple[BlockSheet, ...]
    against: tuple[Against, ...] = ()
    headline: tuple[str, ...] = ()
    """Columns of the first screen of RESULTS.md, those of them that the table has."""
    notes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Names of the rows that are computed; all of them where it is empty."""


# ---------------------------------------------------------------- a paper's table


@dataclass(frozen=True, slots=True)
class PerProtocol:
    """A setting that differs between the protocols; null leaves it as it is."""

    released: str | None = None
    standard: str | None = None

    def under(self, protocol: Protocol) -> str | None:
        return self.released if protocol == "released" else self.standard


@dataclass(frozen=True, slots=True)
class LabPart:
    """Overrides that put the lab's models in place of a row's own, under both protocols or under one of them."""

    both: tuple[str, ...] = ()
    released: tuple[str, ...] = ()
    standard: tuple[str, ...] = ()
    note: str = ""

    def under(self, protocol: Protocol) -> tuple[str, ...]:
        return self.both + (self.released if protocol == "released" else self.standard)


@dataclass(frozen=True, slots=True)
class PaperRow:
    """One method: its quoted numbers and its evaluation under each protocol."""

    name: str
    overrides: tuple[str, ...] | None = None
    """Null where this version has no extractor for the row; `needs` then says what it would take."""
    released: tuple[str, ...] = ()
    standard: tuple[str, ...] = ()
    lab: LabPart | None = None
    """Null where no model of the lab does this."""
    group: Group = "methods"
    quotes: str | None = ""
    """Row of the claim whose numbers are quoted; empty for the one of the same name, null for none."""
    view: str | PerProtocol | None = None
    segmenter: str | PerProtocol | None = None
    kinds: tuple[Protocol, ...] = PROTOCOLS
    """Protocols under which the row is computed."""
    each_view: Literal["layer", "timestep"] | None = None
    """Makes every view that stands at one layer or one timestep a point of a curve."""
    picture: bool = False
    note: str = ""
    memory: str = ""
    """Size of the weights, for rows whose backbone sheets do not state it."""
    needs: str = ""
    """Requirement of the row that no setting names. A row with one runs only on the lab."""

    def of(self, protocol: Protocol) -> tuple[str, ...]:
        """The row's own overrides under one protocol."""
        return self.released if protocol == "released" else self.standard

    @property
    def quoted(self) -> str | None:
        return self.name if self.quotes == "" else self.quotes


@dataclass(frozen=True, slots=True)
class PaperBlock:
    """Rows on the same data."""

    name: str
    data: str
    text: str
    rows: tuple[PaperRow, ...]
    overrides: tuple[str, ...] = ()
    axis: str = ""
    """Label of a curve's x axis; empty if rows are not points of a curve."""
    quoted: tuple[str, ...] = ()
    """Columns of the claim that this block prints; all that the table prints where it is empty."""


@dataclass(frozen=True, slots=True)
class ProtocolPart:
    """Columns of one protocol and how they are computed."""

    columns: tuple[str, ...]
    segmenter: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A paper's table: as printed, under the released protocol and under the standard one."""

    title: str
    claim: str
    """Name of the claim under benchmarks/ that is quoted."""
    blocks: tuple[PaperBlock, ...]
    quoted: tuple[str, ...] = ()
    """Columns of the claim that are printed."""
    released: ProtocolPart | None = None
    standard: ProtocolPart | None = None
    backbones: Literal["real", "lab"] = "real"
    """lab puts the lab's models and drawn scenes in place of weights and data."""
    lab: tuple[str, ...] = ()
    """Overrides of every row on the lab."""
    notes: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    """Names of the rows that are computed; all of them where it is empty."""
    protocol_column: bool = False
    """Whether a column says which protocol here computes each row, if any does."""

    @property
    def on_lab(self) -> bool:
        return self.backbones == "lab"

    @property
    def parts(self) -> dict[Protocol, ProtocolPart]:
        """The protocols that the table has, in printing order."""
        both: dict[Protocol, ProtocolPart | None] = {"released": self.released, "standard": self.standard}
        return {protocol: part for protocol, part in both.items() if part is not None}


OF_PAPERS = {"claim", "quoted", *PROTOCOLS}
"""Keys that only a paper's table has."""


def read_sheet(config: Mapping[str, Any], where: str = "table") -> TableSheet | PaperTable:
    """Build a table sheet from its composed, plain configuration, with the rows that `only` names.

    `rows` of a block is a list, or a mapping from names to rows, which Hydra can merge: `methods` of a sheet is such a mapping
    that its blocks refer to (`rows: ${table.methods}`), and is read in its place there.

    Raises ConfigError for a misspelt or missing key and a wrong type, and for names of rows and columns that the table lacks.
    """
    data = {key: value for key, value in config.items() if key != "methods"}
    if isinstance(data.get("blocks"), list):
        data["blocks"] = [_with_listed_rows(block) for block in data["blocks"]]
    if data.keys() & OF_PAPERS:
        paper = build(PaperTable, data, where, ConfigError)
        _check_paper(paper, where)
        return _only(paper, where)
    table = build(TableSheet, data, where, ConfigError)
    _check_against(table, where)
    return _only(table, where)


def _with_listed_rows(block: Any) -> Any:
    if not isinstance(block, Mapping) or not isinstance(block.get("rows"), Mapping):
        return block
    return {**block, "rows": [{"name": n, **r} if isinstance(r, Mapping) else r for n, r in block["rows"].items()]}


def _check_rows(blocks: Sequence[BlockSheet] | Sequence[PaperBlock], where: str) -> None:
    for block in blocks:
        at, names = f'{where}.blocks["{block.name}"]', [row.name for row in block.rows]
        if not names:
            raise ConfigError(f"{at}.rows: wanted at least one row, got none.")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f'{at}.rows: row "{twice[0]}" occurs twice. Give each row of a block a name of its own.')


def _check_against(table: TableSheet, where: str) -> None:
    _check_rows(table.blocks, where)
    for name in table.columns:
        definition_of(name, f"{where}.columns")
    for against in table.against:
        if against.metric not in table.columns:
            nearest = did_you_mean(against.metric, table.columns)
            raise ConfigError(f'{where}.against.metric: the table has no column "{against.metric}". {nearest}')
        for block in table.blocks:
            if against.row not in (names := [row.name for row in block.rows]):
                nearest = did_you_mean(against.row, names)
                raise ConfigError(f'{where}.against.row: block "{block.name}" has no row "{against.row}". {nearest}')


def _check_paper(table: PaperTable, where: str) -> None:
    _check_rows(table.blocks, where)
    for block in table.blocks:
        for name in block.quoted:
            one_of(f'{where}.blocks["{block.name}"].quoted', name, table.quoted)
        for row in block.rows:
            if row.overrides is None and not row.needs:
                raise ConfigError(
                    f'{where}.blocks["{block.name}"].rows["{row.name}"]: lacks overrides. Write what computes the row, '
                    "or under `needs` what it would take, where nothing here computes it."
                )


Sheet = TypeVar("Sheet", TableSheet, PaperTable)


def _only(table: Sheet, where: str) -> Sheet:
    """The table with the rows that `only` names, and without differences to rows that are left out.

    A name is that of a row, in every block that has it, or `block: row` for that block's alone.
    """
    if not table.only:
        return table
    names: list[str] = list(dict.fromkeys(row.name for block in table.blocks for row in block.rows))
    placed: list[str] = [f"{block.name}: {row.name}" for block in table.blocks for row in block.rows]
    for name in table.only:
        if name not in (*names, *placed):
            nearest = did_you_mean(name, placed if name.partition(": ")[0] in {block.name for block in table.blocks} else names)
            raise ConfigError(f'{where}.only: the table has no row "{name}". {nearest}')
    wanted = {*table.only}
    kept = [replace(b, rows=tuple(r for r in b.rows if wanted & {r.name, f"{b.name}: {r.name}"})) for b in table.blocks]
    found = replace(table, blocks=tuple(block for block in kept if block.rows))
    if isinstance(found, TableSheet):
        held = set.intersection(*({row.name for row in block.rows} for block in found.blocks))
        return replace(found, against=tuple(a for a in found.against if a.row in held))
    return found
