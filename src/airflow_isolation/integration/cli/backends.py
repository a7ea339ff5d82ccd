"""Which daemons a command asks, and which container an abbreviated id means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from airflow_isolation.errors import ContainerNotFound, ContainerRuntimeError, IsolationError, RuntimeUnreachable
from airflow_isolation.integration.cli.outcome import FAILED, OK, UsageError, say
from airflow_isolation.integration.connection import connect
from airflow_isolation.settings.airflow_configuration import airflow_configuration
from airflow_isolation.settings.declarations import BACKENDS
from airflow_isolation.settings.resolve import dag_parsing_backend, resolve_connection, task_execution_backend

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    from airflow_isolation.runtime.interface import Container, ContainerRuntime
    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import Backend, ConnectionSettings

T = TypeVar("T")

#: How many ids an error lists when an abbreviated id is ambiguous.
_NAMED = 5


class ContainerAmbiguous(ContainerRuntimeError):
    """An abbreviated id means more than one container."""


class Choice(NamedTuple):
    """The daemons to ask. ``guessed``: no setting names them; their sockets were found on this host."""

    connections: tuple[ConnectionSettings, ...]
    guessed: bool


class Found(NamedTuple):
    """A container, and the daemon that has it."""

    connection: ConnectionSettings
    container: Container


def choose(arguments: Namespace) -> Choice:
    """The daemon that the command line names, else those that the two flags name, else those whose sockets are here.

    :raises UsageError: the command line names both.
    :raises SettingError: a mistake in airflow.cfg.
    :raises RuntimeUnreachable: no daemon is named, and none is found.
    """
    configuration = airflow_configuration()
    named = named_backend(arguments)
    if named:
        return Choice((resolve_connection(named, configuration=configuration),), guessed=False)
    flags = {task_execution_backend(configuration), dag_parsing_backend(configuration)}
    backends = [backend for backend in BACKENDS if backend in flags]
    if backends:
        return Choice(_connections(backends, configuration), guessed=False)
    every = _connections(BACKENDS, configuration)
    found = tuple(connection for connection in every if os.path.exists(connection.socket_path))  # noqa: PTH110
    if not found:
        sockets = " nor ".join(f"{connection.backend}'s {connection.socket_path}" for connection in every)
        raise RuntimeUnreachable(
            f"No container runtime is configured, and none is found: there is neither {sockets}",
            hint="Set [core] task_execution_runtime, or the socket_path of the runtime's section",
        )
    return Choice(found, guessed=True)


def choose_one(arguments: Namespace) -> ConnectionSettings:
    """As ``choose``, for commands that need exactly one daemon.

    :raises UsageError: several are in use, and none is named.
    """
    connections = choose(arguments).connections
    if len(connections) > 1:
        names = " and ".join(connection.backend for connection in connections)
        raise UsageError(f"{names} are both in use here", hint="Choose one with --containerd or --docker")
    return connections[0]


def named_backend(arguments: Namespace) -> Backend | None:
    """The backend that ``--backend``, ``--containerd`` and ``--docker`` name together; None when none is given.

    :raises UsageError: they contradict each other.
    """
    named = {arguments.backend} if arguments.backend else set()
    named |= {backend for backend in BACKENDS if getattr(arguments, backend)}
    if len(named) > 1:
        raise UsageError("A command asks either containerd or docker", hint="Name one of them, or none")
    return next(iter(named), None)


def ask_each(choice: Choice, question: Callable[[ConnectionSettings, ContainerRuntime], T]) -> tuple[list[T], int]:
    """Ask each daemon; the answers, and an exit code. The errors of those that don't answer go to stderr.

    If a daemon was only guessed and doesn't answer, the command still succeeds when another daemon answers.

    :raises IsolationError: no daemon answers; the error of the last one.
    """
    answers: list[T] = []
    failures: list[IsolationError] = []
    for connection in choice.connections:
        try:
            with connect(connection) as runtime:
                answers.append(question(connection, runtime))
        except IsolationError as error:
            failures.append(error)
    if failures and not answers:
        for failure in failures[:-1]:
            say(str(failure))
        raise failures[-1]
    for failure in failures:
        say(str(failure))
    return answers, FAILED if failures and not choice.guessed else OK


def find(choice: Choice, prefix: str) -> Found:
    """The one container whose id is, or begins with, ``prefix``.

    :raises ContainerNotFound: there is none.
    :raises ContainerAmbiguous: there are several.
    :raises IsolationError: no daemon answers.
    """
    answers, _ = ask_each(choice, lambda connection, runtime: [Found(connection, each) for each in runtime.list()])
    return only_match([found for answer in answers for found in answer], prefix)


def only_match(containers: Sequence[Found], prefix: str) -> Found:
    """As ``find``, among ``containers``. A whole id is never ambiguous."""
    if not prefix:
        raise UsageError("The container's id is empty")
    matches = [found for found in containers if found.container.id == prefix] or [
        found for found in containers if found.container.id.startswith(prefix)
    ]
    if not matches:
        raise ContainerNotFound(
            f"There is no container whose id is, or begins with, {prefix!r}",
            hint="`airflow containers list --all` shows all containers",
        )
    if len(matches) > 1:
        ids = ", ".join(found.container.id for found in matches[:_NAMED])
        more = f" and {len(matches) - _NAMED} more" if len(matches) > _NAMED else ""
        raise ContainerAmbiguous(
            f"{prefix!r} is the beginning of {len(matches)} ids: {ids}{more}", hint="Write more of it"
        )
    return matches[0]


def _connections(backends: Any, configuration: Configuration) -> tuple[ConnectionSettings, ...]:
    return tuple(resolve_connection(backend, configuration=configuration) for backend in backends)
