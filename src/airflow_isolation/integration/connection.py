"""Makes the runtime that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow_isolation.runtime import connect as runtimes

if TYPE_CHECKING:
    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.effective import ConnectionSettings


def connect(settings: ConnectionSettings) -> ContainerRuntime:
    """The runtime that the settings name. It connects at its first call. The caller closes it."""
    return runtimes.connect(
        settings.backend,
        socket_path=settings.socket_path,
        namespace=settings.namespace,
        state_dir=settings.state_dir,
        snapshotter=settings.snapshotter,
        runtime_binary=settings.runtime_binary,
        hosts_dir=settings.hosts_dir,
        cgroup_mount_path=settings.cgroup_mount_path,
    )
