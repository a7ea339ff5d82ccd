"""``airflow containers images list|import|remove``."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from airflow_isolation.errors import ImageInvalid
from airflow_isolation.integration.cli import formats
from airflow_isolation.integration.cli.backends import ask_each, choose, choose_one
from airflow_isolation.integration.cli.outcome import OK, command, say, write_line
from airflow_isolation.integration.cli.output import Column, print_rows
from airflow_isolation.integration.connection import connect

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

    from airflow_isolation.integration.cli.output import Row
    from airflow_isolation.runtime.interface import ContainerRuntime, Image, Progress
    from airflow_isolation.settings.effective import ConnectionSettings, EffectiveSettings

_SHORT: Final = len("sha256:") + 12

COLUMNS: Final = (
    Column("image"),
    Column("digest", lambda digest: digest[:_SHORT]),
    Column("architecture"),
    Column("size", formats.size),
    Column("created", lambda created: created[: len("2026-01-31")]),
)


@command
def list_images(arguments: Namespace) -> int:
    """Print every image in the stores of the daemons in use."""

    def rows(connection: ConnectionSettings, runtime: ContainerRuntime) -> list[Row]:
        return [_row(connection.backend, image) for image in runtime.list_images()]

    choice = choose(arguments)
    answers, code = ask_each(choice, rows)
    columns = (Column("backend"), *COLUMNS) if len(choice.connections) > 1 else COLUMNS
    found = [each for answer in answers for each in answer]
    hint = "No image is here. `airflow containers images import FILE` brings one."
    print_rows(found, columns, arguments.output, nothing=hint)
    return code


@command
def import_image(arguments: Namespace) -> int:
    """Load an archive. The names of its images go to stdout, progress to stderr."""
    archive = Path(arguments.archive)
    connection = choose_one(arguments)
    if not archive.is_file():
        what = "is not a file" if archive.exists() else "does not exist"
        raise ImageInvalid(f"{archive} {what}", hint="Name an image archive, as `docker save` writes it")
    with connect(connection) as runtime, shown_progress() as progress:
        images = runtime.import_image(archive.absolute(), reference=arguments.name, progress=progress)
    for image in images:
        write_line(f"{image.reference} {image.digest}")
    return OK


@command
def remove_image(arguments: Namespace) -> int:
    """Remove the name, and the content when nothing else needs it."""
    connection = choose_one(arguments)
    with connect(connection) as runtime:
        runtime.remove_image(arguments.reference)
    write_line(f"Removed {arguments.reference} from {connection.backend}.")
    return OK


def have_image(settings: EffectiveSettings) -> None:
    """Pull a workload's image if it is missing, and show progress. Errors come at once, because a person waits.

    :raises IsolationError: the image can't be used; also when a daemon or registry is out of reach, which a worker would
        wait for.
    """
    with connect(settings.connection) as runtime, shown_progress() as progress:
        runtime.ensure_image(
            settings.image, settings.image_pull_policy, progress=progress, timeout=settings.image_pull_timeout
        )


@contextmanager
def shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A function that shows progress: a bar for each layer on a terminal, else a line for each step."""
    if not sys.stderr.isatty():
        told: set[tuple[str, str]] = set()

        def tell(step: Progress) -> None:
            if (step.name, step.event) not in told:
                told.add((step.name, step.event))
                say(f"{step.event} {_short(step.name)} {formats.size(step.total) if step.total else ''}".rstrip())

        yield tell
        return

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    # Names come from the archive, so rich must not read them as markup.
    shape = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
    )
    with Bars(*shape, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def draw(step: Progress) -> None:
            if step.name not in tasks:
                tasks[step.name] = bars.add_task("", total=None)
            bars.update(
                tasks[step.name],
                description=f"{step.event} {_short(step.name)}",
                completed=step.done,
                total=step.total or None,
            )

        yield draw


def _row(backend: str, image: Image) -> dict[str, object]:
    return {
        "backend": backend,
        "image": image.reference,
        "digest": image.digest,
        "architecture": image.architecture or None,
        "size": image.size or None,
        "created": image.created_at.isoformat() if image.created_at else None,
    }


def _short(name: str) -> str:
    return name[:_SHORT] if name.startswith("sha256:") else name
