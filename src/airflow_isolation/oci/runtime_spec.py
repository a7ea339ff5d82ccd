"""From a ContainerSpec to the runtime-spec JSON that runc and crun read. Pure, deterministic, and safe by default.

Sources: OCI runtime-spec 1.0.2 (config.md, config-linux.md), and the defaults of containerd and Docker.
"""

from __future__ import annotations

import math
import posixpath
import re
from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import NO_STRINGS
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.confinement import (
    CAPABILITIES,
    DEVICES,
    MASKED_PATHS,
    MOUNTED_IN_SYS,
    NOFILE_SOFT,
    OOM_SCORE_ADJ,
    READONLY_PATHS,
    UMASK,
)
from airflow_isolation.oci.etc_files import EtcFiles
from airflow_isolation.oci.identifier import check_identifier
from airflow_isolation.oci.mounts import check_mount_source, runtime_mounts
from airflow_isolation.oci.seccomp import resolve_profile

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from airflow_isolation.container_spec import ContainerSpec, Resources
    from airflow_isolation.oci.account import Account
    from airflow_isolation.oci.host import HostFacts
    from airflow_isolation.oci.image_config import ImageConfig

DEFAULT_CGROUP_PARENT = "airflow"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

NO_ETC_FILES = EtcFiles()

# The kernel accepts quotas from 1 ms on, which is a hundredth of a core with the usual period of 100 ms.
_CPU_PERIOD = 100_000
_MIN_CPUS = 0.01
_MAX_CPUS = 65536
_USUAL_SHARES, _USUAL_WEIGHT = 1024, 100

# With less, runc itself has no room.
_MIN_MEMORY = 6 * 1024 * 1024

# The kernel's limit, and the characters of RFC 1123 (with the underscore that container names have).
_MAX_HOSTNAME = 64
_HOSTNAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")

# Names as in tzdata: no absolute path, and no way out of its directory.
_TIMEZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+)*")


def build_runtime_spec(
    spec: ContainerSpec,
    *,
    id: str,
    image: ImageConfig,
    account: Account,
    host: HostFacts,
    seccomp: Mapping[str, Any] | None,
    etc: EtcFiles = NO_ETC_FILES,
    cgroups_path: str = "",
    limit_files: Mapping[str, str] = NO_STRINGS,
    volumes: Iterable[str] = (),
) -> dict[str, Any]:
    """Build the runtime-spec of a container.

    The result is plain JSON data and the caller's to change (annotations, say). The root file system is ``rootfs``,
    relative to the bundle, where containerd's shim mounts the snapshot.

    Two things are not checked here: whether a mount's source exists (``check_mount_source_on_disk``), and whether there is
    a network of the name ``spec.network`` (all but ``host`` give a network namespace of its own, with loopback only).

    Args:
        spec: what is asked for. ``spec.user`` is not read, because ``account`` is what it was resolved to.
        id: the container's id; also its host name when ``spec.hostname`` is empty.
        image: the image's configuration. ``spec.env`` overrides its Env, ``spec.working_dir`` its WORKDIR.
        account: from ``resolve_account``, where root was refused or allowed.
        host: from ``read_host``.
        seccomp: from ``load_profile(spec.seccomp, forks_into=spec.forks_into)``; None only for ``unconfined``.
        etc: host paths of /etc/hostname, /etc/hosts and /etc/resolv.conf, from ``write_etc_files``.
        cgroups_path: as the runtime's cgroup driver wants it; empty is ``/<spec.cgroup_parent or "airflow">/<id>``.
        limit_files: file names in the container's /sys/fs/cgroup, with the host paths of the files that replace them.
        volumes: those of ``volume_targets`` that get a tmpfs of ``spec.tmp_size``.

    :raises SpecRefused: a field of ``spec`` is impossible or unsafe; the error names it and what would be right.
    """
    if (seccomp is None) != (spec.seccomp == "unconfined"):
        raise ValueError(
            f"spec.seccomp is {spec.seccomp!r}, but the profile given is {'none' if seccomp is None else 'one'}"
        )
    check_identifier(id)
    check_platform(image, host)
    hostname = container_hostname(spec, id)
    host_sys = spec.user_namespace is not None and spec.network == "host"
    for mount in spec.mounts:
        if mount.kind == "bind":
            check_mount_source(mount.source, daemon_paths=host.daemon_paths)
    document: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(spec, hostname, image, account, host),
        "root": {"path": "rootfs", "readonly": spec.read_only_root},
        "hostname": hostname,
        "mounts": runtime_mounts(
            spec.mounts,
            account=account,
            tmp_size=spec.tmp_size,
            shm_size=spec.shm_size,
            etc=etc,
            recursive_read_only=host.recursive_read_only,
            # In a user namespace, new mounts of /proc and /sys need the pid or the network namespace to be its own too.
            host_proc=spec.pid_namespace == "host",
            host_sys=host_sys,
            user_namespace=spec.user_namespace,
            limit_files=limit_files,
            volumes=volumes,
        ),
        "linux": {
            "namespaces": _namespaces(spec),
            "cgroupsPath": cgroups_path or f"/{_cgroup_parent(spec.cgroup_parent)}/{id}",
            "resources": linux_resources(spec.resources, host),
            # Later mounts of the host don't appear in the container, nor the container's on the host.
            "rootfsPropagation": "rprivate",
            "maskedPaths": [*MASKED_PATHS, *host.masked_paths, *(MOUNTED_IN_SYS if host_sys else ())],
            "readonlyPaths": list(READONLY_PATHS),
        },
    }
    if spec.user_namespace is not None:
        range_ = {"containerID": 0, "hostID": spec.user_namespace.first, "size": spec.user_namespace.size}
        document["linux"].update(uidMappings=[range_], gidMappings=[dict(range_)])
    if seccomp is not None:
        document["linux"]["seccomp"] = resolve_profile(
            seccomp, architecture=host.architecture, capabilities=spec.capabilities, kernel=host.kernel
        )
    return document


