"""A task may write what it likes to its channels: its supervisor survives and reports the right state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Run

pytestmark = pytest.mark.on("containerd")


@pytest.mark.dag("broken_requests")
def test_a_broken_request_ends_that_task(run: Run) -> None:
    """tests/hostile has more of them."""
    assert run.tasks["garbage"].state == "failed"
    assert run.tasks["garbage"].said("The task broke its channel to the supervisor; killing it")


@pytest.mark.dag("strange_logs")
def test_strange_logs_harm_nobody(run: Run) -> None:
    assert run.states == {"endless_line": "success", "strange_events": "success", "strange_text": "success"}
    assert {f"{name}.return_value": "went on" for name in run.states} == run.xcoms


@pytest.mark.dag("strange_logs")
def test_an_endless_line_arrives_in_pieces_and_an_endless_record_cut(run: Run) -> None:
    said = [str(event["event"]) for event in run.tasks["endless_line"].events]
    pieces = [text for text in said if set(text) == {"x"}]
    assert [len(text) for text in pieces] == [1024 * 1024] * 3
    (record,) = (text for text in said if text.startswith("yyy"))
    assert record.count("y") - record.count("bytes") <= 1024 * 1024
    assert "bytes of this record are left out" in record


@pytest.mark.dag("strange_logs")
def test_strange_events_arrive_as_far_as_they_can(run: Run) -> None:
    events = run.tasks["strange_events"].events
    by_text = {str(event["event"]): event for event in events}
    assert by_text["with a target"]["target_"] == "mine"
    assert by_text["with a target"]["logger"] == "task.strange"
    assert by_text["without a level"]["level"] == "info"
    assert by_text["with a strange level"]["level"] == "info"
    assert {"not json at all", "[1, 2, 3]", "the last"} <= by_text.keys()


@pytest.mark.dag("strange_logs")
def test_text_that_is_not_utf8_arrives(run: Run) -> None:
    assert run.tasks["strange_text"].said("not utf-8")
    assert run.tasks["strange_text"].said("to stderr")


@pytest.mark.dag("closed_channels")
def test_a_task_that_hangs_up_ends(run: Run) -> None:
    """Nobody heard the one succeed; the other fails at the first line that it wants to log. Both as in stock."""
    assert run.states == {"closes_requests": "failed", "closes_logs": "failed"}
