"""A program of its own, run by ``trees``: shows directories of a worker's mount namespace where the daemon sees them.

Standard library only, and not imported by anybody: it runs with ``python -I -S``, alone in its process, because it goes
into the mount namespace of a worker, which may have put anything there. No path is looked up while it is in it. On stdin
one JSON object; on stdout one: empty, or failed (a sentence).

    attach  namespace and directory are descriptors that the worker gave; a copy of the mount at the directory, with what
            is mounted below, read-only, appears at ``target``, which is made, in the mount namespace of ``pid``
    detach  takes away what is mounted at each of ``targets``, and the directories

Sources: open_tree(2), mount_setattr(2), move_mount(2), setns(2). Linux 5.12 or newer.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# The numbers are those of all architectures since Linux 5.2.
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
CLONE_NEWNS = 0x00020000
MS_PRIVATE = 1 << 18
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

#: What no container gets from its host: processes, settings and devices of the kernel.
KERNELS = frozenset(
    {"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "securityfs", "debugfs", "tracefs", "bpf", "efivarfs"}
    | {"configfs", "binfmt_misc", "mqueue", "nsfs", "pstore"}
)

LIBC = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("user_namespace", ctypes.c_uint64),
    )


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        if number == errno.ENOSYS:
            raise OSError(number, f"{what}: this kernel can't; Linux 5.12 or newer is needed")
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def system_call(number: int, what: str, *arguments: Any) -> int:
    return checked(LIBC.syscall(ctypes.c_long(number), *arguments), what)


def enter(namespace: int, what: str) -> None:
    checked(LIBC.setns(ctypes.c_int(namespace), ctypes.c_int(CLONE_NEWNS)), what)


def copied(directory: int) -> int:
    """A copy of the mount, nowhere yet: read-only, and deaf to what is mounted or unmounted at the original.

    Deaf, because else taking the copy away would take away what is mounted below the original, too.
    """
    flags = ctypes.c_uint(OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE)
    empty = ctypes.c_char_p(b"")
    tree = system_call(OPEN_TREE, "copying the mount of the worker's directory", ctypes.c_int(directory), empty, flags)
    wanted = MountAttributes(set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, propagation=MS_PRIVATE)
    system_call(
        MOUNT_SETATTR,
        "making the copy read-only",
        ctypes.c_int(tree),
        empty,
        ctypes.c_uint(AT_EMPTY_PATH | AT_RECURSIVE),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    return tree


def attach(*, namespace: int, directory: int, pid: int, target: str) -> None:
    place = os.open(f"/proc/{pid}/ns/mnt" if pid else "/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    enter(namespace, "entering the worker's mount namespace")
    tree = copied(directory)
    enter(place, "entering the daemon's mount namespace")
    Path(target).mkdir(mode=0o700, parents=True, exist_ok=True)
    system_call(
        MOVE_MOUNT,
        f"mounting on {target}",
        ctypes.c_int(tree),
        ctypes.c_char_p(b""),
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(os.fsencode(target)),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )
    if found := kernels_below(target):
        take_away(target)
        raise OSError(errno.EPERM, f"it is, or holds, a file system of the kernel's own ({found})")


def kernels_below(target: str) -> str:
    """The kind of the first mount at or below ``target`` that shows the kernel and no files; empty for none."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), before.split()[4])
        kind = after.split()[0]
        if kind in KERNELS and (point == target or point.startswith(f"{target}/")):
            return kind
    return ""


def take_away(target: str) -> None:
    while LIBC.umount2(ctypes.c_char_p(os.fsencode(target)), ctypes.c_int(MNT_DETACH | UMOUNT_NOFOLLOW)) == 0:
        pass
    if (number := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOENT):
        raise OSError(number, f"unmounting {target}: {os.strerror(number)}")
    with suppress(FileNotFoundError):
        Path(target).rmdir()


def detach(*, pid: int, targets: list[str]) -> None:
    place = os.open(f"/proc/{pid}/ns/mnt" if pid else "/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    enter(place, "entering the daemon's mount namespace")
    for target in targets:
        take_away(target)


def answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        if asked.pop("do") == "attach":
            attach(**asked)
        else:
            detach(**asked)
    except OSError as error:
        return {"failed": error.strerror or str(error)}
    return {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))))
