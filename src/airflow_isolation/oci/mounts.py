"""Which mounts a container may have, and what they are in a runtime-spec. Pure: ``mount_source`` looks at the disk."""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from airflow_isolation.container_spec import NO_STRINGS
from airflow_isolation.errors import SpecRefused
from airflow_isolation.oci.confinement import HIDDEN_PROCESSES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from airflow_isolation.container_spec import Mount, UserNamespace
    from airflow_isolation.oci.account import Account
    from airflow_isolation.oci.etc_files import EtcFiles

# Here the agent and its socket are mounted; no user's mount may cover it.
OWN_DIRECTORY = "/run/airflow-isolation"

_MAX_PATH = 4095

# The kernel's own trees: a mount over them could misdirect the runtime's writes that protect the host (CVE-2025-52881).
_KERNEL_TREES = ("/proc", "/sys", "/dev")

# Who can use these can become root on the host, whatever user the container has.
_DAEMON_PATHS = (
    "/run/containerd",
    "/run/docker",
    "/run/docker.sock",
    "/run/crio",
    "/run/podman",
    "/run/buildkit",
    "/run/systemd",
    "/run/dbus",
    "/var/lib/containerd",
    "/var/lib/docker",
)

#: (uid_t) -1
_NO_ID = 2**32 - 1

_TMPFS_OPTIONS = ("nosuid", "nodev")
_RUN_SIZE = 64 * 1024 * 1024


def check_mount_target(target: str, *, ours: bool = False) -> None:
    """Check that a mount on ``target`` is allowed; ``ours`` is for the mounts that this project adds by itself.

    :raises SpecRefused: not an absolute, clean path; ``/``, ``/run``, or a directory of the kernel's or of ours.
    """
    _check_path(target, "mount target")
    if target == "/":
        raise SpecRefused("nothing can be mounted over '/', the image itself", hint="Mount on a directory below it")
    for tree in _KERNEL_TREES:
        if _is_at_or_below(target, tree):
            raise SpecRefused(f"mount target {target!r} lies in the kernel's {tree}", hint="Mount it somewhere else")
    place = _without_var_run(target)
    if not ours and (place == "/run" or _is_at_or_below(place, OWN_DIRECTORY)):
        raise SpecRefused(
            f"mount target {target!r} would cover {OWN_DIRECTORY}, the agent's", hint="Mount it somewhere else"
        )


def check_mount_source(source: str, *, daemon_paths: Iterable[str] = ()) -> None:
    """Check that a container may see ``source`` of the host; ``daemon_paths`` are refused beside the well-known places.

    :raises SpecRefused: not an absolute, clean path; /proc, /sys, /dev, or a container daemon's socket or files, or
        a directory that holds one of them.
    """
    _check_path(source, "mount source")
    place = _without_var_run(source)
    for tree in _KERNEL_TREES:
        if _is_at_or_below(place, tree) or _is_at_or_below(tree, place):
            raise SpecRefused(
                f"mount source {source!r} would show the host's {tree}", hint="Mount only what the task reads or writes"
            )
    for daemon_path in (*_DAEMON_PATHS, *map(_without_var_run, daemon_paths)):
        if _is_at_or_below(place, daemon_path) or _is_at_or_below(daemon_path, place):
            raise SpecRefused(
                f"mount source {source!r} would give the container {daemon_path}, and with it the host",
                hint="Mount only what the task reads or writes",
            )


def volume_targets(volumes: Iterable[str], mounts: Iterable[Mount]) -> tuple[str, ...]:
    """The VOLUMEs of an image that need a mount: neither ``mounts`` nor the mounts of every container cover them."""
    brought = ["/tmp", *(mount.target for mount in mounts)]  # noqa: S108 -- the container's own
    return tuple(
        volume
        for volume in volumes
        if _may_be_mounted_on(volume)
        and volume != brought[0]
        and not any(_is_at_or_below(volume, target) for target in brought[1:])
    )


def _may_be_mounted_on(target: str) -> bool:
    try:
        check_mount_target(target)
    except SpecRefused:
        return False
    return True


