"""``airflow containers logs``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from airflow_isolation.integration.cli.backends import choose, find
from airflow_isolation.integration.cli.formats import printable_lines
from airflow_isolation.integration.cli.outcome import OK, command, say, write_line
from airflow_isolation.integration.connection import connect

if TYPE_CHECKING:
    from argparse import Namespace

#: Bytes. A container's output outside its task's log is short, unless something is wrong.
_LIMIT: Final = 16 * 1024 * 1024


@command
def print_output(arguments: Namespace) -> int:
    """Print what the container's first process wrote to stdout and stderr.

    The bytes are unchanged, except that a terminal gets no control characters.
    """
    found = find(choose(arguments), arguments.id)
    with connect(found.connection) as runtime:
        output = runtime.output(found.container.id, limit=_LIMIT)
    if arguments.tail is not None:
        output = last_lines(output, arguments.tail)
    if not output:
        say(f"The container {found.container.id} wrote nothing outside the task's log.")
    elif sys.stdout.isatty():
        for line in output.decode(errors="replace").splitlines():
            write_line(printable_lines(line))
    else:
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
    return OK


def last_lines(output: bytes, count: int) -> bytes:
    """The last ``count`` lines; an unfinished line counts."""
    return b"".join(output.splitlines(keepends=True)[-count:]) if count else b""