def process_environment(spec: ContainerSpec, *, image: ImageConfig, account: Account, hostname: str) -> dict[str, str]:
    """The environment of the first process, for both backends: our defaults, overridden by the image's Env and ``spec.env``.

    HOME is the account's directory. Nothing is mounted over it: a tmpfs would hide what images keep there, such as
    ~/.local of apache/airflow. A uid without a home in the image gets /tmp, which is always writable. ``spec.timezone``
    becomes TZ, which needs the image's tzdata.

    :raises SpecRefused: a name is empty or holds ``=``, there is a NUL, or the time zone's name has not tzdata's form.
    """
    environment = {
        "PATH": DEFAULT_PATH,
        "HOSTNAME": hostname,
        "HOME": account.home or "/tmp",  # noqa: S108 -- the container's own tmpfs
        **image.env,
    }
    if spec.timezone:
        if not _TIMEZONE.fullmatch(spec.timezone):
            raise SpecRefused(f"timezone {spec.timezone[:64]!r} is not a name such as Europe/Berlin")
        environment["TZ"] = spec.timezone
    for name, value in spec.env.items():
        if not name or "=" in name or "\0" in name + value:
            raise SpecRefused(
                f"environment variable {name[:64]!r} can't be: its name is empty or holds '=', or a NUL is in it"
            )
        environment[name] = value
    return environment


def working_directory(spec: ContainerSpec, image: ImageConfig) -> str:
    """The absolute, clean working directory: ``spec``'s, else the image's WORKDIR (relative to ``/``), else ``/``.

    :raises SpecRefused: ``spec.working_dir`` is relative, or the directory lies in /proc, which could lead to the host
        (CVE-2024-21626).
    """
    if spec.working_dir and not spec.working_dir.startswith("/"):
        raise SpecRefused(f"working_dir {spec.working_dir!r} is not an absolute path")
    wanted = spec.working_dir or image.working_dir
    clean = "/" + posixpath.normpath(f"/{wanted}").lstrip("/")
    if "\0" in clean or clean == "/proc" or clean.startswith("/proc/"):
        raise SpecRefused(
            f"working directory {wanted!r} lies in /proc", hint="Set working_dir to a directory of the image"
        )
    return clean


def container_hostname(spec: ContainerSpec, id: str) -> str:
    """``spec.hostname``, else the id, cut to the kernel's 64 characters.

    :raises SpecRefused: longer than 64 characters, or other than letters, digits, dots, dashes and underscores.
    """
    hostname = spec.hostname or id[:_MAX_HOSTNAME].rstrip("._-")
    if len(hostname) > _MAX_HOSTNAME or not _HOSTNAME.fullmatch(hostname):
        raise SpecRefused(
            f"{hostname[: _MAX_HOSTNAME + 1]!r} can't be a hostname",
            hint="Use letters, digits, dots, dashes and underscores, 64 characters at most",
        )
    return hostname


def check_platform(image: ImageConfig, host: HostFacts) -> None:
    """:raises SpecRefused: the image is made for another architecture or operating system."""
    if (image.os, image.architecture) != ("linux", host.architecture):
        raise SpecRefused(
            f"the image is made for {image.os}/{image.architecture}, this host is linux/{host.architecture}",
            hint="Use an image of this host's platform",
        )


def capability_names(capabilities: frozenset[str]) -> list[str]:
    """The names sorted, with the prefix CAP_ that runtimes want.

    A process that is not root has these only in its bounding set, as with Docker: none is inheritable or ambient.

    :raises SpecRefused: one is not a capability's name without ``CAP_``.
    """
    for name in sorted(capabilities - CAPABILITIES):
        raise SpecRefused(f"{name!r} is not a capability", hint="Write it as in NET_BIND_SERVICE, without CAP_")
    return [f"CAP_{name}" for name in sorted(capabilities)]


def linux_resources(resources: Resources, host: HostFacts) -> dict[str, Any]:
    """``linux.resources``: access to the usual devices only, and the limits that are set.

    :raises SpecRefused: the kernel would refuse a limit, or take it for no limit.
    """
    document: dict[str, Any] = {"devices": _device_rules(), **linux_limits(resources, host)}
    if host.cgroup_v2 and resources.oom_group:
        # Without it the kernel would kill one process, and the workload's others would wait for it.
        document["unified"] = {"memory.oom.group": "1"}
    return document


