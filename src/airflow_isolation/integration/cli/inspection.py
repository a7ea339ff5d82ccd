"""``airflow containers inspect``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from airflow_isolation.integration.cli.backends import choose, find
from airflow_isolation.integration.cli.outcome import OK, command
from airflow_isolation.integration.cli.output import print_record
from airflow_isolation.integration.connection import connect
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import Stats

if TYPE_CHECKING:
    from argparse import Namespace

    from airflow_isolation.runtime.interface import Container, RuntimeInfo


@command
def inspect_container(arguments: Namespace) -> int:
    """Print all that the daemon, the labels and the counters say of one container."""
    found = find(choose(arguments), arguments.id)
    with connect(found.connection) as runtime:
        container = runtime.get(found.container.id)
        stats = runtime.stats([container.id]).get(container.id, Stats())
        print_record(record(runtime.info(), container, stats), arguments.output)
    return OK


def record(info: RuntimeInfo, container: Container, stats: Stats) -> dict[str, Any]:
    """The document for programs. ``owner`` is the process that is responsible for the container."""
    owner = labels.Owner.parse(container.labels.get(labels.OWNER, ""))
    ended = container.exit_status
    return {
        "container": container.id,
        "state": container.state.value,
        "exit_code": ended.code if ended else None,
        "exited_at": ended.exited_at.isoformat() if ended and ended.exited_at else None,
        "image": container.image,
        "pid": container.pid or None,
        "created_at": container.created_at.isoformat() if container.created_at else None,
        "runtime": {
            "backend": info.backend,
            "version": info.version,
            "socket_path": info.socket_path,
            "namespace": info.namespace,
        },
        "owner": {"host": owner.host, "pid": owner.pid, "gone": owner.is_gone()} if owner else None,
        "stats": asdict(stats),
        "labels": dict(sorted(container.labels.items())),
    }
