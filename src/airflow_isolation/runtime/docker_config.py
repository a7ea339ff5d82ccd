"""From a ContainerSpec to the body of Docker's ``POST /containers/create``: pure functions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci import (
    capability_names,
    check_mount_source,
    container_hostname,
    linux_limits,
    process_environment,
    volume_targets,
    working_directory,
)
from airflow_isolation.oci.confinement import MASKED_PATHS, NOFILE_SOFT, OOM_SCORE_ADJ, READONLY_PATHS
from airflow_isolation.oci.mounts import runtime_mounts
from airflow_isolation.oci.runtime_spec import NO_ETC_FILES
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from airflow_isolation.container_spec import ContainerSpec, Mount, Resources
    from airflow_isolation.oci import Account, EtcFiles, HostFacts, ImageConfig

# The label of the attempt that made a container: a failed attempt undoes only its own container.
ATTEMPT = labels.PREFIX + "attempt"

# Room for what the first process writes before the agent's hello. Two files, because a rotation empties one.
_LOG_FILES = {"max-size": "1m", "max-file": "2", "compress": "false"}


def container_config(
    id: str,
    spec: ContainerSpec,
    *,
    namespace: str,
    attempt: str,
    image: ImageConfig,
    account: Account,
    host: HostFacts,
    seccomp: str,
    cgroup_parent: str = "",
    etc: EtcFiles = NO_ETC_FILES,
    filled_volumes: Collection[str] = (),
) -> dict[str, Any]:
    """The whole body. ``seccomp`` is from ``docker_profile``. What image and ``spec`` leave open comes from ``oci``.

    ``cgroup_parent`` is in the form of dockerd's cgroup driver: an absolute path, or the name of a slice; empty is
    dockerd's own. The files of ``etc`` need not exist before the start. Without ``etc``, Docker makes its own.

    ``filled_volumes`` are the VOLUMEs in which the image has files: if the image is read-only, so are they.

    Three things differ from containerd, because Docker can't express them:
    - A bind mount has no nosuid, nodev and noexec of its own. no_new_privileges and the device cgroup replace the first two.
    - The image's VOLUMEs become anonymous volumes, even where a tmpfs covers them. ``remove`` removes them.
    - The image's labels appear beside the container's own.

    :raises SpecRefused: as ``oci.build_runtime_spec``.
    """
    if not spec.argv or not spec.argv[0] or any("\0" in argument for argument in spec.argv):
        raise SpecRefused("argv is not a command: it is empty, or a NUL is in it")
    if spec.user_namespace is not None:
        raise SpecRefused("Docker knows no user namespace of a single container", hint="Use containerd")
    hostname = container_hostname(spec, id)
    environment = process_environment(spec, image=image, account=account, hostname=hostname)
    volumes = volume_targets(image.volumes, spec.mounts) if spec.read_only_root else ()
    mounts = _mounts(spec, account, host, etc, volumes=[one for one in volumes if one not in filled_volumes])
    return {
        "Image": spec.image,
        # With Entrypoint set, the image's ENTRYPOINT and CMD are both ignored.
        "Entrypoint": list(spec.argv),
        "Cmd": [],
        "Env": [f"{name}={value}" for name, value in environment.items()],
        "Labels": {**spec.labels, labels.NAMESPACE: namespace, ATTEMPT: attempt},
        "User": f"{account.uid}:{account.gid}",
        "WorkingDir": working_directory(spec, image),
        "Hostname": hostname,
        "Tty": False,
        "OpenStdin": False,
        "StopTimeout": math.ceil(spec.stop_grace_period),
        "Healthcheck": {"Test": ["NONE"]},
        "NetworkDisabled": spec.network == "none",
        "HostConfig": {
            **_host_config(spec, account, host, seccomp, cgroup_parent),
            "Tmpfs": _tmpfs(mounts),
            "Binds": _etc_binds(mounts, etc),
            "Mounts": [_bind(mount) for mount in spec.mounts if mount.kind == "bind"],
            # Docker would mount a writable copy of such a VOLUME, and can't be asked for a read-only one.
            "ReadonlyPaths": [*READONLY_PATHS, *(one for one in volumes if one in filled_volumes)],
        },
    }


def _host_config(
    spec: ContainerSpec, account: Account, host: HostFacts, seccomp: str, cgroup_parent: str
) -> dict[str, Any]:
    return {
        **docker_limits(spec.resources, host),
        "NetworkMode": spec.network,
        "IpcMode": "private",
        "PidMode": "host" if spec.pid_namespace == "host" else "",
        "UTSMode": "",
        "CgroupnsMode": "private",
        "CgroupParent": cgroup_parent,
        "Privileged": False,
        "ReadonlyRootfs": spec.read_only_root,
        "CapDrop": ["ALL"],
        "CapAdd": capability_names(spec.capabilities),
        "SecurityOpt": [
            *(["no-new-privileges:true"] if spec.no_new_privileges else []),
            f"seccomp={seccomp}",
        ],
        "GroupAdd": [str(gid) for gid in account.additional_gids if gid != account.gid],
        "ShmSize": spec.shm_size,
        "Init": False,
        "AutoRemove": False,
        "RestartPolicy": {"Name": "no"},
        "OomScoreAdj": OOM_SCORE_ADJ,
        "MaskedPaths": [*MASKED_PATHS, *host.masked_paths],
        "Ulimits": [
            {"Name": "nofile", "Soft": min(NOFILE_SOFT, host.open_files), "Hard": host.open_files},
            {"Name": "core", "Soft": 0, "Hard": 0},
        ],
        # ``local`` needs no logging daemon. Unlike json-file, it does not store lines at several times their size.
        "LogConfig": {"Type": "local", "Config": _LOG_FILES},
    }


def docker_limits(resources: Resources, host: HostFacts) -> dict[str, Any]:
    """The limits that are set, for ``HostConfig`` and for ``POST /containers/ID/update``.

    :raises SpecRefused: as ``oci.linux_limits``.
    """
    document = linux_limits(resources, host)
    limits: dict[str, Any] = {}
    if resources.cpus is not None:
        limits["NanoCpus"] = round(resources.cpus * 1e9)
    if resources.cpu_weight is not None:
        limits["CpuShares"] = document["cpu"]["shares"]
    if resources.cpuset is not None:
        limits["CpusetCpus"] = resources.cpuset
    if resources.memory is not None:
        limits["Memory"] = resources.memory
        # MemorySwap is memory and swap together: the same figure means no swap.
        limits["MemorySwap"] = resources.memory + (resources.memory_swap or 0)
    if resources.pids is not None:
        limits["PidsLimit"] = resources.pids
    return limits


def _mounts(
    spec: ContainerSpec, account: Account, host: HostFacts, etc: EtcFiles, *, volumes: Iterable[str]
) -> list[dict[str, Any]]:
    """The mounts as the runtime-spec has them: they are checked, and the tmpfs options below are taken from them."""
    for mount in spec.mounts:
        if mount.kind == "bind":
            check_mount_source(mount.source, daemon_paths=host.daemon_paths)
    return runtime_mounts(
        spec.mounts,
        account=account,
        tmp_size=spec.tmp_size,
        shm_size=spec.shm_size,
        etc=etc,
        recursive_read_only=False,
        volumes=volumes,
    )


def _tmpfs(mounts: list[dict[str, Any]]) -> dict[str, str]:
    # Docker mounts /dev and what is below it by itself, in the same way.
    return {
        mount["destination"]: ",".join(mount["options"])
        for mount in mounts
        if mount["type"] == "tmpfs" and not f"{mount['destination']}/".startswith("/dev/")
    }


def _etc_binds(mounts: list[dict[str, Any]], etc: EtcFiles) -> list[str]:
    """The files of /etc, in Docker's older form: their sources may be made after the container, by which a clean-up finds
    them.
    """
    binds = [mount for mount in mounts if mount["source"] in {etc.hostname, etc.hosts, etc.resolv_conf}]
    for bind in binds:
        if ":" in bind["source"]:
            raise SpecRefused(
                f"Docker can't mount {bind['source']}, which has a colon in its path",
                hint="Set [container_runtime] state_dir to a path without one",
            )
    return [f"{bind['source']}:{bind['destination']}:ro" for bind in binds]


def _bind(mount: Mount) -> dict[str, Any]:
    return {
        "Type": "bind",
        "Source": mount.source,
        "Target": mount.target,
        "ReadOnly": mount.read_only,
        # In this form Docker refuses a source that does not exist; in its older form it would make a directory.
        "BindOptions": {"Propagation": "rprivate"},
    }
