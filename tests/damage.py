"""Damage to the lines of a rows file, and what may come of it: a warning and a row computed again, never another number."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]


def _set(**more: Any) -> Callable[[Row], Row]:
    return lambda row: {**row, **more}


def _without(name: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != name}


def _first(name: str, change: Callable[[Any], Any]) -> Callable[[Row], Row]:
    def changed(row: Row) -> Row:
        row = copy.deepcopy(row)
        row[name][0] = change(row[name][0])
        return row

    return changed


COUNTS = ("classes", "inter", "pred", "label", "pred_void", "valid", "correct", "void", "ap", "words")


def _failed(row: Row) -> Row:
    return {**{k: v for k, v in row.items() if k not in COUNTS}, "status": "failed", "error": "why"}


FIELDS: dict[str, Callable[[Row], Any]] = {
    "a changed digit": _first("inter", lambda n: n + 1),
    "a negative count": _first("pred", lambda n: -n - 1),
    "a count too large": _first("label", lambda n: 10**12),
    "a count beyond int64": _first("pred", lambda n: 10**30),
    "a count that is a float": _first("inter", float),
    "a count that is a word": _first("inter", str),
    "a count that is true": _first("pred_void", lambda n: True),
    "a count that is null": _first("label", lambda n: None),
    "a count that is a list": _first("label", lambda n: [n]),
    "a shorter list": lambda row: {**row, "pred": row["pred"][:-1]},
    "counts that are a table": _set(inter={"0": 1}),
    "counts that are null": _set(label=None),
    "a class twice": lambda row: {**row, "classes": [1] * len(row["classes"])},
    "class 255": _first("classes", lambda n: 255),
    "more correct pixels": lambda row: {**row, "correct": row["correct"] + 1},
    "fewer valid pixels": lambda row: {**row, "valid": row["valid"] - 1},
    "valid that is a word": _set(valid="many"),
    "an average precision of 1.5": _set(ap={"foreground": 1.5}),
    "an average precision below 0": _set(ap={"foreground": -0.5}),
    "an average precision that is a word": _set(ap={"foreground": "high"}),
    "another average precision": _set(ap={"foreground": 0.123}),
    "an unknown average precision": _set(ap={"foregroundd": 0.5}),
    "average precisions that are a list": _set(ap=[0.5]),
    "no average precisions": _without("ap"),
    "no sample": _without("sample"),
    "a sample that is a number": _set(sample=3),
    "an empty sample": _set(sample=""),
    "another sample": _set(sample="scenes/other"),
    "another view": _set(view="other"),
    "no view": _without("view"),
    "a view that is a list": _set(view=[]),
    "no segmenter": _without("segmenter"),
    "an unknown status": _set(status="fine"),
    "a status that is a list": _set(status=["ok"]),
    "no status": _without("status"),
    "a failed row in its place": _failed,
    "a failed row without a reason": lambda row: _without("error")(_failed(row)),
    "an excluded row in its place": lambda row: {**_failed(row), "status": "excluded", "view": "*", "segmenter": "*"},
    "a row that failed as a whole": lambda row: {**_failed(row), "view": "*", "segmenter": "*"},
    "other words": _set(words=["dog"]),
    "words that are numbers": _set(words=[1]),
    "seconds below 0": _set(seconds=-1.0),
    "an unknown field": _set(note="mine"),
    "another run": _set(run="0123456789ab"),
    "no run": _without("run"),
    "no check": _without("check"),
    "neither run nor check": lambda row: _without("run")(_without("check")(row)),
    "a check of zeros": _set(check="0" * 16),
    "a check that is a number": _set(check=0),
    "a list": lambda row: [row],
    "null": lambda row: None,
    "a number": lambda row: 7,
    "a word": lambda row: "row",
}
"""Name of a damage to a row -> function that does it."""

TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "an empty line": lambda line: b"",
    "half a line": lambda line: line[: len(line) // 2],
    "a line cut at its front": lambda line: line[5:],
    "two lines in one": lambda line: line + line,
    "NUL bytes": lambda line: b"\0" * len(line),
    "a NUL byte inside": lambda line: line[:20] + b"\0" + line[20:],
    "bytes that are no UTF-8": lambda line: line[:20] + b"\xff\xfe" + line[20:],
    "a byte order mark": lambda line: b"\xef\xbb\xbf" + line,
    "UTF-16": lambda line: line.decode().encode("utf-16-le").replace(b"\n", b" "),
    "brackets without end": lambda line: b"[" * 200_000,
    "deep brackets": lambda line: b"[" * 5_000 + b"]" * 5_000,
    "NaN": lambda line: line.replace(b'"correct": ', b'"correct": NaN, "x": '),
    "Infinity": lambda line: line.replace(b'"seconds": ', b'"seconds": Infinity, "x": '),
    "a number of 5,000 digits": lambda line: line.replace(b'"correct": ', b'"correct": ' + b"9" * 5_000),
    "1e999": lambda line: line.replace(b'"seconds": ', b'"seconds": 1e999, "x": '),
    "a field twice": lambda line: line.replace(b'{"', b'{"valid": 1, "', 1).replace(b'"void": ', b'"valid": 3, "void": ', 1),
    "half a surrogate": lambda line: line.replace(b'"sample": "', b'"sample": "\\ud800', 1),
}
"""Name of a damage to a line without its end -> function that does it."""


def damaged_lines(line: bytes) -> Iterator[tuple[str, bytes]]:
    """Every kind of damage to a line of a rows file, by name; the line ends with a newline, and so do the damaged ones."""
    row, bare = json.loads(line), line.rstrip(b"\n")
    for name, change in FIELDS.items():
        yield name, json.dumps(change(row), sort_keys=True).encode() + b"\n"
    for name, spoil in TEXTS.items():
        yield name, spoil(bare) + b"\n"


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit turned over."""
    found = bytearray(content)
    found[bit // 8] ^= 1 << bit % 8
    return bytes(found)
