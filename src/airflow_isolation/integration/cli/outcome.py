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
#: The exit code after Ctrl-C, as shells count: 128 + SIGINT.
INTERRUPTED: Final = 130


class UsageError(IsolationError):
    """The command was called with wrong arguments."""


def command(function: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """Turn a function that takes the parsed arguments and returns an exit code into one that Airflow's parser can call."""

    @functools.wraps(function)
    def run(arguments: Namespace) -> None:
        console.quiet()
        _end_with(function, arguments)

    return run


def component(function: Callable[[Namespace], int]) -> Callable[[Namespace], None]:
    """As ``command``, for a component that runs until it is told to end, whose log is its output."""

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
        # The reader of our output has closed the pipe. Without this, Python would report an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def write_line(line: str) -> None:
    """Print a line of the command's output to stdout."""
    print(line)  # noqa: T201 - this is what a command is for


def say(sentence: str) -> None:
    """Print a sentence for people to stderr. Names and values in it may be untrusted."""
    sys.stdout.flush()
    print(printable_lines(sentence), file=sys.stderr)  # noqa: T201 - as above
