"""A program of its own, run by image_files: mounts an image where only this process sees it, and reads files of it.

Standard library only, and imported by no module: it runs with ``python -I -S``. It reads one JSON object on stdin: mounts
(as containerd gives them), limit, and either paths and directories (true: the paths are listed, not read), or account (uid
and gids). It writes one on stdout: files (base64 or null by path), or closed (in words, what that account may read or run
and others may not), or refused or failed (a sentence).
"""

from __future__ import annotations

import base64
import ctypes
import errno
import json
import os
import stat
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
# Any directory that every host has. The mount hides what is below it, but from this process only.
MOUNT_POINT = "/tmp"  # noqa: S108
SAFE = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC


class Refused(Exception):
    """The image is the cause of the failure."""


libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, kind: str, flags: int, data: str) -> None:
    target = MOUNT_POINT.encode()
    call("mount", source.encode(), target, kind.encode(), ctypes.c_ulong(flags), data.encode())


def mount_image(mounts: list[dict[str, Any]]) -> None:
    if len(mounts) != 1:
        raise OSError(errno.ENOTSUP, f"a snapshot of {len(mounts)} mounts is not understood")
    kind, source, options = mounts[0]["type"], mounts[0]["source"], mounts[0]["options"]
    if kind in {"bind", "rbind"} or "bind" in options or "rbind" in options:
        mount(source, "none", MS_BIND, "")
        # The kernel ignores other flags on the first call (mount(2), "Creating a bind mount").
        mount("none", "none", MS_REMOUNT | MS_BIND | SAFE, "")
    elif kind == "overlay":
        data = ",".join(shortened(option) for option in options if option not in {"ro", "rw"})
        mount(source, kind, SAFE, data)
    else:
        raise OSError(errno.ENOTSUP, f"a snapshot that is mounted as {kind} is not understood")


def shortened(option: str) -> str:
    """mount(2) takes one page of options: many layers fit only by relative paths."""
    key, _, value = option.partition("=")
    if key != "lowerdir":
        return option
    layers = value.split(":")
    common = os.path.commonpath(layers)
    os.chdir(common)
    return f"lowerdir={':'.join(os.path.relpath(layer, common) for layer in layers)}"


def read(path: str, limit: int) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return None
        raise Refused(f"{path} of the image can't be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refused(f"{path} of the image is not a regular file")
        text = file.read(limit + 1)
    if len(text) > limit:
        raise Refused(f"{path} of the image is larger than {limit} bytes")
    return text


def closed_to_others(uid: int, gids: list[int], limit: int) -> str:
    """The first file or directory, with its mode, that this account may read or run and others may not; empty: none."""
    waiting = [("/", os.lstat("/"))]
    seen = 0
    while waiting:
        path, status = waiting.pop()
        own = allowed(status, uid, gids)
        if own & ~status.st_mode & 5:
            return f"{path} (mode {stat.S_IMODE(status.st_mode):04o})"
        if not stat.S_ISDIR(status.st_mode) or not own & 1:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                seen += 1
                if seen > limit:
                    raise Refused(f"the image has more than {limit} files")
                if not entry.is_symlink():
                    waiting.append((entry.path, entry.stat(follow_symlinks=False)))
    return ""


def allowed(status: os.stat_result, uid: int, gids: list[int]) -> int:
    """The three bits of the mode that hold for an account."""
    if uid == status.st_uid:
        return status.st_mode >> 6 & 7
    return (status.st_mode >> 3 if status.st_gid in gids else status.st_mode) & 7


def names(path: str, limit: int) -> bytes | None:
    """The names in a directory, one a line. For anything else, its own path."""
    try:
        found = os.listdir(os.fsencode(path))  # noqa: PTH208 - of bytes, as the names may be anything
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return os.fsencode(path)
    except OSError as error:
        raise Refused(f"{path} of the image can't be opened: {error.strerror}") from error
    return b"\n".join(found)[:limit]


def answer(question: dict[str, Any]) -> dict[str, Any]:
    try:
        call("unshare", CLONE_NEWNS)
        # Otherwise the mount would appear in the host's mount namespace too.
        call("mount", b"none", b"/", b"none", ctypes.c_ulong(MS_REC | MS_PRIVATE), b"")
        mount_image(question["mounts"])
        os.chroot(MOUNT_POINT)
        os.chdir("/")
    except OSError as error:
        return {"failed": error.strerror}
    try:
        if account := question.get("account"):
            return {"closed": closed_to_others(account["uid"], account["gids"], question["limit"])}
        look = names if question["directories"] else read
        files = {path: look(path, question["limit"]) for path in question["paths"]}
    except Refused as refused:
        return {"refused": str(refused)}
    except OSError as error:
        return {"failed": f"{error.filename}: {error.strerror}"}
    return {"files": {path: None if text is None else base64.b64encode(text).decode() for path, text in files.items()}}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin))))
