"""EffectiveSettings, and what the bridge adds, into a ContainerSpec. Where both set something, the bridge wins."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING

from airflow_isolation.container_spec import NO_STRINGS, ContainerSpec, Mount

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_isolation.settings.effective import EffectiveSettings, Origin, Volume


def container_spec(
    settings: EffectiveSettings,
    *,
    argv: Iterable[str],
    env: Mapping[str, str] = NO_STRINGS,
    mounts: Iterable[Mount] = (),
    labels: Mapping[str, str] = NO_STRINGS,
) -> ContainerSpec:
    """The container for one workload. It looks at the host's file system: a volume's source must exist.

    Outer mounts come first, so that none covers a mount inside it.

    :raises SettingError: a volume's source doesn't exist or passes through a symbolic link, or its target would cover
        one of ``mounts``.
    """
    ours = tuple(mounts)
    for volume in settings.volumes:
        _check_source(volume, settings.origins[f"volumes.{volume.target}"])
        _check_target(volume, ours, settings.origins[f"volumes.{volume.target}"])
    volumes = (
        Mount(source=volume.source, target=volume.target, read_only=volume.read_only, executable=True)
        for volume in settings.volumes
    )
    return ContainerSpec(
        image=settings.image,
        argv=tuple(argv),
        env=MappingProxyType({**settings.environment, **env}),
        labels=MappingProxyType({**settings.labels, **labels}),
        mounts=tuple(sorted((*volumes, *ours), key=lambda mount: len(PurePosixPath(mount.target).parts))),
        user=settings.run_as_user,
        allow_root=settings.allow_root,
        working_dir=settings.working_dir,
        hostname=settings.hostname,
        # One container parses many files: when one needs too much memory, the others shall go on.
        resources=replace(settings.resources, oom_group=settings.purpose == "task" or settings.parse_mode == "fresh"),
        network=settings.network,
        read_only_root=settings.read_only_root,
        capabilities=settings.capabilities,
        seccomp=settings.seccomp_profile,
        tmp_size=settings.tmp_size,
        shm_size=settings.shm_size,
        stop_grace_period=settings.stop_grace_period,
        timezone=settings.timezone,
        cgroup_parent=settings.cgroup_parent,
        budget=settings.budget,
    )


def _check_source(volume: Volume, origin: Origin) -> None:
    if not os.path.lexists(volume.source):
        raise origin.error(f"the mount source {volume.source} does not exist on this host")
    real = os.path.realpath(volume.source)
    if real != volume.source:
        # The policy checked the path as written. A link may lead elsewhere, and may change.
        raise origin.error(
            f"the mount source {volume.source} is, or passes through, a symbolic link",
            hint=f"Write {real}, if that is meant",
        )


def _check_target(volume: Volume, ours: tuple[Mount, ...], origin: Origin) -> None:
    for mount in ours:
        if PurePosixPath(volume.target).is_relative_to(mount.target):
            raise origin.error(f"the volume would cover {volume.target}, which Airflow needs in the container")
