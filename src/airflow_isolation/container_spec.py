"""The specification of a container: one frozen value that both backends understand.

Every field means the same on containerd and on Docker. If a backend can't do something, it raises ``SpecRefused`` with the
field's name before anything is created.
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
    ``idmapped``: in a user namespace, the container's user and groups have the same rights to its files as without one.
    """

    target: str
    source: str = ""
    kind: Literal["bind", "tmpfs"] = "bind"
    read_only: bool = True
    size: int | None = None
    mode: int = 0o1777
    executable: bool = False
    idmapped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    """Limits for one disk: bytes (``bps``) and operations (``iops``) a second, read and written.

    None leaves a limit as it is.

    ``device`` is ``MAJOR:MINOR`` or a path such as ``/dev/sda``.
    """

    device: str
    rbps: int | Literal["max"] | None = None
    wbps: int | Literal["max"] | None = None
    riops: int | Literal["max"] | None = None
    wiops: int | Literal["max"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Limits. None is no limit, or the kernel's default.

    Every backend and every host has cpus, memory, pids, cpuset and memory_swap; cgroup v1 has cpu_weight too. The others
    need cgroup v2, and a worker that may make cgroups. Elsewhere they are refused by name.

    Attributes:
        cpus: cores.
        memory: bytes; swap is off unless ``memory_swap`` is set.
        pids: processes and threads together.
        cpu_weight: 1 to 10000 against other workloads of the same purpose; 100 is usual.
        cpuset: processors, such as ``0-3,8``.
        memory_request: bytes that the kernel does not take away when others need some.
        memory_high: bytes from which on the workload is slowed down; unless set, computed from memory_request and memory.
        memory_swap: bytes of swap, besides ``memory``.
        io_max: limits for disks.
        io_weight: 1 to 10000, as ``cpu_weight``.
        oom_group: when one process is killed for memory, all are; False is for a container with several workloads. On
            cgroup v1 it is always False.

    """

    cpus: float | None = None
    memory: int | None = None
    pids: int | None = None
    cpu_weight: int | None = None
    cpuset: str | None = None
    memory_request: int | None = None
    memory_high: int | None = None
    memory_swap: int | None = None
    io_max: tuple[DeviceRates, ...] = ()
    io_weight: int | None = None
    oom_group: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNamespace:
    """A user namespace: ids 0 to ``size`` - 1 in the container are ``first`` and those after it on the host.

    ``path`` is that of an existing namespace, to join it; empty makes a new one. ``keeps_owners``: the image's files have
    their owners in it; otherwise they belong to nobody.
    """

    first: int
    size: int = 65536
    path: str = ""
    keeps_owners: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A container, whole. Frozen: a change is ``dataclasses.replace``.

    Attributes:
        image: reference as the user wrote it, such as ``registry.example/team/sales:1.4`` or a digest.
        argv: the command; the image's ENTRYPOINT and CMD are never run.
        env: added to the image's own Env, and overrides it.
        user: ``name``, ``uid`` or ``uid:gid``; empty is the image's USER. Uid 0 is refused unless ``allow_root``.
        network: ``host``, ``none`` or the name of a network.
        capabilities: without ``CAP_``; the container has no others.
        seccomp: ``default``, ``unconfined``, or an absolute path of a profile in Docker's JSON form.
        read_only_root: the image can't be written to. Then each VOLUME that the image leaves empty is a tmpfs.
        tmp_size: bytes of the tmpfs on /tmp, and of the one on each such VOLUME.
        shm_size: bytes of the tmpfs on /dev/shm.
        stop_grace_period: seconds between SIGTERM and SIGKILL.
        timezone: such as ``Europe/Berlin``; empty leaves the image's.
        cgroup_parent: below the cgroup mount; empty is the backend's own default.
        pid_namespace: ``host`` is for zygotes, which fork into the namespaces of other containers.
        forks_into: for zygotes only: the ``capabilities`` of the containers that it forks into. Its seccomp filter allows
            what theirs allows, and the calls for entering a container.
        user_namespace: None is the host's. Needs containerd.
        budget: what all workloads of the same purpose together may use; only cpus, memory and pids. Needs cgroup v2.

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
    pid_namespace: Literal["private", "host"] = "private"
    forks_into: frozenset[str] | None = None
    user_namespace: UserNamespace | None = None
    budget: Resources = Resources()
