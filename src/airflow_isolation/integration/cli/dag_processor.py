"""``airflow containers dag-processor`` and ``reserialize``: DAG files are parsed in containers, or not at all.

`airflow dag-processor` needs an import hook to do so. These commands call our DAG processor directly.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow_isolation.integration import activation
from airflow_isolation.integration.cli.backends import named_backend
from airflow_isolation.integration.cli.outcome import FAILED, OK, UsageError, command, component, say, write_line
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.resolve import dag_parsing_backend

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterator

    from airflow_isolation.settings.effective import Backend


@component
def run_dag_processor(arguments: Namespace) -> int:
    """`airflow dag-processor`, with its options. It parses in containers even if the flag is not set."""
    _switch_on(arguments)
    from airflow_isolation.integration.seams import stock_parsing

    stock_parsing.run_command(arguments)
    return OK


@command
def reserialize(arguments: Namespace) -> int:
    """Parse every file of the bundles once and store the result; 1 when a file has an import error or was not parsed."""
    backend = _switch_on(arguments)
    from airflow_isolation.integration.seams.reserialize import parse_everything_once

    with _progress() as progress:
        summary = parse_everything_once(backend, arguments.bundle_name, progress=progress)
    for name, error in summary.import_errors.items():
        say(f"Import error in {name}: {error.strip().rpartition(chr(10))[2]}")
    for name, error in summary.not_parsed.items():
        say(f"Not parsed, and left as it was: {name}: {error}")
    write_line(f"Parsed {summary.parsed} of {summary.files} files, {len(summary.import_errors)} with import errors.")
    return FAILED if summary.import_errors or summary.not_parsed else OK


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, else nothing: the log says which file is parsed where."""
    if not sys.stderr.isatty():
        yield lambda _, __: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shape = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*shape, console=Console(stderr=True)) as bars:
        bar = bars.add_task("DAG files", total=None)
        yield lambda done, files: bars.update(bar, completed=done, total=files or None)


def _switch_on(arguments: Namespace) -> Backend:
    """The backend for parsing. Sets the flag for this process and those that it starts."""
    flagged = dag_parsing_backend(airflow_configuration())
    backend = named_backend(arguments) or flagged
    if backend is None:
        raise UsageError(
            "No container runtime is named for parsing DAG files",
            hint="Give --backend, or set [core] scheduler_dag_parsing_runtime",
        )
    os.environ["AIRFLOW__CORE__SCHEDULER_DAG_PARSING_RUNTIME"] = backend
    if flagged is None:
        activation.parse_in_containers(backend)
    return backend
