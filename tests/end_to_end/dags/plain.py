"""One task, nothing said about its container."""

from __future__ import annotations

from airflow.sdk import dag, task


@dag(schedule=None)
def plain() -> None:
    @task
    def works() -> str:
        return "worked"

    works()


plain()
