"""Tries that the infrastructure kept from starting. The server is a stand-in here; the real one is met in tests/end_to_end."""

from __future__ import annotations

import base64
import json
import math
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
from airflow_isolation.integration.seams import supervision
from airflow_isolation.integration.seams.supervision import PutOff, put_off, seconds_to_start

if TYPE_CHECKING:
    from pathlib import Path

WHAT = SimpleNamespace(id="0199-a-try")


@dataclass
class StandInServer:
    """A client whose server knows one try."""

    reschedules: int = 0
    next_method: str | None = None
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


def decided(server: StandInServer, *, before: int | None = 0, waited: int = 0) -> PutOff:
    return put_off(server, WHAT, pid=7, before=before, waited=waited)  # type: ignore[arg-type]


def test_a_sensors_own_reschedules_use_up_nothing() -> None:
    server = StandInServer(reschedules=50)
    assert decided(server, before=2) is PutOff.RESCHEDULED
    assert server.told == [("start", 7), ("reschedule",)]


@pytest.mark.parametrize("before", [3, None])
def test_so_many_times_are_enough(before: int | None) -> None:
    """Where our own can't be counted, Airflow's number of all is the bound."""
    server = StandInServer(reschedules=50)
    assert decided(server, before=before) is PutOff.USED_UP
    assert server.told == [("start", 7)]


def test_a_resumed_task_is_never_rescheduled_which_would_drop_its_event() -> None:
    server = StandInServer(next_method="finish")
    assert decided(server, before=99) is PutOff.WAITS_HERE
    assert decided(server, before=99, waited=3) is PutOff.USED_UP
    assert ("reschedule",) not in server.told


def run(
    monkeypatch: pytest.MonkeyPatch, server: StandInServer, state_dir: Path, *errors: IsolationError
) -> tuple[Any, list[int | None]]:
    """What the coordinator makes of these failures, one after the other; and of which pids the server had been told."""
    left = list(errors)
    told: list[int | None] = []

    def execute(self: object, *, told_pid: int | None, **_: object) -> Any:
        told.append(told_pid)
        if left:
            raise coordinator._NotStarted(left.pop(0), state_dir)
        return "ran"

    monkeypatch.setattr(coordinator.ContainerCoordinator, "_execute", execute)
    monkeypatch.setattr(supervision, "put_off_delay", lambda: 0.01)
    monkeypatch.setattr(supervision, "upload_logs", lambda *_: None)
    result = coordinator.ContainerCoordinator(backend="containerd").execute_task(
        what=WHAT,
        dag_rel_path="dag.py",
        bundle_info=None,
        client=server,  # type: ignore[arg-type]
        subprocess_logs_to_stdout=False,
    )
    return result, told


@pytest.mark.parametrize("kind", [RuntimeUnreachable, ImagePullFailed, HostTrouble, ContainerKilled])
def test_the_infrastructures_trouble_is_put_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[IsolationError]
) -> None:
    server = StandInServer()
    result, _ = run(monkeypatch, server, tmp_path, kind("It failed"))
    assert result.final_state == "up_for_reschedule"
    assert ("reschedule",) in server.told


def test_the_workloads_own_failure_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = StandInServer()
    with pytest.raises(ContainerFailed, match="It failed"):
        run(monkeypatch, server, tmp_path, ContainerFailed("It failed"))
    assert server.told == []


def test_a_resumed_task_waits_and_starts_as_the_process_that_was_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = StandInServer(next_method="finish")
    result, told = run(monkeypatch, server, tmp_path, *2 * [RuntimeUnreachable("away")])
    assert result == "ran"
    pid = told[-1]
    assert pid
    assert told == [None, pid, pid]
    assert set(server.told) == {("start", pid), ("heartbeat", pid)}


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
