"""Type random overrides: no traceback, no hang, no run folder of a refused configuration. See random_overrides.py."""

from __future__ import annotations

import time

import pytest
from random_overrides import BASE, faults, overrides

LISTS = (
    0, 1, 2, 4, 5, 6, 8, 10, 13, 14, 16, 17, 19, 20, 23, 25, 26, 28, 29, 30, 31, 33, 34, 37, 39, 40, 41, 42, 44, 47, 48, 53, 57,
)  # fmt: skip
"""Of the first 60 lists one to four for each kind of answer: a key that is not there, a value of another type, a deletion that
fails, a target or a choice that is unknown, a text that can't be read, a table that is printed. The others repeat these answers;
`python tests/e2e/random_overrides.py 3000` tries as many as one likes."""
SHARES = 2


@pytest.mark.parametrize("share", range(SHARES))
def test_random_lists_of_overrides_do_no_harm(commands, share):
    wrong = []
    for number in LISTS[share::SHARES]:
        where = f"runs{number}"
        started = time.monotonic()
        ended = commands.start(*overrides(number), f"runtime.runs={where}").wait()
        problems = faults(ended.code, ended.out + ended.err, commands.runs(where), time.monotonic() - started)
        wrong += [f"{overrides(number)[len(BASE) :]}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)
