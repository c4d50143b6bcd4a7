"""Tables of results that someone else computed: read from a file or an address, and compared with one of this machine.

A results file has numbers and intervals and no rows of single images, so that differences can't be paired: their intervals are
wider than those of two runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conceptseg.downloads import is_address, read_address
from conceptseg.errors import ConfigError, ReportError, did_you_mean
from conceptseg.report.blocks import Block
from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results, load

LARGEST = 16 << 20
"""Bytes of the largest results file that is fetched."""
COMPARED = ("standard", "released")
"""Kinds of columns that are compared: those that were computed."""


@dataclass(frozen=True, slots=True)
class Held:
    """One number of a table beside the same one of another; shares where the column is in percent."""

    block: str
    row: str
    column: Column
    mine: Value
    theirs: Value

    @property
    def difference(self) -> float:
        """The first table's value less the second's."""
        return self.mine.value - self.theirs.value

    @property
    def spread(self) -> float | None:
        """Half the width of the difference's interval, were the two independent and their intervals symmetric; None without."""
        halves = [(v.high - v.low) / 2 for v in (self.mine, self.theirs) if v.low is not None and v.high is not None]
        return math.hypot(*halves) if len(halves) == 2 else None


def is_table(spec: str) -> bool:
    """Whether a word of a command line names a results file rather than a run."""
    return is_address(spec) or spec.endswith(".json")


def read_table(spec: str) -> Results:
    """A results file: a path, https://..., or hf://[datasets/]owner/name[@revision]/path.

    Raises DataError for an address whose file can't be had or has more than 16 MiB, and ReportError for what is no table.
    """
    if not is_address(spec):
        return load(Path(spec))
    try:
        data: Any = json.loads(read_address(spec, LARGEST))
    except (ValueError, RecursionError) as error:
        raise ReportError(
            f"{spec} is not JSON ({error}). Wanted a results.json as conceptseg writes it beside a table: of a hub's page, the "
            f"address of the file itself (resolve instead of blob)."
        ) from error
    return Results.from_json(data, spec)


def hold(mine: Results, theirs: Results) -> list[Held]:
    """Every computed number that both tables have, by the names of block, row and column, in the first one's order.

    Raises ConfigError where they have none in common, and where blocks of one name differ in protocol or data: their numbers
    answer different questions.
    """
    found = []
    for block in mine.blocks:
        other = next((one for one in theirs.blocks if one.name == block.name), None)
        if other is None:
            continue
        _check_same_task(block, other)
        for row in block.ordered_rows:
            twin = next((one for one in other.rows if one.name == row.name), None)
            if twin is None:
                continue
            for column in mine.columns:
                if column.kind in COMPARED and column.name in row.values and column.name in twin.values:
                    _check_same_metric(column, theirs.columns)
                    found.append(Held(block.name, row.name, column, row.values[column.name], twin.values[column.name]))
    if not found:
        names = [row.name for block in mine.blocks for row in block.rows]
        first = next((row.name for block in theirs.blocks for row in block.rows), "")
        raise ConfigError(
            f'tables "{mine.table}" and "{theirs.table}" have no computed number in common; blocks, rows and columns are matched '
            f"by name. {did_you_mean(first, names)}"
        )
    return found


def _check_same_task(mine: Block, theirs: Block) -> None:
    for what, one, other in (("protocol", mine.protocol, theirs.protocol), ("data", mine.dataset, theirs.dataset)):
        if one != other:
            raise ConfigError(
                f'block "{mine.name}": the {what} of the first table is "{one}", of the second "{other}". Their numbers can\'t '
                f"be compared: compute one of them again."
            )


def _check_same_metric(column: Column, others: Sequence[Column]) -> None:
    other = next(one for one in others if one.name == column.name)
    if (column.text, column.percent) != (other.text, other.percent):
        raise ConfigError(
            f'column "{column.name}" means "{column.text}" in the first table and "{other.text}" in the second: two versions of '
            f"conceptseg define it differently."
        )
