"""``airflow containers prune``."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_isolation.bridge.prune import prune
from airflow_isolation.integration.cli.backends import ask_each, choose
from airflow_isolation.integration.cli.outcome import FAILED, command, say, write_line
from airflow_isolation.node.trees import left_trees
from airflow_isolation.runtime.reachability import peer_pid

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

    from airflow_isolation.bridge.prune import Pruned
    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.effective import ConnectionSettings


@command
def prune_leftovers(arguments: Namespace) -> int:
    """Remove what dead workers left. On a terminal it asks before."""
    choice = choose(arguments)

    def look(connection: ConnectionSettings, runtime: ContainerRuntime) -> Pruned:
        return _with_trees(prune(runtime, state_dir=connection.state_dir, dry_run=True), connection, dry_run=True)

    def remove(connection: ConnectionSettings, runtime: ContainerRuntime) -> Pruned:
        return _with_trees(prune(runtime, state_dir=connection.state_dir), connection)

    seen, code = ask_each(choice, look)
    if not _names(seen):
        write_line("Nothing is left over from dead workers.")
        return code
    if arguments.dry_run:
        _print("would be removed", _names(seen))
        return code
    if sys.stdin.isatty() and not arguments.yes:
        _print("to be removed", _names(seen))
        if input("Remove them? (y/N) ").strip().lower() not in ("y", "yes"):
            say("Nothing was removed.")
            return FAILED
    removed, code = ask_each(choice, remove)
    _print("removed", _names(removed))
    left = [name for name in _names(seen) if name not in _names(removed)]
    if left:
        # Another clean-up, perhaps a worker's own, may have removed it meanwhile.
        still, _ = ask_each(choice, look)
        left = [name for name in left if name in _names(still)]
    for name in left:
        say(f"{name} could not be removed; Airflow's log says why.")
    return FAILED if left else code


def _with_trees(pruned: Pruned, connection: ConnectionSettings, *, dry_run: bool = False) -> Pruned:
    """And what a killed node has left mounted."""
    pid = peer_pid(connection.socket_path)
    left = left_trees(connection.state_dir, daemon_pid=pid, dry_run=dry_run)
    return replace(pruned, directories=(*pruned.directories, *left))


def _names(answers: Iterable[Pruned]) -> list[str]:
    """The names, each once: directories of both daemons' workloads are in one place, so both answers may have them."""
    containers = (f"container {container.id}" for answer in answers for container in answer.containers)
    directories = (f"directory {directory}" for answer in answers for directory in answer.directories)
    strays = (
        f"{stray.kind} {stray.id}{f' ({stray.detail})' if stray.detail else ''}"
        for answer in answers
        for stray in answer.strays
    )
    return list(dict.fromkeys((*containers, *directories, *strays)))


def _print(what: str, names: Iterable[str]) -> None:
    for name in names:
        write_line(f"{what}: {name}")