def check_led_target(target: str, place: str, before: Mapping[str, Mapping[str, Any]]) -> None:
    """Check a mount whose ``target`` is led to ``place`` by symbolic links of the image.

    ``before``: the mounts that are made earlier, from ``runtime_mounts``, by their places.

    :raises SpecRefused: ``place`` is the kernel's or ours, or it is in or over another mount while ``target`` is not.
    """
    for other, mount in before.items():
        asked = mount["destination"]
        if _is_at_or_below(asked, target) == _is_at_or_below(other, place) and (
            # The runtime makes missing directories. In a tmpfs that does no harm; in a bind they would be the host's.
            mount["type"] == "tmpfs" or _is_at_or_below(target, asked) == _is_at_or_below(place, other)
        ):
            continue
        led, where, met = (asked, other, target) if place == target else (target, place, asked)
        raise _led_astray(led, where, f"which would meet what is mounted on {met!r}")
    if place != target:
        try:
            check_mount_target(place)
        except SpecRefused as error:
            raise _led_astray(target, place, "where nothing may be mounted") from error


def _led_astray(target: str, place: str, why: str) -> SpecRefused:
    return SpecRefused(
        f"a symbolic link of the image leads {target!r} to {place!r}, {why}",
        hint="Take the link out of the image, or mount it somewhere else",
    )


