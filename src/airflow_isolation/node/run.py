"""The node from its start to its end: what it needs of the host, acquired and given back."""

from __future__ import annotations

import os
import resource
import socket
import stat
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from airflow_isolation.bridge.backstage import Backstage
from airflow_isolation.bridge.started_agent import prepare
from airflow_isolation.bridge.zygote import compile_default_filter
from airflow_isolation.cgroups import find_hierarchy
from airflow_isolation.errors import HostTrouble, IsolationError
from airflow_isolation.node.admission import capacity_of
from airflow_isolation.node.service import Node, listen
from airflow_isolation.node.start import Host
from airflow_isolation.node.trees import Trees
from airflow_isolation.runtime.reachability import peer_pid
from airflow_isolation.settings.hook import image_hook
from airflow_isolation.settings.resolve import budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.airflow_configuration import Configuration
    from airflow_isolation.settings.effective import ConnectionSettings, NodeSettings
    from airflow_isolation.settings.hook import ImageHook

log = structlog.get_logger(logger_name="airflow_isolation.node")

#: The first descriptor that systemd hands over (sd_listen_fds(3)).
_FIRST_INHERITED: Final = 3


def run_node(
    runtime: ContainerRuntime,
    *,
    configuration: Configuration,
    connection: ConnectionSettings,
    settings: NodeSettings,
    hook: Callable[[], ImageHook | None] = image_hook,
) -> None:
    """Serve this host's workers until SIGTERM or SIGINT; tasks run on. ``runtime`` is closed at the end.

    :raises SettingError: a mistake in the configuration.
    :raises HostTrouble: this process is not root, or there is a node already.
    """
    if os.geteuid() != 0:
        raise HostTrouble("The node must be root: it enters containers and mounts directories", hint="Start it as root")
    # Mistakes in the configuration are found here, not by each task.
    shared = budget("task", connection.backend, configuration=configuration)
    path = socket_path(connection, settings)
    # Each running task has some ten descriptors here, and the usual soft limit is 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        behind = Backstage(runtime, state_dir=connection.state_dir)
        stack.callback(behind.close)
        prepare(connection.state_dir)
        listener = stack.enter_context(_listener(path))
        trees = stack.enter_context(Trees(connection.state_dir, daemon_pid=lambda: peer_pid(connection.socket_path)))
        # A task without it says so.
        with suppress(IsolationError):
            compile_default_filter()
        host = Host(
            backend=connection.backend,
            configuration=lambda: configuration,
            state_dir=connection.state_dir,
            behind=behind,
            trees=trees,
            hook=hook,
            spares_requests=find_hierarchy(Path(connection.cgroup_mount_path)).kind == "unified",
        )

        def ready() -> None:
            log.info("The node serves", socket=str(path), backend=connection.backend, clients=settings.node_clients)
            _tell_systemd("READY=1")

        node = Node(
            host,
            clients=settings.node_clients,
            capacity=capacity_of(settings, shared.memory),
            admission_timeout=settings.admission_timeout,
        )
        node.serve(listener, ready=ready)
        log.info("The node ends; tasks run on", socket=str(path))


def socket_path(connection: ConnectionSettings, settings: NodeSettings) -> Path:
    """Where the node of these settings listens."""
    return Path(settings.node) if settings.node else connection.state_dir / "node.sock"


@contextmanager
def _listener(path: Path) -> Iterator[socket.socket]:
    inherited = _inherited()
    if inherited is not None:
        # systemd keeps it: whoever connects while the node is restarted waits.
        with inherited:
            yield inherited
        return
    with listen(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _inherited() -> socket.socket | None:
    """:raises HostTrouble: systemd gave something else than one socket for packets."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    mode = os.fstat(_FIRST_INHERITED).st_mode
    if os.environ.get("LISTEN_FDS") == "1" and stat.S_ISSOCK(mode):
        found = socket.socket(fileno=_FIRST_INHERITED)
        found.set_inheritable(False)
        if (found.family, found.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            return found
        found.close()
    raise HostTrouble(
        "systemd gave the node something else than one unix socket for packets",
        hint="Use ListenSequentialPacket= in the socket unit, once",
    )


def _tell_systemd(state: str) -> None:
    """sd_notify(3): that the node is ready. Without systemd nobody asks."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, suppress(OSError):
        notify.connect("\0" + address[1:] if address.startswith("@") else address)
        notify.sendall(state.encode())
