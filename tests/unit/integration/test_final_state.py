"""What a task has reported, and how its process then ended."""

from __future__ import annotations

import signal
from contextlib import closing
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.api.datamodels._generated import TaskInstanceState
from airflow.sdk.execution_time import comms
from tests.unit.integration.supervised import Supervised

from airflow_isolation.bridge.ending import Ending
from airflow_isolation.bridge.started_agent import NegativeSignal
from airflow_isolation.cgroups import Usage
from airflow_isolation.integration.seams.supervision import NeverBegan

NOW = datetime.now(tz=timezone.utc)
SUCCEEDED = comms.SucceedTask(state="success", end_date=NOW, task_outlets=[], outlet_events=[])


class Server:
    """What the API server is asked for, and takes."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @property
    def task_instances(self) -> Any:
        return SimpleNamespace(
            succeed=lambda **_: self.asked.append("succeed"),
            reschedule=lambda *_: self.asked.append("reschedule"),
            finish=lambda **values: self.asked.append(str(values["state"])),
        )


def end(task: Supervised, code: int) -> None:
    task.workload.code = NegativeSignal(code) if code < 0 else code
    task.hang_up()
    task.supervisor._monitor_subprocess()
    task.supervisor.update_task_state_if_needed()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("code", [-signal.SIGKILL, -signal.SIGTERM, 1])
@pytest.mark.parametrize(
    ("report", "asked", "state"),
    [
        (SUCCEEDED, "succeed", "success"),
        (comms.RescheduleTask(reschedule_date=NOW, end_date=NOW), "reschedule", "up_for_reschedule"),
    ],
)
def test_what_the_server_was_told_holds(code: int, report: Any, asked: str, state: str) -> None:
    server = Server()
    with closing(Supervised(server)) as task:
        task.ask(report)
        end(task, code)
        assert server.asked == [asked]
        assert task.supervisor.final_state == state
        text, values = task.log.lines[-1]
        assert "the reported state holds" in text
        assert values == {"state": state, "exit_code": code}


@pytest.mark.parametrize("code", [-signal.SIGKILL, 1])
def test_a_failure_that_was_only_announced_is_reported_at_the_end(code: int) -> None:
    server = Server()
    with closing(Supervised(server)) as task:
        task.ask(comms.TaskState(state=TaskInstanceState.FAILED))
        end(task, code)
        assert server.asked == [str(TaskInstanceState.FAILED)]


@pytest.mark.parametrize(("outside", "guessed"), [("Somebody killed its shim", False), ("", True)])
def test_memory_is_only_suspected_where_no_other_end_is_known(outside: str, guessed: bool) -> None:
    """Stock takes each SIGKILL for memory that ran out."""
    with closing(Supervised(Server())) as task:
        task.workload.ending = Ending(code=-signal.SIGKILL, usage=Usage(wall=1), from_outside=outside)
        end(task, -signal.SIGKILL)
        assert any("out of memory" in text for text, _ in task.log.lines) is guessed


def test_of_a_task_that_never_began_the_server_is_told_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who puts it off tells the server; and its log goes away after that."""
    server = Server()
    with closing(Supervised(server)) as task:
        monkeypatch.setattr(type(task.supervisor), "_upload_logs", lambda _: server.asked.append("log"))
        task.workload.not_begun = "somebody killed it"
        task.workload.code = NegativeSignal(-signal.SIGKILL)
        task.hang_up()
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(NeverBegan, match="before any of its code ran: somebody killed it"):
            task.supervisor.wait()
        assert server.asked == []
        assert signal.getsignal(signal.SIGTERM) == handler
