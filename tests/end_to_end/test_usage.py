"""What a try has used is the last word of its log, and the kernel's killing for memory is called so, and nothing else is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tests.processes import wait_until

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow, Run, Task

pytestmark = pytest.mark.dag("usage")

MIB = 1024 * 1024


@pytest.fixture
def run(airflow: Airflow) -> Run:
    """Once every task's last word is said: that is after the server has heard of its state."""
    for task in airflow.finished("usage").tasks:
        log = airflow.log_file("usage", "once", task)
        wait_until(lambda log=log: "Task ended with " in log.read_text(), 60, f"the last word of {task}")  # type: ignore[misc]
    return airflow.finished("usage")


def last_words(task: Task) -> str:
    (line,) = (str(event["event"]) for event in task.events if str(event["event"]).startswith("Task ended with "))
    return line


def said_of_memory(task: Task) -> list[tuple[str, str]]:
    """Level and text of what is said of the kernel's killing."""
    return [(event["level"], str(event["event"])) for event in task.events if "memory ran out" in str(event["event"])]


def test_a_try_says_what_it_has_used(run: Run) -> None:
    words = last_words(run.tasks["known"])
    found = re.fullmatch(
        r"Task ended with exit code 0: wall (?P<wall>[\d.]+) s; "
        r"CPU (?P<cpu>[\d.]+) s \(user [\d.]+ s, system [\d.]+ s, throttled [\d.]+ s\); "
        r"memory peak (?P<peak>\d+) MiB of 400 MiB \(\d+ %\); OOM kills 0"
        r"(; processes peak \d+ of 512)?(; read .*, wrote .*)?",
        words,
    )
    assert found, words
    assert float(found["wall"]) >= 1
    assert 2 <= float(found["cpu"]) < 60
    assert 100_000_000 / MIB <= float(found["peak"]) <= 400
    assert said_of_memory(run.tasks["known"]) == []


def test_a_task_over_its_limit_is_named_with_limit_peak_and_setting(run: Run) -> None:
    task = run.tasks["over_its_limit"]
    assert task.state == "failed"
    ((level, text),) = said_of_memory(task)
    assert level == "error"
    assert text.startswith(
        "The kernel killed this workload because memory ran out: it reached its own limit, memory = 400 MiB; its peak was "
        "400 MiB (100 %)."
    )
    assert text.endswith("Raise resources.memory.")
    assert last_words(task).startswith("Task ended with signal SIGKILL: ")
    assert "OOM kills 1" in last_words(task)


def test_the_process_that_was_killed_is_named(run: Run) -> None:
    ((_, text),) = said_of_memory(run.tasks["over_its_limit"])
    assert re.search(r" Killed: (airflow worker|python\S*) \(process \d+\)\. ", text), text


def test_a_kill_from_elsewhere_is_not_called_want_of_memory(run: Run) -> None:
    task = run.tasks["killed_from_elsewhere"]
    assert task.state == "failed"
    assert said_of_memory(task) == []
    assert last_words(task).startswith("Task ended with signal SIGKILL: ")
    assert "OOM kills 0" in last_words(task)


def test_a_child_that_was_killed_is_a_warning_when_the_task_succeeds(run: Run) -> None:
    task = run.tasks["child_over_the_limit"]
    assert task.state == "success"
    ((level, text),) = said_of_memory(task)
    assert level == "warning"
    assert text.startswith(
        "The kernel killed a process of this workload because memory ran out, and the workload went on"
    )


def test_a_kill_from_elsewhere_is_none_of_memorys_though_a_child_was_killed_for_it(run: Run) -> None:
    task = run.tasks["first_a_child_then_killed_from_elsewhere"]
    assert task.state == "failed"
    ((_, text),) = said_of_memory(task)
    assert "and the workload went on" in text
