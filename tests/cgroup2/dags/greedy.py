from __future__ import annotations

from airflow.sdk import dag, task


@dag(schedule=None)
def greedy() -> None:
    @task
    def use_all() -> None:
        kept = []
        while True:
            kept.append(b"x" * 2**20)

    use_all()


greedy()
