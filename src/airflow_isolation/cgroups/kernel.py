"""Two system calls that Python's library lacks: openat2(2) and fstatfs(2)."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache

# linux/openat2.h and linux/magic.h; the call's number is the same on every architecture.
_SYS_OPENAT2 = 437
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x01, 0x02, 0x04, 0x08
_INSIDE = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
_CGROUP2_SUPER_MAGIC = 0x63677270

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_directory_beneath(root: int, path: str) -> int:
    """Open the directory ``path`` below the directory that the descriptor ``root`` stands for.

    ``path`` is relative. No symbolic link and no mount in it is followed, and ``..`` is refused. Linux has openat2(2)
    since 5.6. If the kernel lacks it, or an older seccomp filter forbids it, each component is opened by itself.

    :raises OSError: ENOENT, ENOTDIR, ELOOP (a symbolic link), EXDEV (a mount, or a way out), and the like.
    """
    if not path:
        return os.open(".", _DIRECTORY, dir_fd=root)
    # One component needs only one step, and a plain open is ten times cheaper than a call through ctypes.
    if "/" in path and _has_openat2():
        return _openat2(root, path)
    return open_step_by_step(root, path)


def open_step_by_step(root: int, path: str) -> int:
    """As ``open_directory_beneath``, for kernels without openat2."""
    device = os.fstat(root).st_dev
    current = os.dup(root)
    try:
        for component in path.split("/"):
            if component in {"", ".", ".."}:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
            following = os.open(component, _DIRECTORY, dir_fd=current)
            os.close(current)
            current = following
            if os.fstat(current).st_dev != device:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    except BaseException:
        os.close(current)
        raise
    return current


def is_cgroup2(descriptor: int) -> bool:
    """Whether ``descriptor`` is open on something in a cgroup v2 file system."""
    # struct statfs begins with the type of the file system, a long; 256 bytes are enough for it on every architecture.
    answer = (ctypes.c_long * 32)()
    if _libc().fstatfs(descriptor, answer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return bool(answer[0] == _CGROUP2_SUPER_MAGIC)


def _openat2(root: int, path: str) -> int:
    how = _OpenHow(flags=_DIRECTORY, mode=0, resolve=_INSIDE)
    descriptor = _libc().syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(root),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(descriptor)


@cache
def _has_openat2() -> bool:
    root = os.open("/", _DIRECTORY)
    try:
        os.close(_openat2(root, "."))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