def runtime_mounts(
    mounts: Iterable[Mount],
    *,
    account: Account,
    tmp_size: int,
    shm_size: int,
    etc: EtcFiles,
    recursive_read_only: bool,
    host_proc: bool = False,
    host_sys: bool = False,
    user_namespace: UserNamespace | None = None,
    limit_files: Mapping[str, str] = NO_STRINGS,
    volumes: Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Every mount of a container, in order: the usual ones, the user's, the files of /etc; of each, parents before children.

    In this order a mount that a symbolic link of the image leads below /run or /tmp is made in it, not covered by it.
    ``host_sys`` binds the host's /sys, read-only; ``host_proc`` is for the host's pid namespace. ``limit_files`` and
    ``volumes``: as for ``build_runtime_spec``.

    A user's mount on /tmp replaces ours. Where a user's mount is on or above a file of /etc, ours of that file is left out.

    :raises SpecRefused: a target is not allowed or stands twice, or a size is not positive.
    """
    entries = {mount["destination"]: mount for mount in _base_mounts(account, tmp_size, shm_size)}
    if host_proc and user_namespace is None:
        # Other users' processes are not even listed. Only from Linux 5.8 on: before, this would have changed the host's
        # /proc.
        entries["/proc"]["options"] += HIDDEN_PROCESSES
    for target, wanted_of_host in (("/proc", host_proc and user_namespace is not None), ("/sys", host_sys)):
        if wanted_of_host:
            # In a user namespace a bind must bring what is mounted in the tree (else EINVAL), such as systemd's
            # /proc/sys/fs/binfmt_misc: without it, one could see what it covers.
            entries[target] = _bind(target, target, *_recursive(below=recursive_read_only), "noexec")
    for name, source in limit_files.items():
        entries[f"/sys/fs/cgroup/{name}"] = _bind(f"/sys/fs/cgroup/{name}", source, "bind", "ro", "noexec")
    wanted: dict[str, Mount] = {}
    for mount in mounts:
        check_mount_target(mount.target, ours=True)
        if mount.target in wanted:
            raise SpecRefused(f"two mounts have the target {mount.target!r}", hint="Remove one of them")
        wanted[mount.target] = mount
    users = [
        _tmpfs(target, "rw", "exec", "mode=755", *_owner(account), f"size={_size(tmp_size, 'tmp_size')}")
        for target in volumes
    ]
    for mount in wanted.values():
        entries.pop(mount.target, None)
        entry = _user_mount(mount, account, recursive_read_only=recursive_read_only)
        if mount.idmapped and mount.kind == "bind" and user_namespace is not None:
            entry = _idmapped(entry, account, user_namespace)
        users.append(entry)
    files = [
        _bind(target, source, "bind", "ro", "noexec")
        for target, source in _etc_mounts(etc)
        if not any(_is_at_or_below(target, above) for above in wanted)
    ]
    return [*_parents_first(entries.values()), *_parents_first(users), *files]


def _parents_first(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: PurePosixPath(entry["destination"]).parts)


def _base_mounts(account: Account, tmp_size: int, shm_size: int) -> list[dict[str, Any]]:
    return [
        _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "noexec", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _tmpfs("/dev/shm", "noexec", "mode=1777", f"size={_size(shm_size, 'shm_size')}"),  # noqa: S108 -- the container's own
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
        _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
        # Programs that size themselves (the JVM, joblib) read their limits here.
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", "nosuid", "noexec", "nodev", "relatime", "ro"),
        _tmpfs("/run", "noexec", "mode=755", f"size={_RUN_SIZE}"),
        # Programs may run from /tmp: PythonVirtualenvOperator puts its environment there, and BashOperator its script.
        _tmpfs("/tmp", "exec", "mode=1777", *_owner(account), f"size={_size(tmp_size, 'tmp_size')}"),  # noqa: S108 -- as above
    ]


def _etc_mounts(etc: EtcFiles) -> list[tuple[str, str]]:
    files = (("/etc/hostname", etc.hostname), ("/etc/hosts", etc.hosts), ("/etc/resolv.conf", etc.resolv_conf))
    return [(target, source) for target, source in files if source]


def _user_mount(mount: Mount, account: Account, *, recursive_read_only: bool) -> dict[str, Any]:
    if mount.kind == "tmpfs":
        size = () if mount.size is None else (f"size={_size(mount.size, f'the size of the tmpfs on {mount.target}')}",)
        access = "ro" if mount.read_only else "rw"
        runs = "exec" if mount.executable else "noexec"
        return _tmpfs(mount.target, access, runs, f"mode={mount.mode:o}", *_owner(account), *size)
    if not mount.read_only:
        return _bind(mount.target, mount.source, "rbind", "rw")
    if recursive_read_only:
        return _bind(mount.target, mount.source, *_recursive(below=True))
    # Without rro, mounts below the source would stay writable, so they are left out.
    return _bind(mount.target, mount.source, "bind", "ro")


def _recursive(*, below: bool) -> tuple[str, ...]:
    """The options of a recursive read-only bind.

    ``below``: what is mounted below is made read-only too, else left as it is.
    """
    # "ro" as well: a runtime that doesn't know "rro" ignores it silently and would leave everything writable.
    return ("rbind", "ro", "rro") if below else ("rbind", "ro")


def _idmapped(bind: dict[str, Any], account: Account, namespace: UserNamespace) -> dict[str, Any]:
    return {
        **bind,
        "options": [*bind["options"], "ridmap" if "rbind" in bind["options"] else "idmap"],
        "uidMappings": _mappings({account.uid}, namespace),
        "gidMappings": _mappings({account.gid, *account.additional_gids}, namespace),
    }


def _mappings(own: Collection[int], namespace: UserNamespace) -> list[dict[str, int]]:
    """Maps the account's ids in the files to its ids in the namespace; files of other ids keep their owners on the host.

    The namespace's other ids are not mapped: root in the namespace, as a zygote is, can't make files of the host's root.
    And nobody may write to a file whose owner has no id in the kernel.
    """
    mappings = [_mapping(id, namespace.first + id, 1) for id in sorted(own)]
    begin = 0
    for taken, end in sorted([*((id, id + 1) for id in own), (namespace.first, namespace.first + namespace.size)]):
        if taken > begin:
            mappings.append(_mapping(begin, begin, taken - begin))
        begin = max(begin, end)
    return [*mappings, _mapping(begin, begin, _NO_ID - begin)]


def _mapping(in_files: int, in_kernel: int, size: int) -> dict[str, int]:
    # The runtime-spec uses the names of a user namespace's mappings, containerID and hostID.
    return {"containerID": in_files, "hostID": in_kernel, "size": size}


def _owner(account: Account) -> tuple[str, ...]:
    # runc 1.1 gives a tmpfs the mode that the directory has in the image, whatever its options say: the user must be
    # able to write to it even then.
    return (f"uid={account.uid}", f"gid={account.gid}")


def _bind(target: str, source: str, *options: str) -> dict[str, Any]:
    return _mount(target, "bind", source, *options, "rprivate", "nosuid", "nodev")


def _tmpfs(target: str, *options: str) -> dict[str, Any]:
    return _mount(target, "tmpfs", "tmpfs", *_TMPFS_OPTIONS, *options)


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _size(size: int, name: str) -> int:
    # For a tmpfs, size=0 means no limit.
    if size <= 0:
        raise SpecRefused(f"{name} is {size} bytes", hint="Give a positive number of bytes")
    return size


def _check_path(path: str, what: str) -> None:
    if not path.startswith("/") or path.startswith("//") or posixpath.normpath(path) != path:
        raise SpecRefused(
            f"{what} {path[:256]!r} is not an absolute path without '.', '..' and doubled or trailing slashes"
        )
    if "\0" in path or len(path) > _MAX_PATH:
        raise SpecRefused(f"{what} {path[:256]!r} is not a path: NUL character, or longer than {_MAX_PATH}")


def _is_at_or_below(path: str, place: str) -> bool:
    return place in {"/", path} or path.startswith(f"{place}/")


def _without_var_run(path: str) -> str:
    # /var/run is /run on every distribution; checking one name then checks both.
    return path.removeprefix("/var") if _is_at_or_below(path, "/var/run") else path
