"""How a task is started: forked from a zygote, or fresh; and why. Looks at the host; ``decide`` changes nothing but uid ranges."""

from __future__ import annotations

import os
import platform
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from airflow_isolation.bridge.uid_ranges import configured_range, first_uid
from airflow_isolation.container_spec import UserNamespace
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.oci.host import kernel_version

if TYPE_CHECKING:
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.settings.effective import EffectiveSettings

#: setns(2) takes a pidfd since then.
_KERNEL = (5, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDecision:
    """``why`` is a sentence without its full stop. ``user_namespace`` is for the zygote and what it forks into."""

    mode: Literal["fork", "fresh"]
    why: str
    user_namespace: UserNamespace | None = None


def decide(settings: EffectiveSettings, spec: ContainerSpec, *, image_digest: str) -> StartDecision:
    """Uids are given to an image that has none yet.

    :raises SpecRefused: ``start_mode`` is fork, and this workload can't be forked.
    """
    return _allowed(settings, _decided(settings, spec, image_digest))


def foresee(settings: EffectiveSettings, spec: ContainerSpec) -> StartDecision:
    """As ``decide``, of an image whose digest is not known. Changes nothing, and can't tell that all uids are given away.

    :raises SpecRefused: as ``decide``.
    """
    return _allowed(settings, _decided(settings, spec, None))


def _allowed(settings: EffectiveSettings, decision: StartDecision) -> StartDecision:
    if settings.start_mode == "fork" and decision.mode == "fresh":
        raise SpecRefused(
            f"start_mode is fork, but this task can't be forked: {decision.why}",
            hint="Set start_mode = auto to start such tasks fresh",
        )
    return decision


def _decided(settings: EffectiveSettings, spec: ContainerSpec, image_digest: str | None) -> StartDecision:
    if settings.start_mode == "fresh":
        return StartDecision(mode="fresh", why="start_mode says so")
    if os.geteuid() != 0:
        return StartDecision(mode="fresh", why="only root may move a forked process into a container's cgroup")
    if kernel_version(platform.release()) < _KERNEL:
        return StartDecision(mode="fresh", why=f"forking into a container needs Linux {'.'.join(map(str, _KERNEL))}")
    obstacle = no_user_namespace(settings, spec)
    if not obstacle:
        available = configured_range(settings.zygote.uid_range)
        if available is None:
            obstacle = "there is no uid_range, and no entry of the worker's user in /etc/subuid"
        elif image_digest is None:
            return StartDecision(mode="fork", why=f"in a user namespace of the image's own, from the uids {available}")
        else:
            try:
                first = first_uid(image_digest, available, state_dir=settings.connection.state_dir)
            except ContainerFailed as error:
                obstacle = error.message
            else:
                return StartDecision(
                    mode="fork",
                    why=f"in a user namespace of the image's own, uids {first} and up",
                    user_namespace=UserNamespace(first=first),
                )
    if settings.image_is_trusted:
        return StartDecision(mode="fork", why=f"with privilege on the host, for a trusted image: {obstacle}")
    return StartDecision(mode="fresh", why=f"{obstacle}, and the image is not among the trusted ones")


def no_user_namespace(settings: EffectiveSettings, spec: ContainerSpec) -> str:
    """What keeps a workload from running in a user namespace; empty for nothing."""
    if settings.backend == "docker":
        return "Docker has no user namespace of a single container"
    if not spec.read_only_root:
        return "read_only_root is false, and the image's files would belong to nobody"
    for mount in spec.mounts:
        if mount.kind != "bind":
            continue
        if not mount.read_only:
            return f"the volume {mount.target} is writable, and its files would change owner"
        if not _readable_by_others(mount.source):
            return f"{mount.source} is not readable for others, whom everybody in a user namespace is"
    return ""


def _readable_by_others(path: str) -> bool:
    """Only the top is looked at; what lies below is the administrator's to know."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
    return mode & needed == needed
