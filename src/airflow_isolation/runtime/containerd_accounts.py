"""/etc/passwd and /etc/group of an image, read from the snapshots of its layers without mounting or running anything.

Only who may enter the snapshotter's directory can read them: root.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from airflow_isolation.containerd.api import snapshots_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from airflow_isolation.containerd.api import types_pb2
    from airflow_isolation.containerd.client import Client

_LARGEST = 1024 * 1024
_LEASE = timedelta(minutes=10)
# How overlayfs marks, in an upper layer, a directory that hides the lower ones' content.
_OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def read_account_files(client: Client, chain_id: str, snapshotter: str) -> tuple[str | None, str | None]:
    """The texts of /etc/passwd and /etc/group; each None when there is none, or this user may not read it.

    :raises ContainerdError: NotFound when the image is not unpacked.
    """
    with _view(client, chain_id, snapshotter) as mounts:
        layers = _layers(mounts)
        return _read(layers, "passwd"), _read(layers, "group")


@contextmanager
def _view(client: Client, chain_id: str, snapshotter: str) -> Iterator[Sequence[types_pb2.Mount]]:
    key = f"accounts-{secrets.token_hex(8)}"
    with client.lease(expires=_LEASE) as leased:
        view = snapshots_pb2.ViewSnapshotRequest(snapshotter=snapshotter, key=key, parent=chain_id)
        mounts = leased.snapshots.View(view).mounts
        try:
            yield mounts
        finally:
            client.snapshots.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key))


def _layers(mounts: Iterable[types_pb2.Mount]) -> Sequence[str]:
    """The directories that the mounts would lay over each other, the uppermost first; none for a block device."""
    for mount in mounts:
        if mount.type in ("bind", "rbind"):
            return [mount.source]
        if mount.type == "overlay":
            options = dict(option.partition("=")[::2] for option in mount.options)
            return options.get("lowerdir", "").split(":")
    return []


def _read(layers: Iterable[str], name: str) -> str | None:
    """``/etc/<name>``, as the layers together show it. Links are not followed: they could lead out of the image."""
    for layer in layers:
        with ExitStack() as opened:
            try:
                root = _open(opened, layer, os.O_PATH | os.O_DIRECTORY)
                etc = _open(opened, "etc", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, root)
            except FileNotFoundError:
                continue
            except OSError:
                return None
            try:
                kind = os.stat(name, dir_fd=etc, follow_symlinks=False)
                if not stat.S_ISREG(kind.st_mode) or kind.st_size > _LARGEST:
                    return None  # A whiteout (a character device), a link, or no account file.
                file = _open(opened, name, os.O_RDONLY | os.O_NOFOLLOW, etc)
                return os.read(file, _LARGEST).decode(errors="surrogateescape")
            except FileNotFoundError:
                if any(_attribute(etc, attribute) == b"y" for attribute in _OPAQUE):
                    return None
            except OSError:
                return None
    return None


def _open(opened: ExitStack, path: str, flags: int, directory: int | None = None) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, dir_fd=directory)
    opened.callback(os.close, descriptor)
    return descriptor


def _attribute(descriptor: int, name: str) -> bytes:
    try:
        return os.getxattr(descriptor, name)
    except OSError:
        return b""
