"""How tasks end: each is reported rightly, and nothing of it lives on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.end_to_end.traces import running_commands
from tests.processes import wait_until

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow, Run


@pytest.mark.dag("segfault")
def test_a_segfault_ends_the_task(run: Run) -> None:
    """With stock's handler it would spin for ever."""
    assert run.states == {"reads_null": "failed"}
    assert "Received SIGSEGV" in run.tasks["reads_null"].text


@pytest.mark.dag("grandchildren")
def test_grandchildren_end_with_their_task(run: Run) -> None:
    assert run.states == {"leaves_processes": "success", "daemonizes": "success"}
    assert run.tasks["leaves_processes"].said("left")
    wait_until(
        lambda: not any(command.startswith("sleep 8641") for command in running_commands()),
        15,
        "the end of the grandchildren",
    )


@pytest.mark.dag("impersonates")
def test_an_operators_run_as_user_is_refused_by_the_name_of_the_setting(run: Run) -> None:
    assert run.states == {"becomes_somebody": "failed"}
    task = run.tasks["becomes_somebody"]
    assert task.said("Set `run_as_user: somebody` in the container's settings instead")
    assert "user code ran" not in task.text
    assert "Traceback" not in task.text


def test_marked_as_failed_a_task_is_killed_and_its_on_kill_runs_in_the_container(airflow: Airflow) -> None:
    airflow.trigger("killable", name="killable")
    airflow.wait_for_file("killable.running")
    airflow.call("PATCH", "/dags/killable/dagRuns/once/taskInstances/waits", json={"new_state": "failed"})
    killed = airflow.wait_for_file("killable.killed")
    pid, first_process = killed.read_text().split()
    assert int(pid) < 1000, "a pid of the container's own namespace"
    assert first_process.startswith("python")
    run = airflow.finished("killable")
    assert run.states == {"waits": "failed"}
    log = airflow.log_file("killable", "once", "waits")
    wait_until(lambda: "on_kill has done its work" in log.read_text(), 20, "the last words of on_kill in the log")


def test_a_task_that_ignores_signals_is_killed(airflow: Airflow) -> None:
    airflow.trigger("heeds_nothing", name="stubborn")
    airflow.wait_for_file("stubborn.running")
    airflow.call("PATCH", "/dags/heeds_nothing/dagRuns/once/taskInstances/ignores", json={"new_state": "failed"})
    run = airflow.finished("heeds_nothing")
    assert run.states == {"ignores": "failed"}
    log = airflow.log_file("heeds_nothing", "once", "ignores")
    wait_until(lambda: "Task killed!" in log.read_text(), 30, f"the end of the task; its log: {log.read_text()}")


def test_nothing_is_left_of_what_was_killed(airflow: Airflow, quiet: None) -> None:
    """The runs above end when the server says so; the fixture looks when their containers have, too."""
