"""A program of its own, run by mapped_layers: mounts directories of the host with other owners, where the daemon sees them.

Standard library only, and imported by no module: it runs with ``python -I -S``. It reads one JSON object on stdin: do, pid,
directory, layers, first, size. It writes one on stdout: empty, or failed (a sentence). What it does:

    try     whether the kernel maps the owners of the first layer; nothing stays
    map     unmounts what was at <directory>/n before, then mounts layer n there
    unmap   unmounts all of that, and removes the directory

It works in the mount namespace of the process ``pid``, the daemon: a service of systemd may have a mount namespace of its
own, and sees only mounts made there. Sources: mount_setattr(2), open_tree(2), move_mount(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

# The numbers are those of all architectures since Linux 5.2.
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 1, 2, 4, 0x100000
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_BIND, MS_PRIVATE = 4096, 1 << 18
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8


class MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


LIBC = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(number: int, what: str, *arguments: Any) -> int:
    return checked(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def enter_mounts_of(pid: int) -> None:
    namespace = Path(f"/proc/{pid}/ns/mnt")
    if namespace.stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino:
        return
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    checked(LIBC.setns(descriptor, CLONE_NEWNS), "entering the daemon's mount namespace")
    os.close(descriptor)


@contextmanager
def user_namespace(first: int, size: int) -> Iterator[int]:
    """A descriptor of a user namespace that maps ids 0 to ``size`` - 1 to ``first`` and up; it lives while this is open."""
    ready_end, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            checked(LIBC.unshare(CLONE_NEWUSER), "making a user namespace")
            os.write(ready, b"\0")
        except OSError as error:
            os.write(ready, bytes([error.errno or errno.EIO]))
        finally:
            signal.alarm(60)
            signal.pause()
            os._exit(1)
    try:
        os.close(ready)
        said = os.read(ready_end, 1)
        if said != b"\0":
            raise OSError(said[0] if said else errno.EIO, "a user namespace can't be made")
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{kind}").write_text(f"0 {first} {size}\n")
        descriptor = os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready_end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def mapped(layer: str, namespace: int) -> Iterator[int]:
    """An idmapped mount of the layer, not attached anywhere yet. If its descriptor is closed before, the mount is gone."""
    path = ctypes.c_char_p(layer.encode())
    flags = ctypes.c_uint(OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    descriptor = system_call(OPEN_TREE, f"opening {layer}", ctypes.c_int(AT_FDCWD), path, flags)
    try:
        wanted = MountAttributes(
            set=MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
            propagation=MS_PRIVATE,
            user_namespace=namespace,
        )
        system_call(
            MOUNT_SETATTR,
            f"mapping the ids of {layer}",
            ctypes.c_int(descriptor),
            ctypes.c_char_p(b""),
            ctypes.c_uint(AT_EMPTY_PATH),
            ctypes.byref(wanted),
            ctypes.c_size_t(ctypes.sizeof(wanted)),
        )
        yield descriptor
    finally:
        os.close(descriptor)


def put(descriptor: int, target: Path) -> None:
    system_call(
        MOVE_MOUNT,
        f"mounting on {target}",
        ctypes.c_int(descriptor),
        ctypes.c_char_p(b""),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(bytes(target)),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )


def map_all(directory: Path, layers: list[str], namespace: int) -> None:
    unmap(directory)
    directory.mkdir(parents=True, mode=0o700)
    place = bytes(directory)
    # The directory is mounted on itself, private: so mounts below it stay in this mount namespace.
    checked(LIBC.mount(place, place, None, ctypes.c_ulong(MS_BIND), None), f"mounting on {directory}")
    checked(LIBC.mount(None, place, None, ctypes.c_ulong(MS_PRIVATE), None), f"keeping {directory} private")
    for number, layer in enumerate(layers):
        target = directory / str(number)
        target.mkdir(mode=0o700)
        with mapped(layer, namespace) as descriptor:
            put(descriptor, target)


def unmap(directory: Path) -> None:
    while True:
        try:
            # It unmounts all that is mounted below it too.
            checked(LIBC.umount2(bytes(directory), MNT_DETACH | UMOUNT_NOFOLLOW), f"unmounting {directory}")
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOENT}:
                raise
            break
    if directory.is_dir():
        for inside in directory.iterdir():
            inside.rmdir()
        directory.rmdir()


def answer(question: dict[str, Any]) -> dict[str, str]:
    try:
        enter_mounts_of(question["pid"])
        directory = Path(question["directory"])
        if question["do"] == "unmap":
            unmap(directory)
            return {}
        with user_namespace(question["first"], question["size"]) as namespace:
            if question["do"] == "map":
                map_all(directory, question["layers"], namespace)
            else:
                with mapped(question["layers"][0], namespace):
                    pass
    except OSError as error:
        return {"failed": f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)}
    return {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))))
