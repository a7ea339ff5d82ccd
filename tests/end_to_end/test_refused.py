"""What can't be had is refused in words in the task's log; no user code runs, and nothing is left."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.end_to_end.airflow_processes import Airflow, Run, Task

WORDS = {
    "absent_image": ("could not use the image localhost/nobody/has-this:1", "image_pull_policy"),
    "no_python": ("test-no-python", "python3"),
    "no_airflow": ("test-no-airflow", "has no Airflow"),
    "other_minor": ("has Airflow 3.2.0, this worker has 3.3.2",),
    "no_such_interpreter": ("/opt/none/bin/python",),
    "not_an_interpreter": ("ended with exit code 0 before the agent spoke",),
    "mute_interpreter": ("did not report within 3 seconds", "agent.py"),
    "missing_source": ("missing",),
    "symlink_source": ("link",),
    "forbidden_source": ("mounting /etc is not allowed",),
    "unknown_user": ("nobody-of-that-name",),
    "root": ("root is not allowed",),
    "unknown_key": ("executor_config", "imag"),
    "bad_quantity": ("executor_config", "resources.memory", "much"),
    "wrong_type": ("executor_config", "volumes"),
    "forbidden_network": ("the network sales is not allowed",),
    "too_much_memory": ("max_memory",),
    "bad_image": ("Not An Image",),
    "hook_fails": ("get_docker_runtime_image in airflow_local_settings", "the hook knows no such image"),
}
YAML_WORDS = {
    "yaml_unknown_key": ("line 3", "container.volume"),
    "yaml_wrong_type": ("line 3", "container.environment"),
    "yaml_no_mapping": ("container",),
    "yaml_bad_quantity": ("line 3", "container.resources.memory", "2Gigs"),
    "yaml_nested": ("yaml_nested.yaml",),
}


def refusal(task: Task) -> str:
    """The one error of a task that did not start."""
    assert task.state == "failed"
    assert "user code ran" not in task.text
    errors = [event for event in task.events if event["event"] == "The task could not be started in a container"]
    assert len(errors) == 1, task.text
    return str(errors[0]["error"])


@pytest.mark.dag("refused")
@pytest.mark.parametrize("name", WORDS)
def test_a_container_that_cannot_be_had_is_refused_in_words(run: Run, name: str) -> None:
    said = refusal(run.tasks[name])
    assert all(words in said for words in WORDS[name]), said


@pytest.mark.dag("refused")
def test_every_refusal_is_looked_at(run: Run) -> None:
    assert run.tasks.keys() == WORDS.keys()


@pytest.mark.parametrize("dag_id", [pytest.param(dag_id, marks=pytest.mark.dag(dag_id)) for dag_id in YAML_WORDS])
def test_a_mistake_in_the_yaml_is_named_by_file_line_and_key(run: Run, dag_id: str) -> None:
    said = refusal(run.tasks["never"])
    assert f"{dag_id}.yaml" in said
    assert all(words in said for words in YAML_WORDS[dag_id]), said
    assert len(said) < 1000


def test_an_unknown_value_of_the_flag_stops_every_component(airflow: Airflow) -> None:
    done = airflow.run("version", AIRFLOW__CORE__TASK_EXECUTION_RUNTIME="podman")
    assert done.returncode != 0
    assert "task_execution_runtime" in done.stderr
    assert "podman" in done.stderr
    assert "containerd" in done.stderr


def without_scheduler(airflow: Airflow, date: str, **environment: str) -> tuple[str, str]:
    """State and log of the one task of a DAG under `airflow dags test --use-executor`, with another configuration."""
    dag_id = "plain"
    options = {
        "AIRFLOW__WORKERS__MISSING_DAG_RETRIES": "0",
        # Of several workers stock's LocalExecutor.end() waits for ever for one, if another ends while it counts them.
        "AIRFLOW__CORE__PARALLELISM": "1",
    }
    # Or the scheduler of this Airflow, which has the usual configuration, takes the task.
    airflow.call("PATCH", f"/dags/{dag_id}", json={"is_paused": True})
    try:
        done = airflow.run("dags", "test", dag_id, date, "--use-executor", **options, **environment)
    finally:
        airflow.call("PATCH", f"/dags/{dag_id}", json={"is_paused": False})
    runs = airflow.call("GET", f"/dags/{dag_id}/dagRuns")["dag_runs"]
    ids = [run["dag_run_id"] for run in runs if str(run["logical_date"]).startswith(date)]
    assert len(ids) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    (instance,) = airflow.task_instances(dag_id, ids[0])
    log = airflow.log_file(dag_id, ids[0], instance["task_id"])
    return str(instance["state"]), log.read_text() if log.exists() else done.stdout + done.stderr


def test_dags_test_with_the_executor_runs_in_a_container(airflow: Airflow) -> None:
    state, log = without_scheduler(airflow, "2026-01-01")
    assert state == "success", log
    assert "Task runs in a container" in log


def test_no_image_is_said(airflow: Airflow) -> None:
    state, log = without_scheduler(airflow, "2026-01-02", AIRFLOW__CONTAINER_RUNTIME__IMAGE="")
    assert state == "failed"
    assert "image" in log
    assert "The task could not be started in a container" in log


@pytest.mark.parametrize("kind", ["missing", "not a socket"])
def test_a_daemon_that_is_not_there_is_said(airflow: Airflow, backend: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    if kind == "not a socket":
        path.write_text("")
    date = {"missing": "2026-01-03", "not a socket": "2026-01-04"}[kind]
    state, log = without_scheduler(airflow, date, **{f"AIRFLOW__{backend.upper()}_RUNTIME__SOCKET_PATH": str(path)})
    assert state == "failed"
    assert str(path) in log
