"""A row as a line of JSON that vouches for itself: it names its run, and a digest covers all of its fields."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, cast, get_args

from conceptseg.errors import did_you_mean
from conceptseg.store.schema import Row, Status
from conceptseg.types import PER_IMAGE, VOID

COUNTS = ("inter", "pred", "label", "pred_void")
TOTALS = ("valid", "correct", "void")
MOST = 2**53
"""Pixels beyond which a count can't be real, and sums would no longer be exact in float64."""
ROUNDING = 1e-9
"""By how much an average precision may lie above 1."""
KNOWN = Row.__annotations__.keys()


class DamagedRow(ValueError):
    """A line that is no row of its run; the message is the reason, without file and line."""


def sealed(row: Row, run: str) -> Row:
    """The row with its run and the digest of its fields."""
    whole = {**row, "run": run}
    whole.pop("check", None)
    return cast(Row, {**whole, "check": _digest(whole)})


def line_of(row: Row) -> bytes:
    """The row as a line. Raises ValueError for a number that JSON lacks."""
    return (json.dumps(row, sort_keys=True, allow_nan=False) + "\n").encode()


def row_of(line: bytes, run: str) -> Row:
    """The row that a line holds, with its fields, run and digest checked. Raises DamagedRow.

    A row that has neither run nor digest, as older versions wrote them, passes with the other checks alone.
    """
    try:
        row = json.loads(line.decode(), parse_constant=_refuse_constant)
        if fault := row_fault(row):
            raise DamagedRow(fault)
        if "run" not in row and "check" not in row:
            return cast(Row, row)
        if row.get("run") != run:
            raise DamagedRow(f"it belongs to run {_shown(row.get('run'))}")
        if row.get("check") != _digest({k: v for k, v in row.items() if k != "check"}):
            raise DamagedRow("its fields disagree with its check digest")
        return cast(Row, row)
    except DamagedRow:
        raise
    except UnicodeDecodeError as error:
        raise DamagedRow(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DamagedRow(f"no JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
        raise DamagedRow(f"no JSON: {error}") from error


def row_fault(row: Any) -> str | None:
    """Why this can't be a row: a missing or unknown field, a wrong type or range, or counts that do not add up."""
    if not isinstance(row, dict):
        return f"it is a {type(row).__name__}, wanted an object"
    if unknown := sorted(row.keys() - KNOWN):
        return f'unknown field "{unknown[0][:40]}". {did_you_mean(unknown[0][:40], KNOWN)}'
    for name in ("sample", "view", "segmenter"):
        if not isinstance(row.get(name), str) or not row[name]:
            return f"{name} is {_shown(row.get(name))}, wanted a name"
    status = row.get("status")
    if status not in get_args(Status):
        return f"status is {_shown(status)}, wanted ok, failed or excluded"
    if "seconds" in row and not _is_number(row["seconds"], 0, math.inf):
        return f"seconds is {_shown(row['seconds'])}, wanted 0 or more"
    whole = row["view"] == "*", row["segmenter"] == "*"
    if status != "ok":
        if not isinstance(row.get("error"), str):
            return f"error is {_shown(row.get('error'))}, wanted the reason of a row that is {status}"
        if counted := sorted(row.keys() & {"classes", "ap", "measured", *COUNTS, *TOTALS}):
            return f"{counted[0]} stands in a row that is {status}"
        if whole not in ((True, True), (False, False)) or (status == "excluded" and not whole[0]):
            return f"view {_shown(row['view'])} and segmenter {_shown(row['segmenter'])} do not go with status {status}"
        return None
    if any(whole):
        return 'view or segmenter is "*", which no scored row has'
    if "error" in row:
        return "error stands in a row that is ok"
    return _counts_fault(row) or _words_fault(row) or _precisions_fault(row)


def _counts_fault(row: dict[str, Any]) -> str | None:
    for name in ("classes", *COUNTS):
        if not isinstance(row.get(name), list) or not all(map(_is_count, row[name])):
            return f"{name} is {_shown(row.get(name))}, wanted a list of whole numbers, 0 or more"
        if len(row[name]) != len(row["classes"]):
            return f"{name} has {len(row[name])} values for {len(row['classes'])} classes"
    for name in TOTALS:
        if not _is_count(row.get(name)):
            return f"{name} is {_shown(row.get(name))}, wanted a whole number, 0 or more"
    if len(set(row["classes"])) < len(row["classes"]) or not all(index < VOID for index in row["classes"]):
        return f"classes is {_shown(row['classes'])}, wanted distinct numbers below {VOID}"
    for name in ("pred", "label"):
        if any(inter > more for inter, more in zip(row["inter"], row[name], strict=True)):
            return f"inter is greater than {name} for a class"
    for name, total in (("inter", "correct"), ("pred", "valid"), ("label", "valid"), ("pred_void", "void")):
        if sum(row[name]) != row[total]:
            return f"{name} adds up to {sum(row[name])}, but {total} is {row[total]}"
    return None


def _words_fault(row: dict[str, Any]) -> str | None:
    words = row.get("words")
    if words is None:  # as very old rows
        return "words is null" if "words" in row else None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return f"words is {_shown(words)}, wanted a list of words"
    if len(words) != (asked := sum(index != 0 for index in row["classes"])):
        return f"words has {len(words)} for {asked} classes that are not background"
    return None


def _precisions_fault(row: dict[str, Any]) -> str | None:
    if not isinstance(row.get("ap"), dict):
        return f"ap is {_shown(row.get('ap'))}, wanted average precisions by name"
    measured = row.get("measured", {})
    if not isinstance(measured, dict):
        return f"measured is {_shown(measured)}, wanted numbers by name"
    for name, value in measured.items():
        if value is not None and not _is_number(value, -math.inf, math.inf):
            return f"measured.{name[:40]} is {_shown(value)}, wanted a finite number or null"
    for name, value in row["ap"].items():
        if name not in PER_IMAGE:
            return f'unknown average precision "{name[:40]}". {did_you_mean(name[:40], PER_IMAGE)}'
        if value is not None and not _is_number(value, 0, 1 + ROUNDING):
            return f"ap.{name} is {_shown(value)}, wanted 0 to 1 or null"
    return None


def _digest(row: dict[str, Any]) -> str:
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def _shown(value: Any) -> str:
    """A value in a message: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_constant(name: str) -> float:
    raise DamagedRow(f"no JSON: {name} is no number of JSON")
