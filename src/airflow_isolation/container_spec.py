"""What a container shall be: one frozen value that both backends understand.

Every field means the same on containerd and on Docker. What a backend can't do it refuses by the field's name
(``SpecRefused``) before anything is created.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

NO_STRINGS: Mapping[str, str] = MappingProxyType({})

MIB = 1024 * 1024


def no_strings() -> Mapping[str, str]:
    """The empty mapping; a function, because dataclasses take only hashable defaults."""
    return NO_STRINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A directory or file of the host, or a tmpfs, inside the container.

    ``source`` is absolute and free of symbolic links; it is empty for a tmpfs. ``size`` (bytes) is for a tmpfs.
    """

    target: str
    source: str = ""
    kind: Literal["bind", "tmpfs"] = "bind"
    read_only: bool = True
    size: int | None = None
    mode: int = 0o1777
    executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Limits. None is no limit. ``cpus`` in cores, ``memory`` in bytes (swap is off), ``pids`` a count."""

    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A container, whole. Frozen: a change is ``dataclasses.replace``.

    Attributes:
        image: reference as the user wrote it, such as ``registry.example/team/sales:1.4`` or a digest.
        argv: the command; the image's ENTRYPOINT and CMD are never run.
        env: added to the image's own Env, and stronger.
        user: ``name``, ``uid`` or ``uid:gid``; empty is the image's USER. Uid 0 is refused unless ``allow_root``.
        network: ``host``, ``none`` or the name of a network.
        capabilities: without ``CAP_``; nothing else is in the container's sets.
        seccomp: ``default``, ``unconfined``, or an absolute path of a profile in Docker's JSON form.
        tmp_size, shm_size: bytes of the tmpfs on /tmp and on /dev/shm.
        stop_grace_period: seconds between SIGTERM and SIGKILL.
        timezone: such as ``Europe/Berlin``; empty leaves the image's.
        cgroup_parent: below the cgroup mount; empty is the backend's own default.

    """

    image: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=no_strings)
    labels: Mapping[str, str] = field(default_factory=no_strings)
    mounts: tuple[Mount, ...] = ()
    user: str = ""
    allow_root: bool = False
    working_dir: str = ""
    hostname: str = ""
    resources: Resources = Resources()
    network: str = "host"
    read_only_root: bool = True
    capabilities: frozenset[str] = frozenset()
    no_new_privileges: bool = True
    seccomp: str = "default"
    tmp_size: int = 1024 * MIB
    shm_size: int = 64 * MIB
    stop_grace_period: float = 10.0
    timezone: str = ""
    cgroup_parent: str = ""
