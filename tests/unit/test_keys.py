"""conceptseg/keys.py: identity is stable, and depends on nothing that makes no number."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptseg.keys import canonical_json, digest, run_id

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def reversed_keys(value):
    if isinstance(value, dict):
        return {k: reversed_keys(v) for k, v in reversed(value.items())}
    return [reversed_keys(v) for v in value] if isinstance(value, list) else value


@given(PLAIN)
def test_the_order_of_keys_does_not_matter(value):
    assert canonical_json(value) == canonical_json(reversed_keys(value))


@given(PLAIN, PLAIN)
def test_two_values_share_a_text_only_if_they_are_equal(one, other):
    # True == 1 and 1 == 1.0 in Python; repr tells them apart, as JSON does.
    if canonical_json(one) == canonical_json(other):
        assert repr(canonical_sorted(one)) == repr(canonical_sorted(other))


def canonical_sorted(value):
    if isinstance(value, dict):
        return {k: canonical_sorted(v) for k, v in sorted(value.items())}
    return [canonical_sorted(v) for v in value] if isinstance(value, list) else value


def test_canonical_json_has_no_spaces_and_keeps_letters():
    assert canonical_json({"b": [1, None], "a": "naïve"}) == '{"a":"naïve","b":[1,null]}'


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused(value):
    with pytest.raises(ValueError):
        canonical_json({"x": value})


def test_anything_but_plain_data_is_refused():
    with pytest.raises(TypeError):
        canonical_json({"path": Path("x")})


def test_a_digest_is_the_sha256_of_the_canonical_text():
    assert digest({"a": 1}, 12) == hashlib.sha256(b'{"a":1}').hexdigest()[:12]


def test_a_run_id_is_the_same_in_another_process():
    identity = {"method": {"class": "Oracle", "version": 1}, "dataset": {"name": "scenes"}}
    code = f"from conceptseg.keys import run_id; print(run_id({identity!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "1"}, timeout=60)
    assert said.stdout.strip() == run_id(identity)
