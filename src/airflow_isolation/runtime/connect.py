"""From the name of a backend to its runtime. Only the backend that is asked for is imported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from airflow_isolation.errors import SettingError

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_isolation.runtime.interface import ContainerRuntime

_BACKENDS = {
    "containerd": ("airflow_isolation.runtime.containerd", "ContainerdRuntime"),
    "docker": ("airflow_isolation.runtime.docker", "DockerRuntime"),
}
# What only containerd has; to docker these settings are nothing.
_CONTAINERD_ONLY = frozenset({"snapshotter", "runtime_binary", "hosts_dir"})


def connect(backend: str, **settings: str | Path | float) -> ContainerRuntime:
    """The runtime of ``containerd`` or ``docker``; ``settings`` are the keywords of its class, empty ones its defaults.

    Nothing is asked of the daemon yet: the connection is made with the first call.

    :raises SettingError: there is no such backend.
    :raises ContainerRuntimeError: a package is missing that the backend needs.
    """
    if backend not in _BACKENDS:
        raise SettingError(f"{backend!r} is not a container runtime", hint=f"Choose one of {', '.join(_BACKENDS)}")
    module, name = _BACKENDS[backend]
    given = {
        key: value
        for key, value in settings.items()
        if value not in ("", None) and (backend == "containerd" or key not in _CONTAINERD_ONLY)
    }
    runtime: ContainerRuntime = getattr(import_module(module), name)(**given)
    return runtime
