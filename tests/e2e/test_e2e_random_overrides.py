"""Type random overrides: no traceback, no hang, no run folder of a refused configuration. See random_overrides.py."""

from __future__ import annotations

import time

import pytest
from random_overrides import BASE, faults, overrides

LISTS, SHARES = 60, 2


@pytest.mark.parametrize("share", range(SHARES))
def test_random_lists_of_overrides_do_no_harm(commands, share):
    wrong = []
    for number in range(share, LISTS, SHARES):
        where = f"runs{number}"
        started = time.monotonic()
        ended = commands.start(*overrides(number), f"runtime.runs={where}").wait()
        problems = faults(ended.code, ended.out + ended.err, commands.runs(where), time.monotonic() - started)
        wrong += [f"{overrides(number)[len(BASE) :]}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)
