"""Values travel between containers: XCom, and a task that is mapped over the result of another."""

from __future__ import annotations

from airflow.sdk import dag, task


@dag(schedule=None)
def taskflow() -> None:
    @task
    def numbers() -> list[int]:
        return [2, 3, 5]

    @task
    def square(number: int) -> int:
        return number * number

    @task
    def total(squares: list[int]) -> int:
        result = sum(squares)
        print("The sum of the squares is", result)
        if result != 38:
            raise ValueError(f"4 + 9 + 25 is not {result}")
        return result

    total(square.expand(number=numbers()))


taskflow()
