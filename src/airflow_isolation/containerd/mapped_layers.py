"""Mounts of an image's layers, below one directory, whose files have the owners that they need in a user namespace.

In the kernel these are idmapped mounts, which an overlay accepts as lower layers since Linux 5.19.

The first container that needs the mounts makes them, and they serve all containers with the same image and uids. They are
needed only while a container is mounted: an overlay makes mounts of its own of its layers. They are read-only, in a
directory that only root may enter. They stay until ``unmap_unless``, which a clean-up calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_isolation.containerd.file_lock import locked
from airflow_isolation.containerd.own_process import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: mount(2) takes one page of options, and an overlay's options are nearly all layers.
_LAYERS_LENGTH = 3500
_SECONDS = 30.0
_PROGRAM = Path(__file__).with_name("map_layers.py")
_SUFFIX = ".lock"


class MappingError(Exception):
    """Layers can't be mounted with other owners; the text says why."""


def why_not_mapped(place: Path, layers: Sequence[str], *, first: int, size: int, pid: int) -> str:
    """Try whether ``layers`` can be mounted with other owners; empty: they can. Takes some 50 ms, and leaves nothing.

    ``pid``: the daemon's, because all of this happens in its mount namespace.
    """
    try:
        directory, _ = _places(place, layers, first)
        _run("try", directory, layers, first=first, size=size, pid=pid)
    except MappingError as error:
        return str(error)
    return ""


@contextmanager
def mapped_layers(
    place: Path, layers: Sequence[str], *, first: int, size: int, pid: int, end: float
) -> Iterator[tuple[str, ...]]:
    """Directories below ``place`` in which id n of the layers is ``first`` + n; made if they are missing.

    They are not removed before the block ends. ``pid``: as for ``why_not_mapped``; ``end``: a time of ``time.monotonic``.

    :raises MappingError: the kernel refuses, or there are too many layers for one overlay.
    :raises TimeoutError: another process held their lock until ``end``.
    """
    directory, shown = _places(place, layers, first)
    while True:
        with _held(directory, end, shared=True):
            if _are_there(shown, layers, first=first, size=size, pid=pid):
                yield shown
                return
        with _held(directory, end, shared=False):
            if not _are_there(shown, layers, first=first, size=size, pid=pid):
                _run("map", directory, layers, first=first, size=size, pid=pid)
                if not _are_there(shown, layers, first=first, size=size, pid=pid):
                    raise MappingError(f"what has been mounted in {directory} can't be seen there")


def unmap_unless(needed: Callable[[int], bool], place: Path, *, pid: int, dry_run: bool = False) -> tuple[Path, ...]:
    """Unmount the layers of each first uid that is not ``needed``, unless they are in use now; returns their directories.

    May be called twice. ``dry_run`` only returns them.

    :raises MappingError: the kernel refuses.
    """
    gone = []
    for lock in sorted(place.glob(f"*{_SUFFIX}")):
        directory = lock.with_suffix("")
        with ExitStack() as held:
            try:
                held.enter_context(_held(directory, 0.0, shared=False))
            except TimeoutError:
                continue
            if needed(int(directory.name.partition("-")[0])):
                continue
            if not dry_run:
                _run("unmap", directory, (), first=0, size=0, pid=pid)
                lock.unlink()
            gone.append(directory)
    with suppress(OSError):
        place.rmdir()
    return tuple(gone)


def _places(place: Path, layers: Sequence[str], first: int) -> tuple[Path, tuple[str, ...]]:
    directory = place / f"{first}-{hashlib.sha256(json.dumps([*layers]).encode()).hexdigest()[:12]}"
    shown = tuple(f"{directory}/{number}" for number in range(len(layers)))
    if {":", ",", "\\"} & set(str(place)):
        raise MappingError(f"an overlay can't have its layers below {place}, because of a character in that path")
    if len(":".join(shown)) > _LAYERS_LENGTH:
        raise MappingError(f"{len(layers)} layers below {place} are too many for one mount; a shorter state_dir helps")
    return directory, shown


@contextmanager
def _held(directory: Path, end: float, *, shared: bool) -> Iterator[None]:
    with ExitStack() as held:
        while not _lock(directory.with_suffix(_SUFFIX), end, shared, held):
            if time.monotonic() >= end:
                raise TimeoutError(f"{directory} is removed again and again")
        yield


def _lock(path: Path, end: float, shared: bool, held: ExitStack) -> bool:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ExitStack() as taken:
        try:
            descriptor = taken.enter_context(locked(path, end=end, shared=shared))
        except FileNotFoundError:
            return False  # a clean-up has removed the empty directory
        # If we waited for a clean-up, we now hold the lock of a directory that is gone.
        if not os.fstat(descriptor).st_nlink:
            return False
        held.push(taken.pop_all())
        return True


def _are_there(shown: Sequence[str], layers: Sequence[str], *, first: int, size: int, pid: int) -> bool:
    """Whether these mounts show the layers that are at these paths now, not older ones, and with the mapped owners."""
    root = f"/proc/{pid}/root"
    try:
        for one, layer in zip(shown, layers, strict=True):
            mapped, own = Path(f"{root}{one}").stat(), Path(f"{root}{layer}").stat()
            if not os.path.samestat(mapped, own) or (own.st_uid < size and mapped.st_uid != first + own.st_uid):
                return False
    except FileNotFoundError:
        return False
    except OSError as error:
        raise MappingError(f"the mounts of the process {pid} can't be seen: {error}") from error
    return True


def _run(do: str, directory: Path, layers: Sequence[str], *, first: int, size: int, pid: int) -> None:
    if not pid:
        raise MappingError("which process the daemon is can't be told")
    question = {"do": do, "pid": pid, "directory": str(directory), "layers": [*layers], "first": first, "size": size}
    answer = ask(_PROGRAM, question, seconds=_SECONDS)
    if "failed" in answer:
        raise MappingError(answer["failed"])
