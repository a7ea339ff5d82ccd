"""A task that goes over its memory. The kernel ends it, and its log says so, with the setting to raise."""

from __future__ import annotations

from airflow.sdk import dag, task


@dag(schedule=None)
def memory() -> None:
    @task
    def wants_a_gibibyte() -> int:
        return len(b"x" * 2**30)

    wants_a_gibibyte()


memory()
