"""One cgroup: an open directory of the cgroup file system, whose files are read and written by name.

The directory is opened so that no path can lead out of the mount, and is checked to be in cgroup v2. Its files are then
opened through its descriptor. So a path is resolved only once, and a write can't reach another place.

Source for all files of this package: the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from airflow_isolation.cgroups import kernel
from airflow_isolation.cgroups.errors import (
    CgroupBusy,
    CgroupDenied,
    CgroupError,
    CgroupGone,
    ControllerMissing,
    NotUnified,
    ValueRefused,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Self

# The kernel's word for "no limit". (A field that is None is left as it is.)
Max = Literal["max"]
MAX: Max = "max"

SUBTREE_CONTROL = "cgroup.subtree_control"
_CHUNK = 65536
# A read gives a file of one record whole. Of a file with many records, such as cgroup.procs, it gives nearly a page.
_SURELY_ALL = 2048

_DENIED_HINT = (
    "Run the worker as root, or in a systemd unit with Delegate=yes; in a container, mount cgroups writable "
    "(--cgroupns=private and a writable /sys/fs/cgroup)"
)


class Cgroup:
    """An open cgroup. ``name`` is its path below the mount, without a slash at either end; "" is the mount itself.

    It stays open when the directory is removed; every method then raises ``CgroupGone``.
    """

    def __init__(self, mount: Path, name: str, descriptor: int) -> None:
        self.mount = mount
        self.name = name
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"Cgroup({str(self.path)!r})"

    @property
    def path(self) -> Path:
        return self.mount / self.name

    def fileno(self) -> int:
        return self._descriptor

    def has(self, file: str) -> bool:
        """Whether the cgroup has this file, which depends on the kernel and the controllers enabled here."""
        return os.access(file, os.F_OK, dir_fd=self._descriptor, follow_symlinks=False)

    def read(self, file: str) -> str:
        """The content of a file.

        :raises ControllerMissing: there is no such file.
        :raises CgroupGone: the cgroup has been removed.
        """
        try:
            return self._read(file)
        except OSError as error:
            raise self.failure(error, f"read {self.path / file}", file=file) from error

    def read_if_there(self, file: str) -> str | None:
        """The content, or None where the kernel or the controllers enabled here don't give the file.

        :raises CgroupGone: the cgroup has been removed.
        """
        try:
            return self._read(file)
        except OSError as error:
            # Usual for statistics, so no error is built only to be dropped.
            if error.errno == errno.ENOENT and self.has("cgroup.procs"):
                return None
            failure = self.failure(error, f"read {self.path / file}", file=file)
            if isinstance(failure, ControllerMissing):
                return None
            raise failure from error

    def write(self, file: str, value: str) -> None:
        """Write a value. May be called twice.

        :raises ValueRefused: the kernel refuses the value.
        :raises ControllerMissing: there is no such file.
        :raises CgroupBusy: processes in the cgroup prevent it.
        :raises CgroupDenied: read-only, or this user may not write.
        :raises CgroupGone: the cgroup has been removed.
        """
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)
            try:
                os.write(descriptor, value.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self.failure(error, f"write {value!r} to {self.path / file}", file=file) from error

    def open_file(self, file: str) -> int:
        """A descriptor for reading and for poll(2); the caller closes it.

        :raises ControllerMissing: there is no such file.
        :raises CgroupGone: the cgroup has been removed.
        """
        try:
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except OSError as error:
            raise self.failure(error, f"open {self.path / file}", file=file) from error

    def children(self) -> tuple[str, ...]:
        """The names of the cgroups directly below.

        :raises CgroupGone: the cgroup has been removed.
        """
        try:
            with os.scandir(self._descriptor) as entries:
                return tuple(sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False)))
        except OSError as error:
            raise self.failure(error, f"list {self.path}") from error

    def child(self, name: str) -> Cgroup:
        """Open the cgroup ``name``, which may be several levels down.

        :raises CgroupGone: there is none.
        """
        return _opened(self.mount, self._descriptor, self.name, name)

    def make_child(self, name: str) -> bool:
        """Make the cgroup ``name`` directly below. True when it is new, False when it was there already.

        :raises CgroupGone: this cgroup has been removed.
        :raises CgroupDenied: read-only, or this user may not write.
        """
        try:
            os.mkdir(_component(name), 0o755, dir_fd=self._descriptor)
        except FileExistsError:
            return False
        except OSError as error:
            raise self.failure(error, f"make {self.path / name}") from error
        return True

    def remove_child(self, name: str) -> None:
        """Remove the cgroup ``name``, which must hold neither processes nor cgroups. Success if it is gone already.

        :raises CgroupBusy: it is not empty.
        """
        try:
            os.rmdir(_component(name), dir_fd=self._descriptor)
        except FileNotFoundError:
            return
        except OSError as error:
            raise self.failure(error, f"remove {self.path / name}") from error

    def walk(self) -> Iterator[Cgroup]:
        """This cgroup, then those in it, each before those below it. Each is open until the next one is asked for."""
        yield self
        waiting = [""]
        while waiting:
            path = waiting.pop()
            with suppress(CgroupGone), self.child(path) as level:
                if path:
                    yield level
                waiting += [f"{path}/{name}".lstrip("/") for name in level.children()]

    def remove_below(self) -> None:
        """Remove the cgroups in it, which have no processes, and those below them. Gone already is success.

        :raises CgroupBusy: one is not empty.
        """
        for name in reversed([each.name for each in self.walk()][1:]):
            above, _, last = name.removeprefix(f"{self.name}/").rpartition("/")
            with suppress(CgroupGone), self.child(above) as level:
                level.remove_child(last)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def failure(self, error: OSError, doing: str, *, file: str = "") -> CgroupError:
        """Translate an error of the kernel into one of this package."""
        message = f"can't {doing}: {error.strerror}"
        code = error.errno
        # An open file says ENODEV when its cgroup has gone. From io.max, ENODEV means that there is no such device.
        if code in (errno.ENOENT, errno.ENODEV) and not self.has("cgroup.procs"):
            return CgroupGone(f"{message} (the cgroup has been removed)")
        if file == SUBTREE_CONTROL and code in (errno.EBUSY, errno.EOPNOTSUPP):
            return CgroupBusy(
                f"{message} (processes are in this cgroup itself, so it can't hand controllers down to those below it)",
                hint="Move them into a cgroup below it; in a systemd unit, set DelegateSubgroup=worker",
            )
        if (code == errno.ENOENT and file) or code == errno.EOPNOTSUPP:
            return ControllerMissing(message, hint=_missing_hint(file))
        if code in (errno.EACCES, errno.EPERM):
            return CgroupDenied(message, hint=_DENIED_HINT)
        if code == errno.EROFS:
            return CgroupDenied(f"{message} (the mount is read-only)", hint=_DENIED_HINT)
        if code in (errno.EBUSY, errno.ENOTEMPTY):
            return CgroupBusy(message)
        if code in (errno.EINVAL, errno.ERANGE, errno.ENODEV, errno.EOVERFLOW, errno.ENOSPC):
            return ValueRefused(message)
        return CgroupError(message)

    def _read(self, file: str) -> str:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._descriptor)
        try:
            content = os.read(descriptor, _CHUNK)
            if len(content) < _SURELY_ALL:
                return content.decode(errors="replace")
            chunks = [content]
            while chunk := os.read(descriptor, _CHUNK):
                chunks.append(chunk)
            return b"".join(chunks).decode(errors="replace")
        finally:
            os.close(descriptor)


def open_cgroup(mount: Path, name: str = "") -> Cgroup:
    """Open the cgroup ``name`` of the cgroup v2 file system that is mounted at ``mount``.

    :raises CgroupGone: there is no such cgroup.
    :raises NotUnified: ``mount`` is not in a cgroup v2 file system.
    """
    try:
        root = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotUnified(
            f"can't open {mount}: {error.strerror}", hint="Set cgroup_mount_path to the mount of cgroup v2"
        ) from error
    try:
        if not kernel.is_cgroup2(root):
            raise NotUnified(
                f"{mount} is not in a cgroup v2 file system", hint="Set cgroup_mount_path to the mount of cgroup v2"
            )
        return _opened(mount, root, "", name)
    finally:
        os.close(root)


def open_directory(mount: Path, name: str) -> Cgroup:
    """Open the cgroup ``name`` below ``mount``, a mount of cgroups v1 or v2.

    The name must come from the kernel: it is not checked.

    :raises CgroupGone: there is no such cgroup.
    """
    path = f"{mount}/{name}"
    try:
        return Cgroup(mount, name, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise CgroupGone(f"there is no cgroup {path}") from error
    except OSError as error:
        raise CgroupError(f"can't open the cgroup {path}: {error.strerror}") from error


def flat_keyed(content: str) -> dict[str, int]:
    r"""Parse ``KEY VALUE`` lines, as in cpu.stat and memory.events; values that are no numbers are left out.

    >>> flat_keyed("low 0\noom_kill 2\n")
    {'low': 0, 'oom_kill': 2}
    """
    pairs = (line.split(" ", 1) for line in content.splitlines() if " " in line)
    return {key: int(value) for key, value in pairs if value.strip().isdigit()}


def nested_keyed(content: str) -> dict[str, dict[str, str]]:
    r"""Parse ``NAME KEY=VALUE…`` lines, as in io.stat and the pressure files.

    >>> nested_keyed("8:0 rbytes=1 wbytes=2\n")
    {'8:0': {'rbytes': '1', 'wbytes': '2'}}
    """
    lines = (line.split() for line in content.splitlines() if line.strip())
    return {words[0]: dict(word.split("=", 1) for word in words[1:] if "=" in word) for words in lines}


def limit_or_none(content: str | None) -> int | None:
    r"""Parse a single limit; None for ``max``, and when there is no such file.

    >>> limit_or_none("4096\n"), limit_or_none("max\n"), limit_or_none(None)
    (4096, None, None)
    """
    text = (content or "").strip()
    return int(text) if text.isdigit() else None


def limit_or_max(content: str | None) -> int | Max | None:
    r"""Parse a single limit and keep ``max``; None when there is no such file.

    >>> limit_or_max("4096\n"), limit_or_max("max\n"), limit_or_max(None)
    (4096, 'max', None)
    """
    if content is None:
        return None
    limit = limit_or_none(content)
    return MAX if limit is None else limit


def _opened(mount: Path, root: int, parent: str, name: str) -> Cgroup:
    name = name.strip("/")
    whole = "/".join(part for part in (parent, name) if part)
    for component in name.split("/") if name else ():
        _component(component)
    try:
        return Cgroup(mount, whole, kernel.open_directory_beneath(root, name))
    except FileNotFoundError as error:
        raise CgroupGone(f"there is no cgroup {mount / whole}") from error
    except OSError as error:
        raise CgroupError(f"can't open the cgroup {mount / whole}: {error.strerror}") from error


def _component(name: str) -> str:
    if name in {"", ".", ".."} or "/" in name or "\0" in name or "\n" in name:
        raise ValueRefused(
            f"{name!r} is not the name of a cgroup", hint="Use letters, digits, dots, dashes, underscores"
        )
    return name


def _missing_hint(file: str) -> str:
    if file == SUBTREE_CONTROL:
        return "The controller is not handed down to this cgroup: in a systemd unit, set Delegate=yes"
    controller = file.partition(".")[0]
    return f"This kernel does not have it, or the controller {controller} is not enabled in this subtree"
