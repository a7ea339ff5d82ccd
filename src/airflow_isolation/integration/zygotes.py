"""The zygote of a task: what it is made of, and who may share it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Final

from airflow_isolation import agent
from airflow_isolation.bridge.zygote import ZygotePlan, zygote_key
from airflow_isolation.container_spec import Resources
from airflow_isolation.integration.workload_environment import administrators_directories, read_only_mounts
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from airflow_isolation.bridge.start_mode import StartDecision
    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.container_spec import ContainerSpec, Mount
    from airflow_isolation.settings.effective import EffectiveSettings

#: Variables of these names are read when Python starts or a library is imported. A workload gets the others too.
READ_AT_IMPORT: Final = (
    "PYTHON",
    "AIRFLOW",
    "_AIRFLOW",
    "LD_",
    "LC_",
    "LANG",
    "TZ",
    "MALLOC_",
    "GLIBC_",
    "OPENSSL_",
    "OTEL_",
    "PYDANTIC_",
    "SQLALCHEMY_",
)

#: What entering a container and becoming its user takes; in a user namespace it is worth nothing outside of it.
_CAPABILITIES: Final = frozenset({"SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE", "SETUID", "SETGID", "SETPCAP"})

#: The zygote forks three processes for each workload, of which two end at once.
_PIDS: Final = 1024


def zygote_plan(
    settings: EffectiveSettings, task: Launch, decision: StartDecision, *, environment: Mapping[str, str]
) -> ZygotePlan:
    """``environment`` is Airflow's configuration as every task of this worker gets it."""
    directories = administrators_directories()
    mounts = read_only_mounts(directories)
    spec = _zygote_spec(task.spec, mounts, settings, decision)
    return ZygotePlan(
        key=zygote_key(
            settings.backend,
            settings.connection.socket_path,
            settings.connection.namespace,
            task.image.digest,
            task.python,
            spec.user,
            task.spec.user or task.image.user,
            sorted(task.spec.capabilities),
            sorted(spec.env.items()),
            sorted(environment.items()),
            spec.timezone,
            sorted(_local_settings(directories)),
            spec.user_namespace,
            spec.network,
            _agent_digest(),
        ),
        launch=replace(task, id="", spec=spec, purpose="zygote", environment=environment),
        user=task.spec.user or task.image.user,
        idle=settings.zygote.zygote_idle_timeout,
        age=settings.zygote.zygote_max_age,
        forks=settings.zygote.zygote_max_forks,
        memory=settings.zygote.zygote_memory // 2,
    )


def _zygote_spec(
    task: ContainerSpec, mounts: tuple[Mount, ...], settings: EffectiveSettings, decision: StartDecision
) -> ContainerSpec:
    return replace(
        task,
        env={name: value for name, value in task.env.items() if name.startswith(READ_AT_IMPORT)},
        labels={labels.PURPOSE: "zygote"},
        mounts=mounts,
        user="0:0",
        allow_root=True,
        hostname="",
        working_dir="/",
        resources=Resources(memory=settings.zygote.zygote_memory, pids=_PIDS),
        network=_network(task, decision),
        read_only_root=True,
        capabilities=_CAPABILITIES | task.capabilities,
        seccomp="unconfined",
        pid_namespace="host",
        user_namespace=decision.user_namespace,
        budget=Resources(),
    )


def _network(task: ContainerSpec, decision: StartDecision) -> str:
    """From a user namespace nobody may enter the host's network: who forks into it must be there."""
    return "host" if decision.user_namespace is not None and task.network == "host" else "none"


def _local_settings(directories: list[Path]) -> list[tuple[str, int, int, int]]:
    """What tells one state of airflow_local_settings and the plugins from another: both may be imported with Airflow."""
    return [
        (str(file), status.st_mtime_ns, status.st_size, status.st_ino)
        for directory in directories
        for file in directory.glob("*.py")
        for status in [file.stat()]
    ]


@cache
def _agent_digest() -> str:
    return hashlib.sha256(b"".join(source.read_bytes() for source in agent.SOURCES)).hexdigest()
