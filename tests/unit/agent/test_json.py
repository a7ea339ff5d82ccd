"""The agent reads and writes JSON with parts of `json`, because the module costs every container some milliseconds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.agent import agent

SCALARS = st.none() | st.integers() | st.text()
SAID = st.recursive(SCALARS, lambda inner: st.dictionaries(st.text(), inner, max_size=4), max_leaves=8)
HEARD = st.recursive(
    SCALARS | st.booleans() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(SAID)
def test_what_is_said_is_read_as_it_was_meant(value: Any) -> None:
    assert json.loads(agent.as_json(value)) == value


@given(HEARD)
def test_what_the_worker_says_is_read_as_json_reads_it(value: Any) -> None:
    assert agent.from_json(json.dumps(value).encode()) == value


def test_bytes_of_a_path_that_are_no_text_survive() -> None:
    assert agent.from_json(json.dumps({"PATH": "/caf\udce9"}).encode()) == {"PATH": "/caf\udce9"}


@pytest.mark.parametrize("packet", [b"", b"{", b"nonsense", b'{"a": }', b"\xff"])
def test_what_is_not_json_is_a_value_error(packet: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's and the codec's own kinds
        agent.from_json(packet)