def linux_limits(resources: Resources, host: HostFacts) -> dict[str, Any]:
    """The part of ``linux.resources`` that can change while the container runs: the limits that are set.

    Swap is off unless set.

    :raises SpecRefused: the kernel would refuse a limit, or take it for no limit.
    """
    limits: dict[str, Any] = {}
    if resources.memory is not None:
        if resources.memory < _MIN_MEMORY:
            raise SpecRefused(f"memory is {resources.memory} bytes", hint=f"Give at least {_MIN_MEMORY} bytes")
        limits["memory"] = {"limit": resources.memory}
        if host.swap_limit:
            # Memory and swap together.
            limits["memory"]["swap"] = resources.memory + (resources.memory_swap or 0)
    if resources.memory_swap:
        if resources.memory is None:
            raise SpecRefused("memory_swap is set without memory", hint="Give memory too")
        if not host.swap_limit:
            raise SpecRefused(
                "memory_swap can't be set: this kernel does not limit swap",
                hint="Start the host with swapaccount=1 on the kernel's command line",
            )
    if cpu := _cpu(resources):
        limits["cpu"] = cpu
    if resources.pids is not None:
        if resources.pids < 1:
            raise SpecRefused(f"pids is {resources.pids}", hint="Give at least 1")
        limits["pids"] = {"limit": resources.pids}
    return limits


def _cpu(resources: Resources) -> dict[str, Any]:
    cpu: dict[str, Any] = {}
    if resources.cpus is not None:
        if not (math.isfinite(resources.cpus) and _MIN_CPUS <= resources.cpus <= _MAX_CPUS):
            raise SpecRefused(f"cpus is {resources.cpus}", hint=f"Give cores, at least {_MIN_CPUS}")
        cpu.update(quota=round(resources.cpus * _CPU_PERIOD), period=_CPU_PERIOD)
    if resources.cpu_weight is not None:
        cpu["shares"] = cpu_shares(resources.cpu_weight)
    if resources.cpuset is not None:
        cpu["cpus"] = resources.cpuset
    return cpu


def cpu_shares(weight: int) -> int:
    """The ``cpu.shares`` of cgroup v1 for a weight of v2. The usual shares are 1024, the usual weight is 100.

    >>> cpu_shares(100), cpu_shares(50)
    (1024, 512)
    """
    return round(weight * _USUAL_SHARES / _USUAL_WEIGHT)


def _process(
    spec: ContainerSpec, hostname: str, image: ImageConfig, account: Account, host: HostFacts
) -> dict[str, Any]:
    if not spec.argv or not spec.argv[0] or any("\0" in argument for argument in spec.argv):
        raise SpecRefused("argv is not a command: it is empty, or a NUL is in it")
    capabilities = capability_names(spec.capabilities)
    environment = process_environment(spec, image=image, account=account, hostname=hostname)
    process: dict[str, Any] = {
        # A terminal would be made through the container's own /dev/pts (CVE-2025-52565).
        "terminal": False,
        "user": {
            "uid": account.uid,
            "gid": account.gid,
            "umask": UMASK,
            "additionalGids": list(account.additional_gids),
        },
        "args": list(spec.argv),
        "env": [f"{name}={value}" for name, value in environment.items()],
        "cwd": working_directory(spec, image),
        "capabilities": {
            "bounding": list(capabilities),
            "effective": list(capabilities),
            "permitted": list(capabilities),
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
            {"type": "RLIMIT_NOFILE", "soft": min(NOFILE_SOFT, host.open_files), "hard": host.open_files},
        ],
        "noNewPrivileges": spec.no_new_privileges,
        "oomScoreAdj": OOM_SCORE_ADJ,
    }
    # In the host's pid namespace /proc is the host's, read-only, where runc would have to write the profile's name.
    if host.apparmor_profile and spec.pid_namespace == "private":
        process["apparmorProfile"] = host.apparmor_profile
    return process


def _namespaces(spec: ContainerSpec) -> list[dict[str, str]]:
    namespaces: list[dict[str, str]] = []
    if spec.user_namespace is not None:
        # It comes first, because the other namespaces must belong to it.
        namespaces.append({"type": "user"})
        if spec.user_namespace.path:
            namespaces[0]["path"] = spec.user_namespace.path
    kinds = ["ipc", "uts", "mount", "cgroup"]
    if spec.pid_namespace == "private":
        kinds.insert(0, "pid")
    if spec.network != "host":
        kinds.append("network")
    return [*namespaces, *({"type": kind} for kind in kinds)]


def _cgroup_parent(cgroup_parent: str) -> str:
    parent = (cgroup_parent or DEFAULT_CGROUP_PARENT).strip("/")
    if "\0" in parent or any(part in {"", ".", ".."} for part in parent.split("/")):
        raise SpecRefused(f"cgroup_parent {cgroup_parent!r} is not a path of cgroup names below the cgroup mount")
    return parent


def _device_rules() -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for major, minor in DEVICES:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major, "access": "rwm"}
        if minor is not None:
            rule["minor"] = minor
        rules.append(rule)
    return rules
