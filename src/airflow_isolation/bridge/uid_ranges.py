"""Gives each image uids of the host for its user namespace. The ranges never overlap; a lock makes sure of that.

An image keeps its uids as long as the state directory exists: its containers may be running, and files may belong to these
uids. ``<state_dir>/uid-ranges.json`` records them.
"""

from __future__ import annotations

import json
import os
import pwd
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.bridge.started_agent import prepare
from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.settings.effective import UIDS_OF_AN_IMAGE, UidRange

if TYPE_CHECKING:
    from collections.abc import Iterable

_LOCK_SECONDS = 10.0
_ETC = Path("/etc")
_FILES = ("subuid", "subgid", "passwd", "group")

#: The uids that systemd sets aside for containers (its "Users, Groups, UIDs and GIDs on systemd Systems").
_OF_CONTAINERS = range(0x80000, 0x70000000)


def configured_range(wanted: UidRange | None, *, etc: Path = _ETC) -> UidRange | None:
    """The range that is set, else the entry of this process's user in /etc/subuid (subuid(5)), else, for root, a free range.

    Free are the uids that systemd sets aside for containers and that are past all ids in the files of ``etc``. None when
    there is no range.
    """
    if wanted is not None:
        return wanted if wanted.count else None
    return _found(os.geteuid(), etc, tuple(_changed(etc / name) for name in _FILES))


@lru_cache(maxsize=8)
def _found(uid: int, etc: Path, _changed: tuple[object, ...]) -> UidRange | None:
    given = _subordinate(etc / "subuid")
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    for name, first, count in given:
        if name in names and count >= UIDS_OF_AN_IMAGE:
            return UidRange(first, count)
    return _free_range(etc, given) if uid == 0 and _has_all_ids() else None


def _changed(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def why_no_range(wanted: UidRange | None) -> str:
    """Why ``configured_range`` gives none, a sentence without its full stop."""
    if wanted is not None:
        return "uid_range is none"
    return "no uid_range is set, and /etc/subuid and the like leave none of the uids that are set aside for containers"


def _free_range(etc: Path, given: Iterable[tuple[str, int, int]]) -> UidRange | None:
    taken = [(first, first + count) for _, first, count in (*given, *_subordinate(etc / "subgid"))]
    taken += [(id, id + 1) for file in ("passwd", "group") for id in _ids(etc / file)]
    begin = max([_OF_CONTAINERS.start, *(end for first, end in taken if first < _OF_CONTAINERS.stop)])
    # Rounded up, so that images keep their uids when an account is added within the same block of uids.
    begin = -(-begin // UIDS_OF_AN_IMAGE) * UIDS_OF_AN_IMAGE
    count = _OF_CONTAINERS.stop - begin
    return UidRange(begin, count) if count >= UIDS_OF_AN_IMAGE else None


def _has_all_ids() -> bool:
    """Whether this process has all ids, as the host's root.

    Root of a user namespace has only some, and none to give away.
    """
    return any(line.split() == ["0", "0", "4294967295"] for line in _lines(Path("/proc/self/uid_map")))


def _subordinate(path: Path) -> list[tuple[str, int, int]]:
    """The entries of a file like /etc/subuid: name, first id, count."""
    lines = [line.split(":") for line in _lines(path)]
    return [
        (line[0], int(line[1]), int(line[2]))
        for line in lines
        if len(line) == len(("name", "first", "count")) and line[1].isdecimal() and line[2].isdecimal()
    ]


def _ids(path: Path) -> list[int]:
    """The third field of a file like passwd(5) or group(5)."""
    fields = [line.split(":")[2:3] for line in _lines(path)]
    return [int(field[0]) for field in fields if field and field[0].isdecimal()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def first_uid(image_digest: str, of: UidRange, *, state_dir: Path) -> int:
    """The first of the uids of an image. The same image always gets the same; may be called twice.

    :raises ContainerFailed: no uids are left, or the file can't be read or written.
    """
    path = state_dir / "uid-ranges.json"
    prepare(state_dir)
    try:
        # The file is always replaced as a whole, so it can be read without the lock.
        if (found := _given_from(of, _read(path), image_digest)) is not None:
            return found
        with locked(state_dir / "uid-ranges.lock", end=time.monotonic() + _LOCK_SECONDS):
            given = _read(path)
            if (found := _given_from(of, given, image_digest)) is not None:
                return found
            taken = {first for digest, first in given.items() if digest != image_digest}
            for first in range(of.first, of.first + of.count - UIDS_OF_AN_IMAGE + 1, UIDS_OF_AN_IMAGE):
                # Uids of a range that was set earlier may begin elsewhere.
                if not any(first - UIDS_OF_AN_IMAGE < other < first + UIDS_OF_AN_IMAGE for other in taken):
                    _write(path, {**given, image_digest: first})
                    return first
    except (OSError, TimeoutError, ValueError) as error:
        raise ContainerFailed(f"The uids of images in {path} can't be read or written: {error}") from error
    raise ContainerFailed(
        f"All uids of the range {of} are given to {len(taken)} images",
        hint=f"Set uid_range to a larger range; each image needs {UIDS_OF_AN_IMAGE}",
    )


def _given_from(of: UidRange, given: dict[str, int], image_digest: str) -> int | None:
    found = given.get(image_digest)
    return found if found is not None and of.first <= found <= of.first + of.count - UIDS_OF_AN_IMAGE else None


def _read(path: Path) -> dict[str, int]:
    try:
        given = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    if not isinstance(given, dict) or not all(isinstance(first, int) for first in given.values()):
        raise ValueError("it is not what this program writes there")
    return given


def _write(path: Path, given: dict[str, int]) -> None:
    written = path.with_suffix(".new")
    written.write_text(json.dumps(given))
    written.replace(path)
