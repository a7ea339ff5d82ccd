"""Remove what dead workers left: containers whose owner is gone, and directories that nobody holds.

A living owner is never robbed: a container is judged by its owner label (host, pid, start time), a directory by
the lock that its worker holds on it for as long as it lives. What a living owner could not remove himself, because the
daemon was away, he has noted with ``abandon``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.errors import ContainerRuntimeError
from airflow_isolation.runtime import labels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from airflow_isolation.runtime.interface import Container, ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.prune")


#: A worker makes its directory first and holds it a moment later, in seconds.
_NEWBORN = 60.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    containers: tuple[Container, ...]
    directories: tuple[Path, ...]


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a workload's directory; the kernel lets go when this process dies, however it dies."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def prune(runtime: ContainerRuntime, *, state_dir: Path, dry_run: bool = False) -> Pruned:
    """Remove the left-overs of this host's dead workers. What can't be removed is logged, and left for the next time."""
    containers = []
    abandoned = _notes(runtime, state_dir)
    for container in runtime.list():
        owner = labels.Owner.parse(container.labels.get(labels.OWNER, ""))
        if container.id not in abandoned and (owner is None or not owner.is_gone()):
            continue
        if not dry_run:
            try:
                runtime.remove(container.id)
            except ContainerRuntimeError as error:
                log.warning("A left-over container could not be removed", container=container.id, error=str(error))
                abandoned.pop(container.id, None)
                continue
            log.info("Removed a left-over container", container=container.id, owner=str(owner))
        containers.append(container)
    if not dry_run:
        for note in abandoned.values():
            note.unlink(missing_ok=True)
    return Pruned(tuple(containers), tuple(_abandoned(state_dir / "workloads", dry_run=dry_run)))


def abandon(runtime: ContainerRuntime, id: str, *, state_dir: Path) -> None:
    """Have the next ``prune`` remove a container of ours, although we live: the daemon did not do it."""
    notes = _notes_directory(runtime, state_dir)
    notes.mkdir(parents=True, exist_ok=True)
    (notes / id).touch()


def _notes(runtime: ContainerRuntime, state_dir: Path) -> dict[str, Path]:
    """The containers that were abandoned, by id."""
    try:
        return {note.name: note for note in _notes_directory(runtime, state_dir).iterdir()}
    except FileNotFoundError:
        return {}


def _notes_directory(runtime: ContainerRuntime, state_dir: Path) -> Path:
    # Two backends may share a state directory, and a daemon that is away can't be asked who it is.
    return state_dir / "abandoned" / type(runtime).__name__


def prune_when_due(runtime: ContainerRuntime, *, state_dir: Path, every: float = 600.0) -> None:
    """Prune if nobody on this host has for ``every`` seconds, or if a container was abandoned. Trouble is logged: it is nobody's task's fault."""
    stamp = state_dir / "pruned"
    try:
        due = time.time() - stamp.stat().st_mtime >= every
    except FileNotFoundError:
        due = True
    if not due and not _notes(runtime, state_dir):
        return
    try:
        with stamp.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.utime(stamp)
            prune(runtime, state_dir=state_dir)
    except BlockingIOError:
        return  # another worker is at it
    except (OSError, ContainerRuntimeError) as error:
        log.warning("Looking for left-overs of dead workers failed", error=str(error))


def _abandoned(workloads: Path, *, dry_run: bool) -> Iterator[Path]:
    if not workloads.is_dir():
        return
    for directory in sorted(workloads.iterdir()):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if time.time() - os.fstat(descriptor).st_mtime < _NEWBORN:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not dry_run:
                shutil.rmtree(directory, ignore_errors=True)
            yield directory
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
