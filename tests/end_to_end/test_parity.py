"""The same DAGs give the same states and XComs with the flag empty, docker and containerd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow, Run

pytestmark = pytest.mark.on("stock", "containerd", "docker")


@pytest.mark.dag("exchange")
def test_xcoms_go_both_ways_and_through_mapped_tasks(run: Run) -> None:
    assert set(run.states.values()) == {"success"}
    assert run.xcoms == {
        "numbers.return_value": [1, 2, 3],
        "numbers.greeting": {"text": "grüße", "list": [1, None, 2.5]},
        "double[0].return_value": 2,
        "double[1].return_value": 4,
        "double[2].return_value": 6,
        "total.return_value": {"sum": 12, "greeting": {"text": "grüße", "list": [1, None, 2.5]}},
        "total.sum": 12,
        "total.greeting": {"text": "grüße", "list": [1, None, 2.5]},
    }


@pytest.mark.dag("lookups")
def test_variables_and_connections_come_from_the_database_and_from_the_worker(run: Run) -> None:
    assert run.states == {"variables": "success", "connections": "success", "missing_connection": "failed"}
    assert run.xcoms == {
        "variables.return_value": ["the database's variable", "the worker's variable", "by the task", "not there"],
        "connections.return_value": [
            ["http", "service.example", "me", "secret-of-the-database", 8443, {"timeout": 5}],
            ["postgres", "db.example", "me", "secret-of-the-worker", 5433, {"sslmode": "require"}],
        ],
    }


@pytest.mark.dag("failure")
def test_a_failure_is_reported_with_its_traceback_and_its_callback(run: Run) -> None:
    assert run.states == {"fails": "failed", "never": "upstream_failed", "afterwards": "success"}
    assert run.xcoms == {"afterwards.return_value": "ran"}
    assert "the task's own mistake" in run.tasks["fails"].text
    assert run.tasks["fails"].said("callback for try 1")


@pytest.mark.dag("retry")
def test_a_retry_ends_well(run: Run, airflow: Airflow) -> None:
    assert run.state == "success"
    assert run.xcoms == {"second_time_lucky.return_value": 2}
    first = airflow.logs("retry", "once", "second_time_lucky")[1]
    assert any(event["event"] == "callback for try 1" for event in first)


@pytest.mark.dag("skips")
def test_skipping_and_branching(run: Run) -> None:
    assert run.states == {"skipped": "skipped", "choose": "success", "left": "success", "right": "skipped"}


@pytest.mark.dag("deferral")
def test_a_deferred_task_goes_on_after_its_trigger(run: Run) -> None:
    assert run.states == {"waits": "success"}
    assert run.xcoms == {"waits.return_value": ["kept over the wait", "datetime"]}


@pytest.mark.dag("abrupt")
def test_ends_without_python_are_failures(run: Run) -> None:
    assert run.states == {"exits": "failed", "kills_itself": "failed"}
    assert run.xcoms == {}


@pytest.mark.dag("abrupt")
def test_an_exit_code_is_in_the_log(run: Run) -> None:
    log = run.tasks["exits"].events
    assert any(e["event"] == "Process exited abnormally" and e.get("exit_code") == 3 for e in log), run.tasks[
        "exits"
    ].text


@pytest.mark.dag("abrupt")
def test_a_killed_process_is_named_as_stock_names_it(run: Run) -> None:
    log = run.tasks["kills_itself"].text
    assert "Process terminated by signal. Likely out of memory error (OOM)" in log
    assert '"signal": -9' in log


@pytest.mark.dag("timeouts")
def test_an_execution_timeout_ends_the_task(run: Run) -> None:
    assert run.states == {"too_slow": "failed"}
    assert "AirflowTaskTimeout" in run.tasks["too_slow"].text


@pytest.mark.dag("lines")
def test_ten_thousand_lines_of_each_kind_arrive_whole_and_in_order(run: Run) -> None:
    assert run.states == {"many": "success"}
    said = [str(event["event"]) for event in run.tasks["many"].events]
    for kind in ("printed", "logged"):
        assert [line for line in said if line.startswith(kind)] == [f"{kind} {number}" for number in range(10_000)]


@pytest.mark.dag("bash")
def test_a_bash_operator_answers_fails_and_skips(run: Run) -> None:
    assert run.states == {"answers": "success", "fails": "failed", "skips": "skipped"}
    assert run.xcoms["answers.return_value"] == "last"
