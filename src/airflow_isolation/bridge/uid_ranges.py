"""Uids of the host for user namespaces: each image gets its own, under a lock, and none overlap.

What was given stays given as long as the state directory lives: containers of that image may run, and files belong to
those uids. ``<state_dir>/uid-ranges.json`` has it.
"""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path

from airflow_isolation.bridge.started_agent import prepare
from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.errors import ContainerFailed
from airflow_isolation.settings.effective import UIDS_OF_AN_IMAGE, UidRange

_SUBUID = Path("/etc/subuid")
_LOCK_SECONDS = 10.0


def configured_range(wanted: UidRange | None, *, subuid: Path = _SUBUID) -> UidRange | None:
    """The range that is set, else the entry of this process's user in /etc/subuid (subuid(5)); None for none."""
    if wanted is not None:
        return wanted if wanted.count else None
    try:
        lines = subuid.read_text().splitlines()
    except OSError:
        return None
    uid = os.geteuid()
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    for line in lines:
        name, _, numbers = line.partition(":")
        first, _, count = numbers.partition(":")
        if name in names and first.isdecimal() and count.isdecimal() and int(count) >= UIDS_OF_AN_IMAGE:
            return UidRange(int(first), int(count))
    return None


def first_uid(image_digest: str, of: UidRange, *, state_dir: Path) -> int:
    """The first of the uids that belong to an image. The same image always gets the same.

    :raises ContainerFailed: all are given away, or the file can't be read or written.
    """
    path = state_dir / "uid-ranges.json"
    prepare(state_dir)
    try:
        # The file is replaced as a whole: what is in it can be read by all at once.
        if (found := _given_from(of, _read(path), image_digest)) is not None:
            return found
        with locked(state_dir / "uid-ranges.lock", end=time.monotonic() + _LOCK_SECONDS):
            given = _read(path)
            if (found := _given_from(of, given, image_digest)) is not None:
                return found
            taken = {first for digest, first in given.items() if digest != image_digest}
            for first in range(of.first, of.first + of.count - UIDS_OF_AN_IMAGE + 1, UIDS_OF_AN_IMAGE):
                # A range that was set before may have begun elsewhere.
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
