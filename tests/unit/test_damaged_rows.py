"""A row vouches for itself: damage is named and its row computed again; nothing else is lost, and no number changes in silence.

`python tests/unit/test_damaged_rows.py [flips]` tries all single-bit flips of a rows file, or so many, and prints counts.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from damage import FIELDS, TEXTS, damaged_lines, flipped

from conceptseg.errors import ResumeError
from conceptseg.keys import digest, run_id
from conceptseg.store.lines import line_of, row_of, sealed
from conceptseg.store.run import RunStore
from conceptseg.store.schema import SCHEMA

IDENTITY = {"what": "dots"}
RUN = run_id(IDENTITY)
MANIFEST = {
    "schema": SCHEMA, "run_id": RUN, "identity": IDENTITY, "config": {}, "provenance": "control", "source": {}, "versions": {},
    "machine": {}, "git": {},
}  # fmt: skip


def row(number: int):
    """A scored row with numbers of its own."""
    return {
        "sample": f"dots/{number}", "view": "map", "segmenter": "mean@grid/nearest", "status": "ok", "words": ["dot"],
        "classes": [0, 1], "inter": [400 + number, 300], "pred": [500, 500 + number], "label": [600 + number, 400],
        "pred_void": [10, 14], "valid": 1000 + number, "correct": 700 + number, "void": 24,
        "ap": {"foreground": 0.5 + number / 100, "two_channel": None}, "seconds": 0.0312,
    }  # fmt: skip


ROWS = [row(number) for number in range(4)]


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path)


def written(place: Path) -> Path:
    store = RunStore(place / RUN)
    store.open(MANIFEST)
    with store:
        store.append(ROWS)
    return store.folder


def read(folder: Path):
    return {key.sample: found for key, found in RunStore(folder).rows().items()}


@pytest.mark.parametrize("kind", [*FIELDS, *TEXTS])
def test_a_damaged_line_is_named_and_skipped_and_nothing_else_is_lost(folder, kind, caplog):
    file = folder / "rows-0of1.jsonl"
    lines = file.read_bytes().splitlines(True)
    lines[2] = dict(damaged_lines(lines[2]))[kind]
    file.write_bytes(b"".join(lines))
    with caplog.at_level(logging.WARNING):
        store = RunStore(folder)
        found = {key.sample: row for key, row in store.rows().items()}
    (said,) = caplog.messages
    assert "rows-0of1.jsonl, line 3: " in said and "\n" not in said and len(said) < 400
    assert found == {one["sample"]: one for one in ROWS if one["sample"] != "dots/2"}
    assert store.missing("dots/2", ["map"], ["mean@grid/nearest"]) == ["map"]
    with store:
        store.append([ROWS[2]])
    assert read(folder) == {one["sample"]: one for one in ROWS}


def flips(folder: Path, bits) -> dict[str, int]:
    """How often what came of a flipped bit."""
    file = folder / "rows-0of1.jsonl"
    whole, right = file.read_bytes(), read(folder)
    counted = {"same": 0, "told": 0, "silently lost": 0, "silently changed": 0, "traceback": 0}
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    log = logging.getLogger("conceptseg.store.run")
    log.addHandler(handler)
    log.propagate = False
    try:
        for bit in bits:
            file.write_bytes(flipped(whole, bit))
            told.clear()
            try:
                found = read(folder)
            except Exception:
                counted["traceback"] += 1
                continue
            if any(found[sample] != right.get(sample) for sample in found):
                counted["silently changed"] += 1
            elif found == right:
                counted["same"] += 1
            else:
                # The last line without its end is what a kill leaves: it is computed again, without a word.
                counted["told" if told or not file.read_bytes().endswith(b"\n") else "silently lost"] += 1
    finally:
        log.removeHandler(handler)
        log.propagate = True
        file.write_bytes(whole)
    return counted


def test_a_flipped_bit_changes_no_row_in_silence(folder):
    size = 8 * (folder / "rows-0of1.jsonl").stat().st_size
    counted = flips(folder, random.Random(0).sample(range(size), 400))
    assert counted["silently changed"] == counted["silently lost"] == counted["traceback"] == 0
    assert counted["told"] > 390


def test_rows_of_another_run_are_refused(folder, caplog):
    (folder / "rows-0of2.jsonl").write_bytes(line_of(sealed(row(9), "ffffffffffff")))
    assert len(read(folder)) == 4 and "it belongs to run 'ffffffffffff'" in caplog.text


def test_older_rows_are_read_with_one_note(tmp_path, caplog):
    folder = tmp_path / RUN
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "rows-0of1.jsonl").write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    store = RunStore(folder)
    store.rows()
    store.refresh()
    assert len(store.rows()) == 4 and len(caplog.messages) == 1 and "4 rows" in caplog.text
    with store:
        store.append([row(7)])
    assert len(read(folder)) == 5


def test_a_row_without_digest_behind_one_that_has_it_is_refused(tmp_path, caplog):
    folder = tmp_path / RUN
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "rows-0of1.jsonl").write_bytes(line_of(sealed(row(0), RUN)) + json.dumps(row(1)).encode() + b"\n")
    assert list(read(folder)) == ["dots/0"] and "line 2" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": {"what": "other"}}, "identity was changed"),
        ({"run_id": "0123456789ab"}, "its folder is named"),
        ({"identity": []}, "identity"),
        ({"source": None}, "source"),
        ({"schema": "1"}, "not a manifest"),
    ],
)
def test_a_manifest_that_is_not_the_folders_is_refused(folder, change, said):
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, **change}))
    with pytest.raises(ResumeError, match=said):
        RunStore(folder).open(MANIFEST)


def test_a_fork_may_carry_the_digest_of_its_code(tmp_path):
    name = f"{RUN}-{digest({}, 6)}"
    store = RunStore(tmp_path / name)
    for _ in range(2):
        store.open({**MANIFEST, "run_id": name})


def test_rows_without_a_manifest_are_not_taken_over_in_silence(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(ResumeError, match=r"no manifest\.json(.|\n)*accept"):
        RunStore(folder).open(MANIFEST)
    RunStore(folder).open(MANIFEST, "accept")
    assert len(read(folder)) == 4


def cost_of_checking(count: int = 20_000) -> dict[str, float]:
    """Microseconds a row, best of five: JSON alone, and with seal and checks."""
    rows = [row(number % 50) for number in range(count)]
    lines = [line_of(sealed(one, RUN)) for one in rows]
    jobs = {
        "write, JSON alone": lambda: [line_of(one) for one in rows],
        "write with run and digest": lambda: [line_of(sealed(one, RUN)) for one in rows],
        "read, JSON alone": lambda: [json.loads(line) for line in lines],
        "read with all checks": lambda: [row_of(line, RUN) for line in lines],
    }
    found = {}
    for name, job in jobs.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            job()
            times.append(time.perf_counter() - started)
        found[name] = round(1e6 * min(times) / count, 1)
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        made = written(Path(place))
        bits = 8 * (made / "rows-0of1.jsonl").stat().st_size
        tried = min(bits, int(sys.argv[1])) if len(sys.argv) > 1 else bits
        print(f"{tried} flips of {bits}:", flips(made, random.Random(0).sample(range(bits), tried)))
    print("microseconds a row:", cost_of_checking())
