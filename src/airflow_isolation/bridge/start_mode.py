"""Decides how a task is started, forked from a zygote or fresh, and says why (docs/start-modes.md).

It looks at the host. The only thing that it changes is that ``decide`` gives uids to an image.
"""

from __future__ import annotations

import os
import platform
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from airflow_isolation.bridge.uid_ranges import configured_range, first_uid, why_no_range
from airflow_isolation.bridge.zygote_recipe import authors_part
from airflow_isolation.container_spec import UserNamespace
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.oci.host import kernel_version
from airflow_isolation.oci.idmapped import why_no_overlay, why_not_idmapped
from airflow_isolation.oci.seccomp import UNCONFINED
from airflow_isolation.settings.effective import UIDS_OF_AN_IMAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.runtime.interface import ContainerRuntime, ImageInNamespace
    from airflow_isolation.settings.effective import EffectiveSettings

#: Since this Linux each mount of /proc has its own hidepid; before, a zygote's would have changed the host's.
_KERNEL = (5, 8)

_MOST_NAMESPACES = Path("/proc/sys/user/max_user_namespaces")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDecision:
    """How a task is started, and why.

    Attributes:
        why: a sentence without its full stop.
        user_namespace: for the zygote and the containers that it forks into.
        idmapped: targets of the mounts that must be idmapped, so that files belong to the workload's user there.

    """

    mode: Literal["fork", "fresh"]
    why: str
    user_namespace: UserNamespace | None = None
    idmapped: frozenset[str] = frozenset()

    def applied_to(self, spec: ContainerSpec) -> ContainerSpec:
        """The specification of the container, changed for this decision."""
        mounts = (replace(mount, idmapped=mount.target in self.idmapped) for mount in spec.mounts)
        return replace(spec, user_namespace=self.user_namespace, mounts=tuple(mounts))


def decide(
    settings: EffectiveSettings,
    spec: ContainerSpec,
    *,
    runtime: ContainerRuntime,
    image_digest: str,
    why_no_privilege: str = "",
) -> StartDecision:
    """Decide for a task. An image without uids gets some, and ``runtime`` looks at an image that it does not know yet.

    ``why_no_privilege``: why whoever asks gets workloads in a user namespace alone, however they are started.

    :raises SpecRefused: ``start_mode`` is fork, and this workload can't be forked; or it must be in a user namespace and can't.
    :raises ContainerRuntimeError: as ``ContainerRuntime.in_user_namespace``.
    """

    def look() -> ImageInNamespace:
        return runtime.in_user_namespace(spec, digest=image_digest, ids=UIDS_OF_AN_IMAGE)

    if why_no_privilege:
        return _confined(settings, spec, _Image(image_digest, look), why_no_privilege)
    return _allowed(settings, _decided(settings, spec, _Image(image_digest, look)))


def _confined(settings: EffectiveSettings, spec: ContainerSpec, image: _Image, why: str) -> StartDecision:
    """Whatever ``start_mode`` says: without a user namespace the workload's user would be somebody on the host."""
    decision = _decided(replace(settings, start_mode="auto"), spec, image)
    if decision.user_namespace is None:
        raise SpecRefused(
            f"{why}, and this one can't be in a user namespace: {decision.why}", hint="docs/node.md says what it needs"
        )
    if settings.start_mode == "fresh":
        return replace(decision, mode="fresh", why="start_mode says so")
    return decision


def foresee(settings: EffectiveSettings, spec: ContainerSpec) -> StartDecision:
    """As ``decide``, for an image that may not be here. It changes nothing, and doesn't notice if no uids are left.

    :raises SpecRefused: as ``decide``.
    """
    return _allowed(settings, _decided(settings, spec, None))


@dataclass(frozen=True, slots=True)
class _Image:
    digest: str
    look: Callable[[], ImageInNamespace]


