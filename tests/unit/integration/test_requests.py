"""What a task asks its supervisor for, and what a hostile one gets."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from airflow.sdk.execution_time import comms
from tests.unit.integration.supervised import Supervised

from airflow_isolation.integration.seams import supervision
from airflow_isolation.integration.seams.brief_log import EXCEPTION_LIMIT, VALUE_LIMIT, BriefLog, brief

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def task() -> Iterator[Supervised]:
    task = Supervised()
    yield task
    task.close()


LARGE = "x" * 100_000


def length(entry: Any) -> int:
    return sum(len(str(value)) for value in entry.values())


@pytest.mark.parametrize("body", [{"type": "NoSuchThing", "value": LARGE}, {"type": "GetVariable", LARGE: LARGE}, {}])
def test_an_unknown_request_is_answered_and_logged_in_short(task: Supervised, body: dict[str, Any]) -> None:
    with structlog.testing.capture_logs() as logs:
        answer = task.ask(body)
    assert "does not know this request" in answer.error["detail"]["message"]
    assert not task.workload.signals
    (entry,) = logs
    assert "body" in entry
    assert length(entry) < 4 * VALUE_LIMIT


def test_a_request_with_very_many_mistakes_costs_little(task: Supervised) -> None:
    wrong = {"type": "SetXCom", "key": "k", "dag_id": "d", "run_id": "r", "task_id": "t", "value": [b""] * 1000}
    assert "1000 values" in task.ask(wrong).error["detail"]["message"]


def test_a_task_that_reads_no_answers_holds_its_worker_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "ANSWER_TIMEOUT", 0.05)
    task = Supervised()
    request = comms._RequestFrame(id=1, body={"type": "NoSuchThing" + "x" * 500}).as_bytes()
    while not task.workload.signals:
        task.theirs["requests"].sendall(request)
        task.serve()
    assert task.workload.signals == [signal.SIGKILL]
    assert "did not read its answer" in task.log.lines[0][1]["error"]
    task.close()


def test_a_request_that_fails_is_logged_in_short(task: Supervised) -> None:
    class Failing:
        class variables:  # noqa: N801
            @staticmethod
            def set(*_: Any) -> None:
                raise RuntimeError(LARGE)

    task.supervisor.client = Failing()  # type: ignore[assignment]
    with structlog.testing.capture_logs() as logs:
        answer = task.ask(comms.PutVariable(key="k", value=LARGE, description=None))
    assert answer.error
    assert logs
    for entry in logs:
        assert length(entry) < 2 * EXCEPTION_LIMIT
    (failure,) = (entry for entry in logs if "exception" in entry)
    assert "RuntimeError" in failure["exception"]


def test_short_values_are_logged_as_they_are() -> None:
    with structlog.testing.capture_logs() as logs:
        BriefLog(structlog.get_logger()).info("hello", a=1, b="two", c=None, d=True)
    assert logs == [{"event": "hello", "log_level": "info", "a": 1, "b": "two", "c": None, "d": True}]


def test_an_exception_is_told_with_its_traceback() -> None:
    with structlog.testing.capture_logs() as logs:
        try:
            raise RuntimeError("gone")
        except RuntimeError:
            BriefLog(structlog.get_logger()).exception("failed", body={"a": 1})
    (entry,) = logs
    assert entry["log_level"] == "error"
    assert "RuntimeError: gone" in entry["exception"]


def test_a_message_is_told_by_its_name() -> None:
    told = brief(comms.PutVariable(key="k", value=LARGE, description=None))
    assert told.startswith("PutVariable(key='k', value='xxx")
    assert len(told) < 2 * VALUE_LIMIT
