"""Columns of a table and the numbers in them: definitions, printed forms, and the rules that every number keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

ABSENT = "\u2013"  # an en dash, where a row has no such metric

Kind = Literal["standard", "released", "quoted", "difference", "cost"]
KIND_NAMES: dict[Kind, str] = {
    "quoted": "quoted", "released": "released protocol", "standard": "standard protocol",
    "difference": "paired difference", "cost": "cost",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """One metric, with its definition. No row wins a cost, a quotation or a difference."""

    name: str
    """Key of the metric in every row's `values`."""
    label: str
    """Heading that readers see."""
    percent: bool
    """Whether values are shares that are printed times 100."""
    text: str
    """Definition, in one sentence."""
    source: str
    """Where the definition, or the quoted number, comes from."""
    kind: Kind
    """Correct definition, what released code computes, or quoted (the three never share a column); difference to another row;
    or what computing cost."""
    places: int = 1
    """Decimals of a percentage: one for numbers computed here, as many as were printed for quoted ones."""
    headline: bool = False
    """Whether the first screen of RESULTS.md and the brief screen show it."""
    intervals: bool = True
    """Whether outputs show its intervals; false only where a reader left them out."""
    higher_is_better: bool = True
    """Whether the greatest value of a column of metrics wins; otherwise the least does."""

    @property
    def heading(self) -> str:
        return f"{self.label} %" if self.percent else self.label

    @property
    def caveat(self) -> str:
        """Printed under the heading of every column that is not the correct definition computed here."""
        return {"standard": "", "released": "released", "quoted": "quoted", "difference": "", "cost": ""}[self.kind]

    def written(self, value: Value) -> tuple[str, str]:
        """The number and its interval as text; the interval is empty for a quoted number that has none.

        >>> Column("miou", "mIoU", True, "", "", "standard").written(Value(0.561, 0.503, 0.612, 64))
        ('56.1', '[50.3, 61.2]')
        """
        value_text, *bounds = (self.printed(value, number) for number in value.numbers)
        return value_text + value.mark, f"[{', '.join(bounds)}]" if bounds and self.intervals else ""

    def printed(self, value: Value, number: float) -> str:
        """A number as text with the decimals that `value` and its interval have."""
        scale, shift = (100, 2) if self.percent else (1, 0)
        sign = "+" if self.kind == "difference" else ""
        return f"{scale * number:{sign}.{self.decimals(value) - shift}f}"

    def decimals(self, value: Value) -> int:
        """Decimals of the stored number that are seen in print: three for a percentage printed with one.

        >>> Column("miou", "mIoU", True, "", "", "standard").decimals(Value(0.561, 0.503, 0.612, 64))
        3
        """
        if self.percent:
            return self.places + 2
        largest = max(abs(v) for v in value.numbers)
        return 3 if largest < 10 else 1 if largest < 1000 else 0

    def tolerance(self, value: Value) -> float:
        """How far another machine's rounding may move a number before it is published again: one unit of the last printed digit.

        >>> Column("miou", "mIoU", True, "", "", "standard").tolerance(Value(0.561, 0.503, 0.612, 64))
        0.001
        """
        return float(10 ** -self.decimals(value))


def by_kind(columns: Sequence[Column]) -> list[tuple[Kind, tuple[Column, ...]]]:
    """Neighbouring columns of one kind together."""
    return [(kind, tuple(group)) for kind, group in groupby(columns, key=lambda column: column.kind)]


@dataclass(frozen=True, slots=True)
class Value:
    """One number with what makes it readable. Only quoted numbers and costs may lack interval and n."""

    value: float
    """The metric, as a share where its column is in percent."""
    low: float | None
    """Lower end of the interval."""
    high: float | None
    """Upper end of the interval."""
    n: int | None
    """Samples that the number rests on."""
    mark: str = ""
    """A sign printed behind the number and explained in the table's notes, such as one for another definition."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """The value, and the ends of its interval where it has one."""
        return tuple(v for v in (self.value, self.low, self.high) if v is not None)


def value_problems(value: Value, column: Column) -> list[str]:
    """Sentences about a number that may not be printed in a column; none for a sound one."""
    numbers = value.numbers
    if not all(math.isfinite(v) for v in numbers):
        return [f"{list(numbers)} is not finite; leave a metric out where it is undefined"]
    problems = []
    if (value.low is None) != (value.high is None):
        problems.append("has one end of an interval without the other")
    elif value.low is None or value.high is None:
        if column.kind not in ("quoted", "cost") and value.n != 1:
            problems.append("has no interval; only quoted numbers, costs and single images may lack one")
    elif value.low > value.high:  # the value itself may lie outside: percentile intervals of skewed statistics do that
        problems.append(f"its interval [{value.low:g}, {value.high:g}] is upside down")
    if (value.n is None and column.kind not in ("quoted", "cost")) or (value.n is not None and value.n < 1):
        problems.append(f"n is {value.n}, but a number rests on at least one sample")
    if column.percent and any(abs(v) > 1 + 1e-9 for v in numbers):
        problems.append(f"{value.value:g} is not a share between -1 and 1, as a column in percent wants")
    return problems
