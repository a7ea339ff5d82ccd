"""Sets up Airflow's logging for a command, so that its stdout has only its output, or one task's log."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

import structlog

from airflow_isolation.integration.cli.formats import printable_lines

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from structlog.typing import FilteringBoundLogger

#: Fields of a log line that name the task, or the place in Airflow's source that wrote the line.
_WHOSE = ("dag_id", "task_id", "run_id", "map_index", "try_number", "ti_id", "loc", "filename", "lineno")


def quiet() -> None:
    """Send this process's own log to stderr: Airflow's errors, and our errors and warnings."""
    from airflow._shared.logging import configure_logging

    levels = {"airflow_isolation": "WARNING", "task": "INFO"}
    configure_logging(log_level="ERROR", namespace_log_levels=levels, output=sys.stderr)


def task_logger() -> FilteringBoundLogger:
    """A logger for one task's log on stdout, secrets masked. Lines don't name the task, because there is only one."""
    return _logger("task", sys.stdout)


def parse_logger() -> FilteringBoundLogger:
    """A logger on stderr, secrets masked, for what a DAG file logs and prints while it is parsed."""
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
    """Make text of user code harmless: without control characters for the terminal, and with further lines marked as
    such.
    """
    return {_shown(key): _shown(value) for key, value in event.items()}


def _shown(value: Any) -> Any:
    return printable_lines(value, indent="    ") if isinstance(value, str) else value
