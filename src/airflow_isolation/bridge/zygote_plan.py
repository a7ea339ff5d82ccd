"""The zygote of a task: which container it has, and which tasks may share it (docs/glossary.md)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Final

from airflow_isolation import agent
from airflow_isolation.bridge.zygote import ZygotePlan, zygote_key
from airflow_isolation.bridge.zygote_recipe import zygote_environment
from airflow_isolation.container_spec import ContainerSpec, Resources
from airflow_isolation.oci.mount_source import identify_sources
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Mapping

    from airflow_isolation.bridge.start_mode import StartDecision
    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.container_spec import Mount
    from airflow_isolation.settings.effective import EffectiveSettings

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
    settings: EffectiveSettings,
    task: Launch,
    decision: StartDecision,
    *,
    environment: Mapping[str, str],
    mounts: tuple[Mount, ...],
    settings_digest: str,
    client: str = "",
) -> ZygotePlan:
    """The plan for a task's zygote.

    :param environment: Airflow's configuration as every task of this worker gets it.
    :param mounts: the directories of the local settings and the plugins.
    :param settings_digest: a digest of their files.
    :param client: the worker's user, where workers of several users ask; each user has zygotes of its own.
    """
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
            settings_digest,
            identify_sources(mounts),
            spec.user_namespace,
            spec.network,
            spec.seccomp,
            _agent_digest(),
            client,
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


@cache
def _agent_digest() -> str:
    return hashlib.sha256(b"".join(source.read_bytes() for source in agent.SOURCES)).hexdigest()
