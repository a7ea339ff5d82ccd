"""Makes the directories and files in a snapshot on which something will be mounted.

Runtimes make what is missing in the image, but in a user namespace they may not: the image belongs to the host's root.
So it is made here, in the snapshot's own layer, before that is mounted. ``followed`` finds out beforehand where the
image's symbolic links lead; it resolves them itself, and never has the kernel follow one. A link that is still in the way
when something is made is an error. Standard library only.

Sources: the kernel's Documentation/filesystems/overlayfs.rst (upper and lower, whiteouts, opaque directories); symlink(7).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_OPAQUE = "trusted.overlay.opaque"

#: How many symbolic links are followed for one path: as many as the kernel does.
_MOST_LINKS = 40

#: The ids without a user namespace.
HOST_IDS = range(2**32)


class MountPointError(Exception):
    """A mount point can't be made; the text says which and why."""


def followed(layers: Sequence[str], target: str, *, elsewhere: Collection[str] = ()) -> str:
    """The place in the container to which the image's links lead ``target``: there the runtime mounts it.

    The image is the root directory, as for a process in the container. ``elsewhere``: places where something else is
    mounted by then; the image's links below them don't count.

    :raises MountPointError: the links go in a circle, or the kernel refuses.
    """
    try:
        return _followed(list(layers), target, elsewhere)
    except OSError as error:
        raise MountPointError(f"{target} can't be looked for in the image: {error}") from error


def _followed(layers: list[str], target: str, elsewhere: Collection[str]) -> str:
    todo = _parts(target)
    way: list[tuple[str, list[str]]] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            del way[-1:]  # ".." of the root is the root itself
            continue
        path = "/".join(["", *(name for name, _ in way), part])
        found, first = ([], None) if path in elsewhere else _descend(way[-1][1] if way else layers, part)
        if first is None or not stat.S_ISLNK(first.status.st_mode):
            way.append((part, found))
            continue
        links += 1
        if links > _MOST_LINKS:
            raise MountPointError(f"the symbolic links of the image at {target} lead nowhere")
        leads_to = str(Path(first.path).readlink())
        if leads_to.startswith("/"):
            way.clear()
        todo += _parts(leads_to)
    return "/" + "/".join(name for name, _ in way)


def _parts(path: str) -> list[str]:
    """The path's components in reverse order."""
    return [part for part in reversed(path.split("/")) if part not in {"", "."}]


def make_mount_points(
    layers: Sequence[str], targets: Iterable[tuple[str, bool]], *, merged: bool, ids: range = HOST_IDS
) -> None:
    """Make the targets that are missing. A target is a path in the container, and whether it is a directory.

    ``layers`` are directories of the host, the snapshot's own first. ``merged``: an overlay merges them. Then a directory
    that is made in the first layer, but is in a lower one too, gets the lower one's owner and mode. ``ids`` are the host's
    ids of the container's users, by number: what is new belongs to the container's root.

    :raises MountPointError: a symbolic link or a file is in the way, or the kernel refuses.
    """
    for target, is_directory in targets:
        try:
            _make(layers, PurePosixPath(target), is_directory=is_directory, merged=merged, ids=ids)
        except OSError as error:
            raise MountPointError(f"{target} can't be made in the image: {error}") from error


def layers_of(kind: str, source: str, options: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The layers of a snapshot with such a mount, its own first, and whether an overlay merges them.

    :raises MountPointError: this function does not know this kind of mount.
    """
    if kind == "overlay":
        values = dict(option.split("=", 1) for option in options if "=" in option)
        if "upperdir" in values and "lowerdir" in values:
            return (values["upperdir"], *values["lowerdir"].split(":")), True
    elif kind in {"bind", "rbind"}:
        return (source,), False
    raise MountPointError(f"a snapshot that is mounted as {kind} is not understood")


def with_layers(options: Sequence[str], layers: Sequence[str], *, writable: bool) -> tuple[str, ...]:
    """An overlay's options, with other layers below its own. If not ``writable``, its own becomes a lower layer too."""
    values = dict(option.split("=", 1) for option in options if "=" in option)
    # An overlay of lower layers only is always read-only; no remount can change that.
    own = () if writable else (values["upperdir"],)
    dropped = ("lowerdir=",) if writable else ("lowerdir=", "upperdir=", "workdir=", "volatile")
    return (*(option for option in options if not option.startswith(dropped)), f"lowerdir={':'.join([*own, *layers])}")


def _make(layers: Sequence[str], target: PurePosixPath, *, is_directory: bool, merged: bool, ids: range) -> None:
    here = list(layers)
    parts = [part for part in target.parts if part != "/"]
    missing_from = len(parts)
    statuses = []
    for depth, part in enumerate(parts):
        here, first = _descend(here, part)
        if first is None:
            missing_from = depth
            break
        path, status = first
        if stat.S_ISLNK(status.st_mode):
            raise MountPointError(f"{path} is a symbolic link")
        if stat.S_ISDIR(status.st_mode) != (is_directory or depth < len(parts) - 1):
            raise MountPointError(f"/{'/'.join(parts[: depth + 1])} of the image is not what is to be mounted there")
        statuses.append(status)
    if missing_from == len(parts):
        return
    place = Path(layers[0])
    for depth, part in enumerate(parts):
        place /= part
        if depth == len(parts) - 1 and not is_directory:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(place, flags, 0o644))
            _give_to_root(place, ids)
            return
        if depth < missing_from:
            if merged and not os.path.lexists(place):
                place.mkdir()
                dress(place, statuses[depth], ids)
        else:
            place.mkdir()
            _give_to_root(place, ids)
            place.chmod(0o755)


def dress(directory: Path, like: os.stat_result, ids: range) -> None:
    """Give a directory the owners and the mode of another one, whose owners are ids of the container."""
    # An id that the container does not have stays the host's, which the container sees as nobody.
    owner, group = (ids[id] if id < len(ids) else id for id in (like.st_uid, like.st_gid))
    os.chown(directory, owner, group)
    directory.chmod(stat.S_IMODE(like.st_mode))


def _give_to_root(place: Path, ids: range) -> None:
    if ids != HOST_IDS:  # otherwise it belongs to the right root already
        os.chown(place, ids[0], ids[0])


class _Entry(NamedTuple):
    path: str
    status: os.stat_result


def _descend(layers: list[str], part: str) -> tuple[list[str], _Entry | None]:
    """The directories called ``part`` that an overlay of ``layers`` merges, and the uppermost entry; None: there is none."""
    found: list[str] = []
    first: _Entry | None = None
    for layer in layers:
        path = f"{layer}/{part}"
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            break  # a whiteout: the entries in the layers below have been deleted
        if first is None:
            first = _Entry(path, status)
        if not stat.S_ISDIR(status.st_mode):
            break
        found.append(path)
        if _is_opaque(path):
            break
    return found, first


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, _OPAQUE, follow_symlinks=False) == b"y"
    except OSError:
        return False
