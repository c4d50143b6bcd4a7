"""Digits of published numbers: as many as are printed and two more, and only those that another machine reproduces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results

SPARE_DECIMALS = 2
"""Decimals of a published number beyond the printed ones: a percentage printed with one decimal is a share with five."""


def rounded(results: Results) -> Results:
    """The table with every number at its printed decimals and SPARE_DECIMALS more."""
    return _with_values(results, lambda place, column, value: _rounded(column, value))


def settled(results: Results, published: Results | None) -> tuple[Results, int]:
    """The rounded table with the published digits of all numbers that did not move, and how many numbers moved.

    A number moved if it, or an end of its interval, lies further from the published one than its column's tolerance. Numbers that
    only one of the two tables has count as moved.
    """
    old = {} if published is None else values_of(published)
    moved = len(old.keys() - values_of(results).keys())

    def settle(place: tuple[str, str, str], column: Column, value: Value) -> Value:
        nonlocal moved
        if place in old and _close(old[place], value, column):
            return _rounded(column, old[place])
        moved += 1
        return _rounded(column, value)

    return _with_values(results, settle), moved


def _close(old: Value, new: Value, column: Column) -> bool:
    if (old.n, old.mark, len(old.numbers)) != (new.n, new.mark, len(new.numbers)):
        return False
    spare = 10.0 ** -(column.decimals(new) + SPARE_DECIMALS)  # the published number is itself rounded
    return all(abs(a - b) <= column.tolerance(new) + spare for a, b in zip(old.numbers, new.numbers, strict=True))


def _rounded(column: Column, value: Value) -> Value:
    low, high = (None if v is None else _shortened(column, value, v) for v in (value.low, value.high))
    return replace(value, value=_shortened(column, value, value.value), low=low, high=high)


def _shortened(column: Column, value: Value, number: float) -> float:
    """The nearest number of the published decimals that is printed alike: 0.4174996 is printed 41.7, and 0.41750 would not be."""
    decimals = column.decimals(value) + SPARE_DECIMALS
    near = round(number, decimals)
    if column.printed(value, near) == column.printed(value, number):
        return near
    return round(near + math.copysign(10.0**-decimals, number - near), decimals)


def values_of(results: Results) -> Mapping[tuple[str, str, str], Value]:
    """(block, row, column) -> number."""
    return {(b.name, r.name, name): value for b in results.blocks for r in b.rows for name, value in r.values.items()}


def _with_values(results: Results, change: Callable[[tuple[str, str, str], Column, Value], Value]) -> Results:
    columns = {column.name: column for column in results.columns}
    blocks = []
    for block in results.blocks:
        rows = [
            replace(row, values={m: change((block.name, row.name, m), columns[m], v) for m, v in row.values.items()})
            for row in block.rows
        ]
        blocks.append(replace(block, rows=tuple(rows)))
    return replace(results, blocks=tuple(blocks))
