"""Ids never end in a container's name; they may be what Airflow lets them be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.end_to_end.airflow_processes import Airflow

# As long as Airflow's own log can be written: file names end at 255, "dag_id=", "task_id=" and "run_id=" included.
LONGEST_DAG_ID, LONGEST_TASK_ID, LONGEST_RUN_ID = 248, 247, 248


@pytest.mark.parametrize(
    ("dag_id", "task_id", "run_id"),
    [
        ("a__b--c..d_", "__x__.-y", "manual__2026-01-01T00:00:00+00:00"),
        ("größe_日本", "aufgabe_ß", "r~1:2.3__4"),
        ("d" * LONGEST_DAG_ID, "t" * LONGEST_TASK_ID, "r" * LONGEST_RUN_ID),
    ],
    ids=["doubled separators", "unicode", "long"],
)
def test_a_task_runs_whatever_its_ids_are(airflow: Airflow, dag_id: str, task_id: str, run_id: str) -> None:
    airflow.trigger(dag_id, run_id)
    run = airflow.finished(dag_id, run_id)
    assert run.states == {task_id: "success"}, run.tasks[task_id].text
    assert run.xcoms == {f"{task_id}.return_value": [dag_id, task_id, run_id]}


def test_airflow_itself_refuses_a_slash(airflow: Airflow) -> None:
    body = {"dag_run_id": "a/b", "logical_date": None}
    assert airflow.client.post("/api/v2/dags/exchange/dagRuns", json=body).status_code == 400
