"""Airflow's logging on a terminal: a command's stdout holds its output, or one task's log, and nothing else."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from airflow_isolation.integration.cli.formats import printable_lines

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import FilteringBoundLogger

#: What each line of a task's log says of whose it is, and of where in Airflow's source it was written.
_WHOSE = ("dag_id", "task_id", "run_id", "map_index", "try_number", "ti_id", "loc", "filename", "lineno")


def quiet() -> None:
    """What this process itself has to say goes to stderr: of Airflow errors only, of ours warnings, too."""
    from airflow._shared.logging import configure_logging

    levels = {"airflow_isolation": "WARNING", "task": "INFO"}
    configure_logging(log_level="ERROR", namespace_log_levels=levels, output=sys.stderr)


def task_logger() -> FilteringBoundLogger:
    """A task's log on stdout, secrets masked; of one task only, so that no line need say whose it is."""
    return _logger("task", sys.stdout)


def parse_logger() -> FilteringBoundLogger:
    """What a DAG file logs and prints while it is parsed, on stderr, secrets masked."""
    return _logger("processor", sys.stderr)


def _logger(name: str, stream: TextIO) -> FilteringBoundLogger:
    from airflow.sdk.log import logging_processors

    processors = logging_processors(json_output=False, colors=stream.isatty())
    logger: FilteringBoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(stream),
        processors=[_shorten, *processors[:-1], _harmless, processors[-1]],
        logger_name=name,
    ).bind()
    return logger


def _shorten(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key in _WHOSE:
        event.pop(key, None)
    if isinstance(event.get("timestamp"), datetime):
        event["timestamp"] = event["timestamp"].isoformat().replace("+00:00", "Z")
    return event


def _harmless(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """User code chose the text: no terminal may obey it, and no second line of it look like a line of its own."""
    return {_shown(key): _shown(value) for key, value in event.items()}


def _shown(value: Any) -> Any:
    return printable_lines(value, indent="    ") if isinstance(value, str) else value
