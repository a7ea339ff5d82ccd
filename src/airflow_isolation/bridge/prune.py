"""Remove what dead workers left: containers whose owner is gone, and directories that nobody holds.

A living owner is never robbed: a container is judged by its owner label (host, pid, start time), a directory by
the lock that its worker holds on it for as long as it lives. What a living owner could not remove himself, because the
daemon was away, he has noted with ``abandon``. A zygote has no owner: it stays while somebody listens in its directory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.bridge.abandoned import notes
from airflow_isolation.bridge.left_over import looks_left_over
from airflow_isolation.bridge.spare import NEWBORN, claim_to_remove, prune_spares
from airflow_isolation.bridge.zygote import alone_in, failed_lately, is_alive, zygote_of
from airflow_isolation.errors import ContainerRuntimeError
from airflow_isolation.runtime import labels
from airflow_isolation.runtime.interface import ContainerState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_isolation.runtime.interface import Container, ContainerRuntime, Stray

log = structlog.get_logger(logger_name="airflow_isolation.prune")

#: How often the directories of a host are looked at for left-overs, in seconds.
LOOK_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    containers: tuple[Container, ...]
    directories: tuple[Path, ...]
    strays: tuple[Stray, ...] = ()


def prune(runtime: ContainerRuntime, *, state_dir: Path, dry_run: bool = False, running_too: bool = True) -> Pruned:
    """Remove the left-overs of this host's dead workers. What can't be removed is logged, and left for the next time.

    Unless ``running_too``, a container that still runs is left to its agent, which ends it after the grace period.
    """
    containers = []
    abandoned = notes(runtime, state_dir)
    for container in runtime.list():
        if not running_too and container.state is ContainerState.RUNNING and _has_owner(container, abandoned):
            continue
        with _left_over(container, abandoned) as left_over:
            # A spare may have another owner by now; whoever claims it has it for himself.
            if not left_over:
                continue
            claimed = claim_to_remove(runtime, container.id, state_dir=state_dir, dry_run=dry_run)
            if not claimed or (not dry_run and not _removed(runtime, container)):
                abandoned.pop(container.id, None)  # its note stays, for the next time
                continue
        containers.append(container)
    if not dry_run:
        prune_spares(runtime, state_dir=state_dir)
        for note in abandoned.values():
            note.unlink(missing_ok=True)
    return Pruned(
        tuple(containers),
        (
            *_abandoned(state_dir / "workloads", dry_run=dry_run),
            *_of_no_zygote(state_dir / "zygotes", dry_run=dry_run),
            *_unused_roots(runtime, dry_run=dry_run),
        ),
        _strays(runtime, {container.id for container in containers}, dry_run=dry_run),
    )


def _has_owner(container: Container, abandoned: Mapping[str, Path]) -> bool:
    return container.id not in abandoned and container.labels.get(labels.PURPOSE) != "zygote"


@contextmanager
def _left_over(container: Container, abandoned: Mapping[str, Path]) -> Iterator[bool]:
    """Whether nobody needs a container any more, and while this is open nobody begins to."""
    if container.id in abandoned:
        yield True
    elif container.labels.get(labels.PURPOSE) == "zygote":
        with _left_over_zygote(container) as left_over:
            yield left_over
    else:
        owner = labels.Owner.parse(container.labels.get(labels.OWNER, ""))
        yield owner is not None and owner.is_gone()


@contextmanager
def _left_over_zygote(container: Container) -> Iterator[bool]:
    directory = Path(container.labels.get(labels.DIRECTORY, ""))
    if not directory.is_absolute():
        yield False  # not one of ours
    elif not directory.is_dir():
        yield True
    else:
        with ExitStack() as alone:
            try:
                alone.enter_context(alone_in(directory, end=time.monotonic()))
                runs = container.state is ContainerState.RUNNING and zygote_of(directory) == container.id
                dead = not (runs and is_alive(directory))
            except OSError:
                dead = False  # it is being started, or removed
            yield dead


def _removed(runtime: ContainerRuntime, container: Container) -> bool:
    try:
        runtime.remove(container.id)
    except ContainerRuntimeError as error:
        log.warning("A left-over container could not be removed", container=container.id, error=str(error))
        return False
    log.info(
        "Removed a left-over container", container=container.id, owner=container.labels.get(labels.OWNER, "nobody")
    )
    return True


def prune_when_due(runtime: ContainerRuntime, *, state_dir: Path, every: float = 600.0) -> None:
    """Prune if nobody on this host has for ``every`` seconds, or a container was abandoned; also if something looks as if
    it were left over, for which nobody looks more often than each ``LOOK_SECONDS``. Trouble is logged: it is nobody's task's
    fault.
    """
    pruned, looked = state_dir / "pruned", state_dir / "looked"
    due = _age(pruned) >= every
    if not due and not notes(runtime, state_dir):
        if _age(looked) < LOOK_SECONDS:
            return
        _touch(looked)
        if not looks_left_over(runtime, state_dir):
            return
    try:
        with pruned.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if due:
                os.utime(pruned)
            prune(runtime, state_dir=state_dir, running_too=due)
    except BlockingIOError:
        return  # another worker is at it
    except (OSError, ContainerRuntimeError) as error:
        log.warning("Looking for left-overs of dead workers failed", error=str(error))


def _age(stamp: Path) -> float:
    try:
        return time.time() - stamp.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _touch(stamp: Path) -> None:
    with suppress(OSError):
        stamp.touch()
        os.utime(stamp)


def _strays(runtime: ContainerRuntime, removed: set[str], *, dry_run: bool) -> tuple[Stray, ...]:
    try:
        found = runtime.remove_strays(dry_run=dry_run)
    except ContainerRuntimeError as error:
        log.warning("What is left of containers could not be removed", error=str(error))
        return ()
    if found and not dry_run:
        log.info("Removed what was left of containers", left=[f"{stray.kind} {stray.id}" for stray in found])
    return tuple(stray for stray in found if stray.id not in removed)


def _unused_roots(runtime: ContainerRuntime, *, dry_run: bool) -> tuple[Path, ...]:
    """What was mounted for the containers of an image in its user namespace, of which there are none now."""
    try:
        return runtime.remove_unused_roots(dry_run=dry_run)
    except ContainerRuntimeError as error:
        log.warning("What is mounted for containers that are gone could not be taken away", error=str(error))
        return ()


def _of_no_zygote(zygotes: Path, *, dry_run: bool) -> Iterator[Path]:
    """Directories in which nobody listens. The container, if there is still one, is known by its labels."""
    for directory in sorted(zygotes.glob("*")):
        try:
            if time.time() - directory.stat().st_mtime < NEWBORN or failed_lately(directory):
                continue
            with alone_in(directory, end=time.monotonic()):
                if is_alive(directory):
                    continue
                if not dry_run:
                    shutil.rmtree(directory, ignore_errors=True)
            yield directory
        except OSError:
            continue


def _abandoned(workloads: Path, *, dry_run: bool) -> Iterator[Path]:
    if not workloads.is_dir():
        return
    for directory in sorted(workloads.iterdir()):
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if time.time() - os.fstat(descriptor).st_mtime < NEWBORN:
                continue
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not dry_run:
                shutil.rmtree(directory, ignore_errors=True)
            yield directory
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
