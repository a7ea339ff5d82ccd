"""``airflow containers kill``."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from airflow_isolation.integration.cli.backends import choose, find
from airflow_isolation.integration.cli.outcome import OK, UsageError, command, write_line
from airflow_isolation.integration.connection import connect
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from argparse import Namespace


@command
def kill_container(arguments: Namespace) -> int:
    """Send a signal. For a container that has ended already, only say so."""
    number = parse_signal(arguments.signal)
    found = find(choose(arguments), arguments.id)
    if found.container.state is ContainerState.STOPPED:
        write_line(f"The container {found.container.id} has ended already.")
        return OK
    with connect(found.connection) as runtime:
        runtime.kill(found.container.id, number, everyone=number is signal.SIGKILL)
    write_line(f"Sent {number.name} to the container {found.container.id}.")
    return OK


def parse_signal(text: str) -> signal.Signals:
    """The signal for ``TERM``, ``SIGTERM``, ``term`` or ``15``.

    :raises UsageError: there is no such signal.
    """
    name = text.strip().upper()
    try:
        if name.isdecimal():
            return signal.Signals(int(name))
        return signal.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except (KeyError, ValueError):
        raise UsageError(
            f"There is no signal {text!r}", hint="Write a name such as TERM or KILL, or a number"
        ) from None
