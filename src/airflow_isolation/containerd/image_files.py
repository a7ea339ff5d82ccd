"""Reads files of an image, such as /etc/passwd, without running anything of it: ``read_files``, ``closed_to_others``.

A short-lived process mounts the image in a mount namespace of its own. When that process ends, even by kill -9, the kernel
unmounts the image. The image is the process's root directory, so no symbolic link leads out of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import tempfile
import threading
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_isolation.containerd.api import snapshots_pb2
from airflow_isolation.containerd.errors import ContainerdError, InvalidImage, PermissionDenied
from airflow_isolation.containerd.own_process import ask
from airflow_isolation.containerd.unpack import DEFAULT_SNAPSHOTTER, remove_snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from airflow_isolation.containerd.client import Client
    from airflow_isolation.containerd.layout import Layout

    Files = Mapping[str, bytes | None]

USERS = "/etc/passwd"
GROUPS = "/etc/group"
FILE_LIMIT = 1 << 20
"""Bytes of one file."""
_FILES_LIMIT = 1_000_000
_LOOK_SECONDS = 120.0

_READER = Path(__file__).with_name("read_mounted.py")
_CACHE_SIZE = 256

# By chain id and paths, and whether these are directories to list. A chain id's content never changes, so entries stay
# valid.
_cache: dict[tuple[str, tuple[str, ...], bool], Files] = {}
_cache_lock = threading.Lock()


def read_files(
    client: Client,
    layout: Layout,
    paths: Iterable[str] = (USERS, GROUPS),
    *,
    directories: bool = False,
    snapshotter: str = DEFAULT_SNAPSHOTTER,
    cache_directory: Path | None = None,
    timeout: float = 30.0,
) -> Files:
    """The files' bytes by path; None for a path that the image doesn't have. The image must be unpacked.

    With ``directories``: the names in each directory, one a line; for a path that is no directory, the path itself.

    Answers are cached in memory, and in ``cache_directory`` if given; no other user may write to that.

    :raises PermissionDenied: not called by root, who alone may mount, and the answer is in no cache.
    :raises InvalidImage: a path is no regular file, or larger than ``FILE_LIMIT``.
    :raises NotFound: the image isn't unpacked.
    """
    wanted = tuple(sorted(paths))
    if not layout.diff_ids:
        return dict.fromkeys(wanted)
    key = (layout.top_chain_id, wanted, directories)
    with _cache_lock:
        if key in _cache:
            return _cache[key]
    kept = cache_directory / _cache_name(*key) if cache_directory is not None else None
    files = _from_disk(kept, wanted) if kept is not None else None
    if files is None:
        files = _from_image(client, layout, wanted, snapshotter, timeout, directories=directories)
        if kept is not None:
            _to_disk(kept, files)
    with _cache_lock:
        if len(_cache) >= _CACHE_SIZE:
            _cache.clear()
        _cache[key] = files
    return files


def closed_to_others(
    client: Client, layout: Layout, *, uid: int, gids: Iterable[int], snapshotter: str, timeout: float = _LOOK_SECONDS
) -> str:
    """The first path in the image, with its mode, that this account may read or run and others may not; empty: there is
    none.

    Every file is looked at, which takes a second for some ten thousand. The caller should keep the answer.

    :raises InvalidImage: the image has more than a million files.
    :raises ContainerdError: it can't be mounted, or takes longer than ``timeout`` seconds.
    """
    with snapshot(client, layout, snapshotter, timeout) as mounts:
        account = {"uid": uid, "gids": [*gids]}
        answer = _ask_reader({"mounts": mounts, "account": account, "limit": _FILES_LIMIT}, timeout)
    return str(answer["closed"])


def _from_image(
    client: Client, layout: Layout, wanted: tuple[str, ...], snapshotter: str, timeout: float, *, directories: bool
) -> Files:
    if os.geteuid() != 0:
        raise PermissionDenied(
            f"reading {' and '.join(wanted)} of an image needs root, because it has to be mounted",
            hint="Run as root, or give user and group as numbers",
        )
    with snapshot(client, layout, snapshotter, timeout) as mounts:
        question = {"mounts": mounts, "paths": wanted, "limit": FILE_LIMIT, "directories": directories}
        answer = _ask_reader(question, timeout)
    return {path: None if text is None else base64.b64decode(text) for path, text in answer["files"].items()}


@contextmanager
def snapshot(
    client: Client, layout: Layout, snapshotter: str, timeout: float, *, writable: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """A temporary snapshot of an unpacked image; yields how to mount it (type, source, options)."""
    key = f"read-{secrets.token_hex(8)}"
    with client.lease(expires=timedelta(seconds=timeout) + timedelta(minutes=5)) as leased:
        parent = layout.top_chain_id
        if writable:
            prepare = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent)
            mounts = leased.snapshots.Prepare(prepare).mounts
        else:
            view = snapshots_pb2.ViewSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent)
            mounts = leased.snapshots.View(view).mounts
        try:
            yield [{"type": mount.type, "source": mount.source, "options": list(mount.options)} for mount in mounts]
        finally:
            remove_snapshot(leased, key, snapshotter)


def _ask_reader(question: Mapping[str, object], timeout: float) -> dict[str, Any]:
    answer = ask(_READER, question, seconds=timeout)
    if "refused" in answer:
        raise InvalidImage(answer["refused"])
    if "failed" in answer:
        raise ContainerdError(f"the image's files can't be read: {answer['failed']}")
    return answer


def _cache_name(chain_id: str, wanted: tuple[str, ...], directories: bool) -> str:
    if directories:
        return f"{chain_id.replace(':', '-')}-in-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}.json"
    return "-".join((chain_id.replace(":", "-"), *(path.strip("/").replace("/", "_") for path in wanted))) + ".json"


def _from_disk(kept: Path, wanted: tuple[str, ...]) -> Files | None:
    """The cached answer. None when it is missing or incomplete: then the image is read."""
    try:
        answer = json.loads(kept.read_bytes())
        files = {path: None if text is None else base64.b64decode(text) for path, text in answer.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return files if set(files) == set(wanted) else None


def _to_disk(kept: Path, files: Files) -> None:
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    answer = {path: None if text is None else base64.b64encode(text).decode() for path, text in files.items()}
    # Written under another name, then renamed: a reader sees a whole file or none.
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
        try:
            json.dump(answer, file)
            file.flush()
            Path(file.name).replace(kept)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
