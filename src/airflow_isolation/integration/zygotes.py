"""The zygote of a task: which container it has, and which tasks may share it (docs/glossary.md)."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from airflow_isolation import agent
from airflow_isolation.bridge.zygote import ZygotePlan, zygote_key
from airflow_isolation.bridge.zygote_recipe import zygote_environment
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.integration.workload_environment import administrators_directories, read_only_mounts
from airflow_isolation.oci.mount_source import identify_sources
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_isolation.bridge.start_mode import StartDecision
    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.container_spec import Mount
    from airflow_isolation.settings.effective import EffectiveSettings

log = structlog.get_logger(logger_name="airflow_isolation.zygotes")

#: Endings of the files by which airflow_local_settings and plugins are compared.
SETTINGS_FILES: Final = (".py", ".yaml", ".yml", ".json", ".toml", ".ini", ".cfg")

#: How many files and directories are looked at, which takes some 50 ms.
MOST_FILES: Final = 10_000

#: The capabilities for entering a container and becoming its user. In a user namespace they give no rights on the host.
_CAPABILITIES: Final = frozenset({"SYS_ADMIN", "SYS_CHROOT", "SETUID", "SETGID", "SETPCAP"})

#: Root looks for Airflow, which may lie in a home that is closed to root. This capability counts only for files whose owners
#: are in the namespace. It is dropped together with root.
_UNTIL_IT_IS_THE_USER: Final = frozenset({"DAC_READ_SEARCH"})

#: The zygote forks three processes for each workload; two of them end at once.
_PIDS: Final = 1024

#: The shortest start_timeout for a zygote, in seconds, even if an author sets less: the setting's default.
_PATIENCE: Final = 60.0


def zygote_plan(
    settings: EffectiveSettings, task: Launch, decision: StartDecision, *, environment: Mapping[str, str]
) -> ZygotePlan:
    """The plan for a task's zygote. ``environment`` is Airflow's configuration as every task of this worker gets it."""
    mounts = read_only_mounts(administrators_directories())
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
            local_settings_digest(),
            identify_sources(mounts),
            spec.user_namespace,
            spec.network,
            spec.seccomp,
            _agent_digest(),
        ),
        launch=replace(
            task,
            id="",
            spec=spec,
            purpose="zygote",
            environment=environment,
            start_timeout=_start_timeout(settings),
        ),
        user=task.spec.user or task.image.user,
        drop=spec.capabilities - _CAPABILITIES - task.spec.capabilities,
        idle=settings.zygote.zygote_idle_timeout,
        age=settings.zygote.zygote_max_age,
        forks=settings.zygote.zygote_max_forks,
        memory=settings.zygote.zygote_memory // 2,
    )


def _zygote_spec(
    task: ContainerSpec, mounts: tuple[Mount, ...], settings: EffectiveSettings, decision: StartDecision
) -> ContainerSpec:
    # Every field is set here explicitly, so that a zygote gets nothing of a task by accident.
    return ContainerSpec(
        image=task.image,
        argv=(),
        env=zygote_environment(settings, privileged=decision.user_namespace is None),
        labels={labels.PURPOSE: "zygote"},
        mounts=mounts,
        # The agent starts as root, and becomes the workload's user before it imports anything of the image.
        user="0:0",
        allow_root=True,
        working_dir="/",
        resources=Resources(memory=settings.zygote.zygote_memory, pids=_PIDS),
        network=_network(task, decision),
        capabilities=_CAPABILITIES
        | task.capabilities
        | (frozenset() if decision.user_namespace is None else _UNTIL_IT_IS_THE_USER),
        seccomp=task.seccomp,
        forks_into=task.capabilities,
        timezone=task.timezone,
        cgroup_parent=task.cgroup_parent,
        pid_namespace="host",
        user_namespace=decision.user_namespace,
    )


def _start_timeout(settings: EffectiveSettings) -> float:
    """The zygote's start_timeout: tasks of several authors share it, so one author's short timeout must not fail it."""
    wanted = settings.start_timeout
    return max(wanted, _PATIENCE) if settings.origins["start_timeout"].author else wanted


def _network(task: ContainerSpec, decision: StartDecision) -> str:
    """The zygote's network. From a user namespace no process can enter the host's network, so the zygote must be in it."""
    return "host" if decision.user_namespace is not None and task.network == "host" else "none"


def local_settings_digest() -> str:
    """A digest of airflow_local_settings and the plugins: a zygote may have imported both with Airflow.

    Files below their directories count too, because they may import or read them. The digest is computed once in a process,
    as stock Airflow imports them once: a later change takes effect after a restart.
    """
    return _digest(tuple(administrators_directories()))


@cache
def _digest(directories: tuple[Path, ...]) -> str:
    files = list(islice(_settings_files(directories), MOST_FILES + 1))
    if len(files) > MOST_FILES:
        log.warning(
            "There are more files of local settings and plugins than are looked at: after a change in one of the others, "
            "running zygotes still have the old version",
            directories=[str(directory) for directory in directories],
            looked_at=MOST_FILES,
        )
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _settings_files(directories: tuple[Path, ...]) -> Iterator[tuple[str, int, int, int]]:
    """The files below these directories. Links are followed, as Python does, and no directory is entered twice."""
    entered: set[tuple[int, int]] = set()
    for top in directories:
        for directory, names, files in os.walk(top, followlinks=True):
            with suppress(OSError):  # gone meanwhile
                status = Path(directory).stat()
                if (status.st_dev, status.st_ino) in entered:
                    names.clear()
                    continue
                entered.add((status.st_dev, status.st_ino))
            yield directory, 0, 0, 0
            # Sorted, so that directories are always walked in the same order.
            names[:] = sorted(name for name in names if not name.startswith((".", "__pycache__")))
            for file in sorted(Path(directory, name) for name in files if name.endswith(SETTINGS_FILES)):
                with suppress(OSError):  # gone, or a link that leads nowhere
                    found = file.stat()
                    yield str(file), found.st_mtime_ns, found.st_size, found.st_ino


@cache
def _agent_digest() -> str:
    return hashlib.sha256(b"".join(source.read_bytes() for source in agent.SOURCES)).hexdigest()
