"""Names as strange and as long as Airflow takes them."""

from __future__ import annotations

from airflow.sdk import dag, get_current_context, task

LONG = 200


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
named("d" * LONG, "t" * LONG)
