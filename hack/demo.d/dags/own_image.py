"""Each task has its own image: own_image.yaml says which, and how much of the machine it may use."""

from __future__ import annotations

from airflow.sdk import dag, task


@dag(schedule=None)
def own_image() -> None:
    @task
    def cow() -> str:
        # Only the image of this task has the package, so it is imported where it is used.
        import cowsay

        return cowsay.get_output_string("cow", "This package is in my image alone")

    @task
    def plain(picture: str) -> None:
        from importlib.util import find_spec

        print(picture)
        if find_spec("cowsay") is not None:
            raise RuntimeError("This image should not have cowsay")

    plain(cow())


own_image()
