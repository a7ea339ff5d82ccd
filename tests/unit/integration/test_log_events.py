"""Lines of the structured log channel, whatever stands in them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.integration.seams import supervision


class Recorder:
    """A logger as Airflow's ``_log_to_target`` calls one."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str, dict[str, Any]]] = []

    def log(self, level: int, event: str, **values: Any) -> None:
        self.lines.append((level, event, values))


def logged(line: bytes) -> tuple[int, str, dict[str, Any]]:
    recorder = Recorder()
    supervision._log_event((recorder,), line)  # type: ignore[arg-type]
    (only,) = recorder.lines
    return only


def test_an_ordinary_line_keeps_its_level_time_and_values() -> None:
    level, event, values = logged(b'{"level":"warning","event":"hi","timestamp":"2026-01-02T03:04:05Z","n":1}')
    assert (level, event, values["n"], values["timestamp"].year) == (30, "hi", 1, 2026)


def test_an_exception_becomes_the_detail_that_the_ui_shows() -> None:
    assert logged(b'{"level":"error","event":"x","exception":[{"a":1}]}')[2] == {"error_detail": [{"a": 1}]}


@pytest.mark.parametrize("key", ["target", "msg", "self"])
def test_keywords_of_the_logging_call_can_be_logged(key: str) -> None:
    assert logged(b'{"level":"info","event":"x","%s":"value"}' % key.encode())[2] == {f"{key}_": "value"}


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b"[1,2]",
        b'"text"',
        b"{}",
        b'{"event":"no level"}',
        b'{"level":7,"event":"x"}',
        b'{"level":"info","timestamp":"yesterday"}',
        b'{"level":"info","timestamp":{"a":1}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 5000,
    ],
)
def test_a_broken_line_is_still_a_line(line: bytes) -> None:
    logged(line)


@given(st.binary(max_size=200))
def test_nothing_raises(line: bytes) -> None:
    logged(line)