def _allowed(settings: EffectiveSettings, decision: StartDecision) -> StartDecision:
    if settings.start_mode == "fork" and decision.mode == "fresh":
        raise SpecRefused(
            f"start_mode is fork, but this task can't be forked: {decision.why}",
            hint="Set start_mode = auto to start such tasks fresh",
        )
    return decision


def _decided(settings: EffectiveSettings, spec: ContainerSpec, image: _Image | None) -> StartDecision:
    if settings.start_mode == "fresh":
        return StartDecision(mode="fresh", why="start_mode says so")
    if os.geteuid() != 0:
        return StartDecision(mode="fresh", why="only root may move a forked process into a container's cgroup")
    if kernel_version(platform.release()) < _KERNEL:
        return StartDecision(mode="fresh", why=f"forking into a container needs Linux {'.'.join(map(str, _KERNEL))}")
    idmapped, obstacle = in_user_namespace(settings, spec)
    available = None if obstacle else configured_range(settings.zygote.uid_range)
    if not obstacle and available is None:
        obstacle = why_no_range(settings.zygote.uid_range)
    if available is not None and image is None:
        why = f"in a user namespace of the image's own, from the uids {available}"
        if why_not := why_no_overlay(platform.release()):
            why += f", unless the image has files that its user may read and others may not ({why_not})"
        return StartDecision(mode="fork", why=why, idmapped=idmapped)
    if available is not None and image is not None:
        found = image.look()
        obstacle = found.obstacle
        if not obstacle and not found.keeps_owners and not spec.read_only_root:
            obstacle = "read_only_root is false, and the image's files would belong to nobody"
        if not obstacle:
            try:
                first = first_uid(image.digest, available, state_dir=settings.connection.state_dir)
            except ContainerFailed as error:
                obstacle = error.message
            else:
                return StartDecision(
                    mode="fork",
                    why=f"in a user namespace of the image's own, uids {first} and up",
                    user_namespace=UserNamespace(first=first, keeps_owners=found.keeps_owners),
                    idmapped=idmapped,
                )
    if not settings.image_is_trusted:
        return StartDecision(mode="fresh", why=f"{obstacle}, and the image is not among the trusted ones")
    if written := authors_part(settings):
        # Otherwise a process with privilege on the host would read, or run, a line of a DAG's YAML.
        why = f"{obstacle}, and a zygote with privilege on the host must not have an author's settings: {', '.join(written)}"
        return StartDecision(mode="fresh", why=why)
    if settings.seccomp_profile == UNCONFINED:
        return StartDecision(
            mode="fresh", why=f"{obstacle}, and seccomp_profile = {UNCONFINED} would hold for the zygote, too"
        )
    return StartDecision(mode="fork", why=f"with privilege on the host, for a trusted image: {obstacle}")


def in_user_namespace(settings: EffectiveSettings, spec: ContainerSpec) -> tuple[frozenset[str], str]:
    """The mounts that must be idmapped for a workload in a user namespace, and why it can't run in one; empty when it
    can.
    """
    if settings.backend == "docker":
        return frozenset(), "Docker has no user namespace of a single container"
    if _read(_MOST_NAMESPACES) == "0":
        return frozenset(), "this host has no user namespaces: the sysctl user.max_user_namespaces is 0"
    binds = [mount for mount in spec.mounts if mount.kind == "bind"]
    for mount in binds:
        # Not idmapped: root in the namespace can make a mount writable, and would then have rights to its files.
        if mount.read_only and not _readable_by_others(mount.source):
            return frozenset(), f"{mount.source} is not readable for others, and users of a user namespace are others"
    writable = [mount for mount in binds if not mount.read_only]
    for mount in writable:
        if why := why_not_idmapped(mount.source, runtime=settings.connection.runtime_binary or "runc"):
            return frozenset(), f"the volume {mount.target} is writable, and its files would change owner: {why}"
    return frozenset(mount.target for mount in writable), ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _readable_by_others(path: str) -> bool:
    """Whether others may read the path itself. What is below is not looked at; the administrator has to care for it."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
    return mode & needed == needed
