"""The last words of a try, and its metrics through Airflow's own facade."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from airflow.sdk.observability.metrics import stats_utils
from structlog.testing import CapturingLogger

from airflow_isolation.bridge.ending import Ending
from airflow_isolation.cgroups import Limit, OutOfMemory, Usage
from airflow_isolation.integration import end_of_try
from airflow_isolation.integration.seams import metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

WHAT = SimpleNamespace(dag_id="sales", task_id="load", queue="big")
TAGS = {"dag_id": "sales", "task_id": "load", "queue": "big"}
USAGE = Usage(wall=2, cpu=1.5, memory_peak=64, memory_limit=64, oom_kills=1)


class FakeBackend:
    """Stands in for statsd and OpenTelemetry, which are other people's."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str, Any, dict[str, str]]] = []

    def timing(self, stat: str, dt: float, *, tags: dict[str, str]) -> None:
        self.sent.append(("timing", stat, dt, tags))

    def gauge(self, stat: str, value: float, *, tags: dict[str, str], **_: object) -> None:
        self.sent.append(("gauge", stat, value, tags))

    def incr(self, stat: str, count: int, *, tags: dict[str, str]) -> None:
        self.sent.append(("incr", stat, count, tags))


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    fake = FakeBackend()
    monkeypatch.setattr(stats_utils, "get_stats_factory", lambda: lambda: fake)
    metrics._initialize.cache_clear()
    yield fake
    metrics._initialize.cache_clear()


def said(*, killing: OutOfMemory | None, state: str, code: int = 0) -> list[tuple[str, str]]:
    captured = CapturingLogger()
    log = structlog.wrap_logger(captured, processors=[lambda _, __, event: {"event": event["event"]}])
    ending = Ending(code=code, usage=USAGE, out_of_memory=killing)
    end_of_try.tell(log, ending, state=state, container="task-1", what=WHAT)
    return [(call.method_name, call.kwargs["event"]) for call in captured.calls]


def test_a_try_ends_with_what_it_has_used(backend: FakeBackend) -> None:
    words = "Task ended with exit code 0: wall 2.0 s; CPU 1.5 s; memory peak 64 bytes of 64 bytes (100 %); OOM kills 1"
    assert said(killing=None, state="success") == [("info", words)]


@pytest.mark.parametrize(
    ("fatal", "state", "level"),
    [
        (True, "failed", "error"),
        (True, "up_for_retry", "error"),
        (False, "success", "warning"),
        # It lived on, and then failed: most likely of what it missed.
        (False, "failed", "error"),
    ],
)
def test_the_kernels_killing_is_as_serious_as_what_came_of_it(
    backend: FakeBackend, fatal: bool, state: str, level: str
) -> None:
    killing = OutOfMemory(fatal=fatal, limit=Limit.OWN, size=64)
    first, last = said(killing=killing, state=state, code=-9)
    assert first == (level, killing.sentence)
    assert last[1].startswith("Task ended with signal SIGKILL: ")


def test_the_numbers_are_metrics_too(backend: FakeBackend) -> None:
    said(killing=None, state="success")
    assert backend.sent == [
        ("timing", "airflow_isolation.task.wall", 2000, TAGS),
        ("timing", "airflow_isolation.task.cpu", 1500, TAGS),
        ("gauge", "airflow_isolation.task.memory_peak", 64, TAGS),
        ("gauge", "airflow_isolation.task.memory_limit", 64, TAGS),
        ("incr", "airflow_isolation.task.oom_kills", 1, TAGS),
    ]


def test_trouble_with_metrics_does_not_reach_the_task(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no route to statsd")

    monkeypatch.setattr(backend, "timing", fail)
    assert len(said(killing=None, state="success")) == 1


def test_a_container_that_was_killed_from_outside_is_said_to_be(backend: FakeBackend) -> None:
    captured = CapturingLogger()
    log = structlog.wrap_logger(captured, processors=[lambda _, __, event: {"event": event["event"]}])
    ending = Ending(code=-9, usage=Usage(wall=1), from_outside="Somebody did it")
    end_of_try.tell(log, ending, state="failed", container="task-1", what=WHAT)
    assert [(call.method_name, call.kwargs["event"]) for call in captured.calls] == [
        ("error", "Somebody did it"),
        ("info", "Task ended with signal SIGKILL: wall 1.0 s"),
    ]
