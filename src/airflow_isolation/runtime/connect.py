"""Makes the runtime of a backend, given its name. Only this backend is imported."""

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
# Settings that only containerd has; docker ignores them.
_CONTAINERD_ONLY = frozenset({"snapshotter", "runtime_binary", "hosts_dir"})


def connect(backend: str, **settings: str | Path | float) -> ContainerRuntime:
    """The runtime of ``containerd`` or ``docker``; ``settings`` are the keywords of its class. Empty ones mean its defaults.

    The daemon is not asked yet: the runtime connects at its first call.

    :raises SettingError: there is no such backend.
    :raises ContainerRuntimeError: a package that the backend needs is missing.
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
