"""Lines of the structured log channel, whatever stands in them."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_isolation.integration.seams import log_event
from airflow_isolation.integration.seams.log_event import LogEvent, Source

SOURCE = Source("task", datetime.now(tz=timezone.utc), {"dag_id": "sales", "ti_id": "1"})


def logged(line: bytes) -> LogEvent:
    return log_event.read(line, SOURCE)


def record(**fields: Any) -> LogEvent:
    return logged(json.dumps(fields).encode())


def now(**offset: float) -> str:
    return (datetime.now(tz=timezone.utc) + timedelta(**offset)).isoformat()


def test_an_ordinary_line_keeps_its_level_time_and_values() -> None:
    level, text, values = record(level="warning", event="hi", timestamp=now(), n=1, logger="my.module")
    assert (level, text, values["n"], values["logger"]) == (30, "hi", 1, "task.my.module")
    assert abs(values["timestamp"].timestamp() - time.time()) < 60


@pytest.mark.parametrize(
    ("claimed", "shown"),
    [
        ("airflow_isolation.supervision", "task.airflow_isolation.supervision"),
        ("task", "task.task"),
        ("task.stdout", "task.stdout"),
        ("", "task."),
        (5, "task.5"),
    ],
)
def test_a_line_from_inside_has_a_logger_from_inside(claimed: Any, shown: str) -> None:
    assert record(event="Task runs in a container", logger=claimed).values["logger"] == shown


@pytest.mark.parametrize("line", [b'{"event":"x"}', b"not json", b"[]"])
def test_a_line_without_a_logger_has_one_from_inside(line: bytes) -> None:
    assert logged(line).values["logger"] == "task.log"


@pytest.mark.parametrize("claimed", [now(days=-1), now(days=1), now(seconds=-90), "yesterday", {"a": 1}, 5, True])
def test_a_time_that_can_not_be_is_not_believed(claimed: Any) -> None:
    values = record(event="x", timestamp=claimed).values
    assert "timestamp" not in values
    assert values["claimed_timestamp"] == str(claimed)


def test_a_line_says_whose_it_is_truly() -> None:
    assert record(event="x", dag_id="payroll", try_number=3).values == {
        "logger": "task.log",
        "dag_id": "sales",
        "try_number": 3,
    }


def test_an_exception_becomes_the_detail_that_the_ui_shows() -> None:
    values = logged(b'{"level":"error","event":"x","exception":[{"a":1}]}').values
    assert values == {"error_detail": [{"a": 1}], "logger": "task.log"}


@pytest.mark.parametrize(
    "key", ["target", "msg", "self", "positional_args", "exc_info", "stack_info", "stack", "logger_name", "_record"]
)
def test_what_loggers_take_for_their_own_can_be_logged(key: str) -> None:
    assert record(event="x", **{key: "value"}).values == {f"{key}_": "value", "logger": "task.log"}


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
    log_event.read_cut(line, 5, SOURCE)


@given(st.binary(max_size=200))
def test_nothing_raises(line: bytes) -> None:
    logged(line)
    log_event.read_cut(line, 5, SOURCE)


# --- records that are too long


NOTE = " … (7 bytes of this record are left out)"


def cut(line: str) -> LogEvent:
    return log_event.read_cut(line.encode(), 7, SOURCE)


def test_a_long_event_is_one_record_with_what_came_before_it() -> None:
    event = cut(f'{{"timestamp":"{now()}","level":"error","n":{{"a":[1]}},"event":"it began \\u00e4 \\"so\\"')
    assert (event.level, event.text) == (40, f'it began ä "so"{NOTE}')
    assert event.values["n"] == {"a": [1]}
    assert "timestamp" in event.values


def test_a_long_value_is_cut_and_the_event_says_so() -> None:
    event = cut('{"event":"short","level":"info","rows":[[1,2],[3,')
    assert event.text == f"short{NOTE}"
    assert event.values["rows"] == f"[[1,2],[3,{NOTE}"


@pytest.mark.parametrize(
    "text", ["", "{", '{"event":"short"', '{"event":"short",', '{"event":"short","le', '{"event":']
)
def test_whatever_is_cut_the_bytes_are_told(text: str) -> None:
    assert NOTE in cut(text).text


@given(
    st.dictionaries(st.text(), st.text() | st.integers() | st.lists(st.text()), max_size=5),
    st.integers(min_value=1),
)
def test_a_record_can_be_cut_anywhere(fields: dict[str, Any], where: int) -> None:
    whole = json.dumps({"event": "first", **fields})
    event = cut(whole[: where % len(whole)])
    assert event.text.endswith(NOTE)
    assert event.values["logger"].startswith("task.")
