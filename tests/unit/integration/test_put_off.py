"""Tries that the infrastructure kept from starting. The server is a stand-in here; the real one is met in tests/end_to_end."""

from __future__ import annotations

import base64
import json
import math
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from airflow_isolation.errors import (
    ContainerFailed,
    ContainerKilled,
    HostTrouble,
    ImagePullFailed,
    IsolationError,
    RuntimeUnreachable,
)
from airflow_isolation.integration import coordinator
from airflow_isolation.integration.seams import put_off as putting_off
from airflow_isolation.integration.seams import supervision
from airflow_isolation.integration.seams.put_off import KEY, PutOff, put_off
from airflow_isolation.integration.seams.supervision import NeverBegan, seconds_to_start

if TYPE_CHECKING:
    from datetime import datetime

WHAT = SimpleNamespace(id="0199-a-try")


@dataclass
class StandInStore:
    """The store of a task's state; it may be out of order."""

    values: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None

    def get(self, id: str, key: str) -> Any:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(value=self.values[key]) if key in self.values else SimpleNamespace(error="not found")

    def set(self, id: str, key: str, value: Any, expires_at: datetime) -> None:
        assert expires_at.tzinfo is not None
        self.values[key] = value


@dataclass
class StandInServer:
    """A client whose server knows one try."""

    reschedules: int = 0
    next_method: str | None = None
    task_state_store: StandInStore = field(default_factory=StandInStore)
    told: list[tuple[Any, ...]] = field(default_factory=list)
    auth: Any = None

    @property
    def task_instances(self) -> StandInServer:
        return self

    def start(self, id: str, pid: int, when: object) -> Any:
        self.told.append(("start", pid))
        return SimpleNamespace(task_reschedule_count=self.reschedules, next_method=self.next_method)

    def reschedule(self, id: str, message: object) -> None:
        self.told.append(("reschedule",))

    def heartbeat(self, id: str, pid: int) -> None:
        self.told.append(("heartbeat", pid))


def decided(server: StandInServer, *, waited: int = 0) -> PutOff:
    return put_off(server, WHAT, pid=7, waited=waited)  # type: ignore[arg-type]


def counted(times: object, of: str = WHAT.id) -> StandInStore:
    return StandInStore({KEY: {"try": of, "times": times}})


def test_a_sensors_own_reschedules_use_up_nothing() -> None:
    server = StandInServer(reschedules=50, task_state_store=counted(2))
    assert decided(server) is PutOff.RESCHEDULED
    assert server.told == [("start", 7), ("reschedule",)]
    assert decided(server) is PutOff.USED_UP
    assert server.told[2:] == [("start", 7)]


def test_each_try_of_a_task_is_put_off_as_often() -> None:
    server = StandInServer(reschedules=50, task_state_store=counted(3, of="0198-the-try-before"))
    assert decided(server) is PutOff.RESCHEDULED
    assert server.task_state_store.values == {KEY: {"try": WHAT.id, "times": 1}}


@pytest.mark.parametrize("error", [httpx.ConnectError("away"), ValueError("no such answer")])
def test_without_the_store_all_reschedules_are_the_bound(error: Exception) -> None:
    for reschedules, outcome in ((2, PutOff.RESCHEDULED), (3, PutOff.USED_UP)):
        server = StandInServer(reschedules=reschedules, task_state_store=StandInStore(error=error))
        assert decided(server) is outcome


@pytest.mark.parametrize("value", [99, -99, "3", None, [3]])
def test_what_a_task_writes_into_the_store_keeps_it_from_nothing_and_gains_it_nothing(value: object) -> None:
    server = StandInServer(reschedules=0, task_state_store=counted(value))
    assert decided(server) is PutOff.RESCHEDULED


def test_a_resumed_task_is_never_rescheduled_which_would_drop_its_event() -> None:
    server = StandInServer(next_method="finish", task_state_store=counted(99))
    assert decided(server) is PutOff.WAITS_HERE
    assert decided(server, waited=3) is PutOff.USED_UP
    assert ("reschedule",) not in server.told


def run(
    monkeypatch: pytest.MonkeyPatch, server: StandInServer, *errors: IsolationError, runs_as: int | None = None
) -> tuple[Any, list[int | None]]:
    """What the coordinator makes of these failures, one after the other; and of which pids the server had been told.

    ``runs_as``: the pid of which the server has been told before the first failure.
    """
    left = list(errors)
    told: list[int | None] = []

    def execute(self: object, *, told_pid: int | None, **_: object) -> Any:
        told.append(told_pid)
        if left:
            raise coordinator._NotStarted(left.pop(0), runs_as)
        return "ran"

    monkeypatch.setattr(coordinator.ContainerCoordinator, "_execute", execute)
    monkeypatch.setattr(putting_off, "put_off_delay", lambda: 0.01)
    monkeypatch.setattr(supervision, "upload_logs", lambda *_: None)
    result = coordinator.ContainerCoordinator(backend="containerd").execute_task(
        what=WHAT,
        dag_rel_path="dag.py",
        bundle_info=None,
        client=server,  # type: ignore[arg-type]
        subprocess_logs_to_stdout=False,
    )
    return result, told


@pytest.mark.parametrize("kind", [RuntimeUnreachable, ImagePullFailed, HostTrouble, ContainerKilled, NeverBegan])
def test_the_infrastructures_trouble_is_put_off(monkeypatch: pytest.MonkeyPatch, kind: type[IsolationError]) -> None:
    server = StandInServer()
    result, _ = run(monkeypatch, server, kind("It failed"))
    assert result.final_state == "up_for_reschedule"
    assert ("reschedule",) in server.told


def test_the_workloads_own_failure_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandInServer()
    with pytest.raises(ContainerFailed, match="It failed"):
        run(monkeypatch, server, ContainerFailed("It failed"))
    assert server.told == []


def test_a_resumed_task_waits_and_starts_as_the_process_that_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = StandInServer(next_method="finish")
    result, told = run(monkeypatch, server, *2 * [RuntimeUnreachable("away")])
    assert result == "ran"
    pid = told[-1]
    assert pid
    assert told == [None, pid, pid]
    assert set(server.told) == {("start", pid), ("heartbeat", pid)}


def test_a_try_that_the_server_knows_is_put_off_as_the_process_that_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes no word of another."""
    server = StandInServer()
    run(monkeypatch, server, NeverBegan("killed"), runs_as=4711)
    assert server.told == [("start", 4711), ("reschedule",)]


def token(seconds: float) -> Any:
    payload = base64.urlsafe_b64encode(json.dumps({"exp": time.time() + seconds}).encode()).rstrip(b"=").decode()
    return SimpleNamespace(token=f"header.{payload}.signature")


def test_a_pull_ends_before_the_token_does() -> None:
    left = seconds_to_start(StandInServer(auth=token(600)))  # type: ignore[arg-type]
    assert 500 < left < 600
    assert seconds_to_start(StandInServer(auth=token(-5))) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("auth", [None, SimpleNamespace(token=""), SimpleNamespace(token="a.b.c")])
def test_a_client_without_such_a_token_has_all_the_time(auth: Any) -> None:
    assert seconds_to_start(StandInServer(auth=auth)) == math.inf  # type: ignore[arg-type]
