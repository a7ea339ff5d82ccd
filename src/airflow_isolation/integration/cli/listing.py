"""``airflow containers list``."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from airflow_isolation.integration.cli import formats
from airflow_isolation.integration.cli.backends import ask_each, choose
from airflow_isolation.integration.cli.outcome import command
from airflow_isolation.integration.cli.output import Column, print_rows
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState, Stats

if TYPE_CHECKING:
    from argparse import Namespace

    from airflow_isolation.integration.cli.output import Row
    from airflow_isolation.runtime.interface import Container, ContainerRuntime
    from airflow_isolation.settings.effective import ConnectionSettings

_ENDED: Final = frozenset({ContainerState.STOPPED, ContainerState.UNKNOWN})

_STATE_STYLES: Final = {"running": "green", "created": "cyan", "paused": "yellow", "stopped": "dim", "unknown": "red"}

COLUMNS: Final = (
    Column("container"),
    Column("purpose"),
    Column("dag"),
    Column("run"),
    Column("task"),
    Column("map_index"),
    Column("try"),
    Column("image"),
    Column("state", style=lambda state: _STATE_STYLES.get(state, "")),
    Column("age", formats.duration),
    Column("cpu", formats.seconds),
    Column("memory", formats.size),
)


@command
def list_containers(arguments: Namespace) -> int:
    """Print the containers of all daemons in use; without ``--all`` only those that have not ended."""
    wanted = _labels(arguments)

    def rows(connection: ConnectionSettings, runtime: ContainerRuntime) -> list[Row]:
        listed = [each for each in runtime.list_with_use(wanted) if arguments.all or each[0].state not in _ENDED]
        now = datetime.now(timezone.utc)
        return [row(connection.backend, container, use or Stats(), now) for container, use in listed]

    choice = choose(arguments)
    answers, code = ask_each(choice, rows)
    columns = (Column("backend"), *COLUMNS) if len(choice.connections) > 1 else COLUMNS
    print_rows(
        [each for answer in answers for each in answer],
        columns,
        arguments.output,
        nothing=_nothing(bool(wanted), everything=arguments.all),
    )
    return code


def row(backend: str, container: Container, stats: Stats, now: datetime) -> dict[str, Any]:
    """A container's row for programs: seconds, bytes and numbers; None for what is not known or not there.

    A container for parsing has no DAG; its ``dag`` is the DAG file.
    """
    label = container.labels.get
    age = (now - container.created_at).total_seconds() if container.created_at else None
    return {
        "backend": backend,
        "container": container.id,
        "purpose": label(labels.PURPOSE),
        "dag": label(labels.DAG_ID) or label(labels.DAG_FILE),
        "run": label(labels.RUN_ID),
        "task": label(labels.TASK_ID),
        "map_index": _number(label(labels.MAP_INDEX)),
        "try": _number(label(labels.TRY_NUMBER)),
        "image": container.image,
        "state": container.state.value,
        "age": None if age is None else round(age, 1),
        "cpu": None if stats.cpu_seconds is None else round(stats.cpu_seconds, 3),
        "memory": stats.memory,
    }


def _labels(arguments: Namespace) -> dict[str, str]:
    wanted = {
        labels.DAG_ID: arguments.dag_id,
        labels.TASK_ID: arguments.task_id,
        labels.RUN_ID: arguments.run_id,
        labels.PURPOSE: arguments.purpose,
    }
    return {label: value for label, value in wanted.items() if value is not None}


def _number(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _nothing(filtered: bool, *, everything: bool) -> str:
    which = "No such container is" if filtered else "No container is"
    return f"{which} here." if everything else f"{which} running. Those that have ended are shown with --all."
