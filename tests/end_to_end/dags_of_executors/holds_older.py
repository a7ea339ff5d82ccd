"""What this file imports is in its image alone; the file beside it wants another release."""

from __future__ import annotations

from importlib.metadata import version

import cowsay  # type: ignore[import-not-found]
from airflow.sdk import dag, task


@dag(schedule=None, tags=[f"cowsay {version(cowsay.__name__)}"])
def holds_older() -> None:
    @task
    def tell() -> str:
        return version(cowsay.__name__)

    tell()


holds_older()
