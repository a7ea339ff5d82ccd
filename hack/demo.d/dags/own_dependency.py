"""A package at the top of the file that only this file's own image has: own_dependency.yaml names the image.

Neither the DAG processor's Python nor the default image has it, so the file can be parsed, and its task run, in that
image alone.
"""

from __future__ import annotations

import cowsay
from airflow.sdk import dag, task


@dag(schedule=None, tags=[f"cowsay-{cowsay.__version__}"])
def own_dependency() -> None:
    @task
    def cow() -> None:
        print(cowsay.get_output_string("cow", "I was parsed and run in my own image"))

    cow()


own_dependency()
