"""How a task is started: forked from a zygote, or fresh; and why. Looks at the host; ``decide`` changes nothing but uid ranges."""

from __future__ import annotations

import os
import platform
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from airflow_isolation.bridge.uid_ranges import configured_range, first_uid
from airflow_isolation.bridge.zygote_recipe import authors_part
from airflow_isolation.container_spec import UserNamespace
from airflow_isolation.errors import ContainerFailed, SpecRefused
from airflow_isolation.oci.host import kernel_version
from airflow_isolation.oci.idmapped import why_not_idmapped
from airflow_isolation.oci.seccomp import UNCONFINED

if TYPE_CHECKING:
    from airflow_isolation.container_spec import ContainerSpec
    from airflow_isolation.settings.effective import EffectiveSettings

#: setns(2) takes a pidfd since then.
_KERNEL = (5, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDecision:
    """How, and why.

    Attributes:
        why: a sentence without its full stop.
        user_namespace: for the zygote and what it forks into.
        idmapped: targets of the mounts whose files would not belong to the workload's user in there.

    """

    mode: Literal["fork", "fresh"]
    why: str
    user_namespace: UserNamespace | None = None
    idmapped: frozenset[str] = frozenset()

    def applied_to(self, spec: ContainerSpec) -> ContainerSpec:
        """The container in which the workload is to start."""
        mounts = (replace(mount, idmapped=mount.target in self.idmapped) for mount in spec.mounts)
        return replace(spec, user_namespace=self.user_namespace, mounts=tuple(mounts))


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
    idmapped, obstacle = in_user_namespace(settings, spec)
    if not obstacle:
        available = configured_range(settings.zygote.uid_range)
        if available is None:
            obstacle = "there is no uid_range, and no entry of the worker's user in /etc/subuid"
        elif image_digest is None:
            why = f"in a user namespace of the image's own, from the uids {available}"
            return StartDecision(mode="fork", why=why, idmapped=idmapped)
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
                    idmapped=idmapped,
                )
    if not settings.image_is_trusted:
        return StartDecision(mode="fresh", why=f"{obstacle}, and the image is not among the trusted ones")
    if written := authors_part(settings):
        # Else one line of a DAG's YAML would be read, or run, by a process with privilege on the host.
        why = f"{obstacle}, and what has privilege on the host is not made of an author's words: {', '.join(written)}"
        return StartDecision(mode="fresh", why=why)
    if settings.seccomp_profile == UNCONFINED:
        return StartDecision(
            mode="fresh", why=f"{obstacle}, and seccomp_profile = {UNCONFINED} would hold for the zygote, too"
        )
    return StartDecision(mode="fork", why=f"with privilege on the host, for a trusted image: {obstacle}")


def in_user_namespace(settings: EffectiveSettings, spec: ContainerSpec) -> tuple[frozenset[str], str]:
    """Which mounts need their ids mapped for a workload to run in a user namespace, and what keeps it out; empty for nothing."""
    if settings.backend == "docker":
        return frozenset(), "Docker has no user namespace of a single container"
    if not spec.read_only_root:
        return frozenset(), "read_only_root is false, and the image's files would belong to nobody"
    binds = [mount for mount in spec.mounts if mount.kind == "bind"]
    for mount in binds:
        # Not mapped: who is root in the namespace can make a mount writable, and would then be somebody to its files.
        if mount.read_only and not _readable_by_others(mount.source):
            return frozenset(), f"{mount.source} is not readable for others, whom everybody in a user namespace is"
    writable = [mount for mount in binds if not mount.read_only]
    for mount in writable:
        if why := why_not_idmapped(mount.source, runtime=settings.connection.runtime_binary or "runc"):
            return frozenset(), f"the volume {mount.target} is writable, and its files would change owner: {why}"
    return frozenset(mount.target for mount in writable), ""


def _readable_by_others(path: str) -> bool:
    """Only the top is looked at; what lies below is the administrator's to know."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False
    needed = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
    return mode & needed == needed
