"""``airflow containers stats``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.console import Console
from rich.live import Live

from airflow_isolation.integration.cli import formats
from airflow_isolation.integration.cli.backends import Found, ask_each, choose, only_match
from airflow_isolation.integration.cli.outcome import OK, command
from airflow_isolation.integration.cli.output import Column, aligned, print_rows
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from airflow_isolation.integration.cli.backends import Choice
    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Stats
    from airflow_isolation.settings.effective import ConnectionSettings

#: Seconds between the two readings from which the share of the processors is computed.
_INTERVAL: Final = 1.0
_NOTHING: Final = "No container is running."
_RUNNING: Final = frozenset({ContainerState.RUNNING, ContainerState.PAUSED})

COLUMNS: Final = (
    Column("container"),
    Column("dag"),
    Column("task"),
    Column("cpu_percent", formats.percent),
    Column("cpu_seconds", formats.seconds),
    Column("memory", formats.size),
    Column("memory_limit", formats.size),
    Column("memory_peak", formats.size),
    Column("pids"),
    Column("bytes_read", formats.size),
    Column("bytes_written", formats.size),
    Column("cpu_pressure", formats.percent),
    Column("memory_pressure", formats.percent),
    Column("io_pressure", formats.percent),
)


class Reading(NamedTuple):
    """The counters of one container at a time of ``time.monotonic``."""

    backend: str
    container: Container
    stats: Stats
    at: float


@command
def show_stats(arguments: Namespace) -> int:
    """Print counters once; on a terminal again and again, until Ctrl-C or until the named containers have ended."""
    choice = choose(arguments)
    columns = (Column("backend"), *COLUMNS) if len(choice.connections) > 1 else COLUMNS
    before, code = _read(choice, arguments.ids)
    ids = frozenset(before) if arguments.ids else None
    if arguments.no_stream or arguments.output != "table" or not sys.stdout.isatty():
        if before:
            time.sleep(_INTERVAL)
        now, code = _read(choice, (), ids) if before else (before, code)
        print_rows(_rows(before, now), columns, arguments.output, nothing=_NOTHING)
        return code
    try:
        with Live(console=Console(highlight=False), auto_refresh=False, vertical_overflow="crop") as live:
            while before or ids is None:
                time.sleep(_INTERVAL)
                now, code = _read(choice, (), ids)
                rows = _rows(before, now)
                live.update(aligned(rows, columns, ruled=True) if rows else _NOTHING, refresh=True)
                before = now
    except KeyboardInterrupt:
        return OK
    return code


def row(reading: Reading, before: Reading | None) -> dict[str, Any]:
    """The row for programs: seconds, bytes and counts, None for what is not known.

    ``cpu_percent`` is the share of one processor between the two readings: two busy processors are 200.
    """
    stats, label = reading.stats, reading.container.labels.get
    percent = None
    if before and stats.cpu_seconds is not None and before.stats.cpu_seconds is not None and reading.at > before.at:
        used = max(0.0, stats.cpu_seconds - before.stats.cpu_seconds)
        percent = round(100 * used / (reading.at - before.at), 1)
    return {
        "backend": reading.backend,
        "container": reading.container.id,
        "dag": label(labels.DAG_ID) or label(labels.DAG_FILE),
        "task": label(labels.TASK_ID),
        "cpu_percent": percent,
        "cpu_seconds": stats.cpu_seconds,
        "cpu_throttled": stats.cpu_throttled,
        "memory": stats.memory,
        "memory_limit": stats.memory_limit,
        "memory_peak": stats.memory_peak,
        "oom_kills": stats.oom_kills,
        "pids": stats.pids,
        "pids_limit": stats.pids_limit,
        "bytes_read": stats.bytes_read,
        "bytes_written": stats.bytes_written,
        "cpu_pressure": stats.cpu_pressure,
        "memory_pressure": stats.memory_pressure,
        "io_pressure": stats.io_pressure,
    }


def _rows(before: Mapping[str, Reading], now: Mapping[str, Reading]) -> list[dict[str, Any]]:
    return [row(reading, before.get(id)) for id, reading in now.items()]


def _read(choice: Choice, prefixes: Sequence[str], ids: frozenset[str] | None = None) -> tuple[dict[str, Reading], int]:
    """Readings by id: of the containers ``ids``, else of those that ``prefixes`` mean, else of all that run."""

    def readings(connection: ConnectionSettings, runtime: ContainerRuntime) -> list[tuple[Found, Stats | None, float]]:
        running = [container for container in runtime.list() if container.state in _RUNNING]
        counted = runtime.stats([container.id for container in running])
        at = time.monotonic()
        return [(Found(connection, container), counted.get(container.id), at) for container in running]

    answers, code = ask_each(choice, readings)
    found = [each for answer in answers for each in answer]
    if prefixes:
        known = [container for container, _, _ in found]
        ids = frozenset(only_match(known, prefix).container.id for prefix in prefixes)
    return {
        container.id: Reading(connection.backend, container, stats, at)
        for (connection, container), stats, at in found
        if stats is not None and (ids is None or container.id in ids)
    }, code
