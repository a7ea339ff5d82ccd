"""From settings to a connected runtime."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow_isolation.runtime.interface import ContainerRuntime
    from airflow_isolation.settings.effective import Backend, ConnectionSettings


def import_backend(backend: Backend) -> None:
    """Import the client library of a backend, which takes a moment, and of the other nothing."""
    importlib.import_module(f"airflow_isolation.runtime.{backend}")


def connect(settings: ConnectionSettings) -> ContainerRuntime:
    """A runtime on the daemon that the settings name; the caller closes it. It connects at its first call."""
    # A client library is imported only by the backend that needs it.
    if settings.backend == "docker":
        from airflow_isolation.runtime.docker import DockerRuntime

        return DockerRuntime(settings.socket_path, settings.namespace, settings.state_dir)
    from airflow_isolation.runtime.containerd import ContainerdRuntime

    return ContainerdRuntime(
        settings.socket_path,
        settings.namespace,
        settings.state_dir,
        snapshotter=settings.snapshotter,
        runtime_binary=settings.runtime_binary,
        hosts_dir=settings.hosts_dir,
        cgroup_mount_path=settings.cgroup_mount_path,
    )
