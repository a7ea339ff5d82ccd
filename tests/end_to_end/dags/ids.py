"""Names as strange and as long as Airflow takes them."""

from __future__ import annotations

from airflow.sdk import dag, get_current_context, task

# Airflow takes 250 characters, but not in its log's path: file names end at 255, "dag_id=" and "task_id=" included.
LONGEST_DAG_ID, LONGEST_TASK_ID = 248, 247


def named(dag_id: str, task_id: str) -> None:
    @dag(dag_id=dag_id, schedule=None)
    def names() -> None:
        @task(task_id=task_id)
        def tell() -> list[str]:
            ti = get_current_context()["ti"]
            return [ti.dag_id, ti.task_id, ti.run_id]

        tell()

    names()


named("a__b--c..d_", "__x__.-y")
named("größe_日本", "aufgabe_ß")
named("d" * LONGEST_DAG_ID, "t" * LONGEST_TASK_ID)
