"""How a command ends: an exit code, and an error as a sentence on stderr."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Final, NoReturn

from airflow_isolation.errors import IsolationError
from airflow_isolation.integration.cli.formats import printable_lines
from airflow_isolation.integration.seams import console

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
#: As shells count: 128 + SIGINT.
INTERRUPTED: Final = 130


class UsageError(IsolationError):
    """The command was called in a way that can't be meant."""


def command(function: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """Make a function of the parsed arguments, which gives an exit code, into what Airflow's parser calls."""

    @functools.wraps(function)
    def run(arguments: Namespace) -> None:
        console.quiet()
        _end_with(function, arguments)

    return run


def component(function: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """As ``command``, for a part of Airflow that runs until it is told to end: what it logs is its output."""

    @functools.wraps(function)
    def run(arguments: Namespace) -> None:
        _end_with(function, arguments)

    return run


def _end_with(function: Callable[[Namespace], int], arguments: Namespace) -> NoReturn:
    try:
        code = function(arguments)
        sys.stdout.flush()
    except IsolationError as error:
        say(str(error))
        code = USAGE if isinstance(error, UsageError) else FAILED
    except BrokenPipeError:
        # Who read our output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def write_line(line: str) -> None:
    """A command's output."""
    print(line)  # noqa: T201 - this is what a command is for


def say(sentence: str) -> None:
    """What is for people and not part of a command's output. Names and values in it may be strangers'."""
    sys.stdout.flush()
    print(printable_lines(sentence), file=sys.stderr)  # noqa: T201 - as above
