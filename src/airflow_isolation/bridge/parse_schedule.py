"""Decides which file gets which container, and which containers are started and removed. Pure: no thread, clock or daemon.

The pool says what happened and what time it is, and carries out the orders that ``orders`` yields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from airflow_isolation.bridge.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from airflow_isolation.errors import IsolationError

#: How long a file waits before it may have an idle container removed for which another file waits.
PATIENCE = 10.0


class Reusable(Protocol):
    """What the schedule needs to know about a container."""

    @property
    def forks(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def born(self) -> float: ...


ContainerT = TypeVar("ContainerT", bound=Reusable)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A file that waits for a container with its key. ``max_forks``: how many files such a container may parse."""

    file: Hashable
    key: Hashable
    max_forks: int
    since: float


@dataclass(frozen=True, slots=True)
class Give(Generic[ContainerT]):
    """The order to give the file a container. It has it until ``given_back``."""

    file: Hashable
    container: ContainerT


@dataclass(frozen=True, slots=True)
class Start:
    """The order to start a container, with the settings of ``file``. Any file with the same key may get it."""

    file: Hashable
    key: Hashable


@dataclass(frozen=True, slots=True)
class Remove(Generic[ContainerT]):
    """The order to remove a container. It counts against the limit until ``removed``."""

    container: ContainerT


@dataclass(frozen=True, slots=True)
class Refuse:
    """The order to refuse a file: it can have no container for ``seconds`` from now."""

    file: Hashable
    error: IsolationError
    seconds: float


@dataclass(slots=True)
class _Kept:
    key: Hashable
    max_forks: int
    idle_since: float | None = None


class ParseSchedule(Generic[ContainerT]):
    """The waiting files, in the order in which they came, and the containers: idle, given out, being started or removed."""

    def __init__(
        self,
        *,
        at_most: int,
        per_key: int,
        idle_timeout: float,
        max_age: float,
        max_memory: int | None,
        backoff: Backoff | None = None,
    ) -> None:
        self._at_most = at_most
        self._per_key = per_key
        self._idle_timeout = idle_timeout
        self._max_age = max_age
        self._max_memory = max_memory
        self._backoff = backoff or Backoff()
        self._waiting: dict[Hashable, Waiting] = {}
        self._kept: dict[ContainerT, _Kept] = {}
        self._starting: dict[Hashable, int] = {}
        self._removing: set[ContainerT] = set()
        self._refused: list[Refuse] = []

    def wait(self, waiting: Waiting) -> None:
        """A file wants a container. A second call for the same file changes nothing."""
        self._waiting.setdefault(waiting.file, waiting)

    def cancel(self, file: Hashable) -> None:
        self._waiting.pop(file, None)

    def started(self, key: Hashable, container: ContainerT, *, max_forks: int, now: float) -> None:
        """The container that ``Start`` ordered is ready."""
        self._started_less(key)
        self._backoff.succeeded(key)
        self._kept[container] = _Kept(key, max_forks, idle_since=now)

    def start_failed(self, key: Hashable, error: IsolationError, *, now: float) -> None:
        """The start failed. The file that waits longest for this key is refused, and no start is tried for a while."""
        self._started_less(key)
        seconds = self._backoff.failed(key, error, now=now)
        for waiting in self._waiting_for(key):
            del self._waiting[waiting.file]
            self._refused.append(Refuse(waiting.file, error, seconds))
            return

    def start_dropped(self, key: Hashable) -> None:
        """The start was not tried, because the image has another digest by now."""
        self._started_less(key)

    def given_back(self, container: ContainerT, *, reusable: bool, now: float) -> None:
        """The file's parse is over. An unknown container, or one given back twice, is ignored."""
        kept = self._kept.get(container)
        if kept is None or kept.idle_since is not None:
            return
        kept.idle_since = now
        if not reusable:
            self.lose(container)

    def lose(self, container: ContainerT) -> None:
        """The container has ended, or can't be used any more: no file gets it, and the next orders remove it."""
        kept = self._kept.get(container)
        if kept is not None:
            kept.max_forks = 0

    def removed(self, container: ContainerT) -> None:
        self._removing.discard(container)

    def idle(self) -> tuple[ContainerT, ...]:
        """The idle containers, the least recently used first."""
        found = [(kept.idle_since, container) for container, kept in self._kept.items() if kept.idle_since is not None]
        return tuple(container for _, container in sorted(found, key=lambda pair: pair[0]))

    def containers(self) -> tuple[ContainerT, ...]:
        """All containers, given out or not, except those being removed."""
        return tuple(self._kept)

    def __len__(self) -> int:
        """How many containers count against the limit."""
        return len(self._kept) + sum(self._starting.values()) + len(self._removing)

    def waiting(self) -> int:
        return len(self._waiting)

    def orders(self, now: float) -> Iterator[Give[ContainerT] | Start | Remove[ContainerT] | Refuse]:
        """What to do now. An order counts as given when the iterator has yielded it."""
        while self._refused:
            yield self._refused.pop(0)
        for container in self.idle():
            if self._is_worn(container, now):
                yield self._remove(container)
        coming = dict(self._starting)
        leaving = len(self._removing)
        for waiting in list(self._waiting.values()):
            fits = [container for container in self.idle() if self._kept[container].key == waiting.key]
            if fits:
                # Take the most recently used one, so that the others reach their idle timeout.
                self._kept[fits[-1]].idle_since = None
                del self._waiting[waiting.file]
                yield Give(waiting.file, fits[-1])
                continue
            if coming.get(waiting.key, 0) > 0:
                coming[waiting.key] -= 1
                continue
            trouble = self._backoff.trouble(waiting.key, now=now)
            alive = self._count(waiting.key)
            if trouble is not None:
                if alive == 0:
                    del self._waiting[waiting.file]
                    yield Refuse(waiting.file, trouble.error, trouble.until - now)
                continue
            if alive >= self._per_key:
                continue
            if len(self) >= self._at_most:
                if leaving > 0:
                    leaving -= 1
                    continue
                victim = self._victim(waiting, now)
                if victim is not None:
                    yield self._remove(victim)
                continue
            self._starting[waiting.key] = self._starting.get(waiting.key, 0) + 1
            yield Start(waiting.file, waiting.key)

    def _is_worn(self, container: ContainerT, now: float) -> bool:
        kept = self._kept[container]
        if container.forks >= kept.max_forks:
            return True
        if container.forks == 0 and any(waiting.key == kept.key for waiting in self._waiting.values()):
            # Not worn before its first parse while a file waits, whatever the limits: else it would be replaced without end.
            return False
        return (
            now - container.born >= self._max_age
            or (kept.idle_since is not None and now - kept.idle_since >= self._idle_timeout)
            or (self._max_memory is not None and container.memory > self._max_memory)
        )

    def _victim(self, waiting: Waiting, now: float) -> ContainerT | None:
        wanted = {other.key for other in self._waiting.values()}
        for container in self.idle():
            if self._kept[container].key not in wanted or now - waiting.since >= PATIENCE:
                return container
        return None

    def _remove(self, container: ContainerT) -> Remove[ContainerT]:
        del self._kept[container]
        self._removing.add(container)
        return Remove(container)

    def _count(self, key: Hashable) -> int:
        return sum(kept.key == key for kept in self._kept.values()) + self._starting.get(key, 0)

    def _waiting_for(self, key: Hashable) -> Iterator[Waiting]:
        return (waiting for waiting in list(self._waiting.values()) if waiting.key == key)

    def _started_less(self, key: Hashable) -> None:
        self._starting[key] -= 1
        if not self._starting[key]:
            del self._starting[key]
