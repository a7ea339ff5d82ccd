"""Work for which no task and no slot should wait: removing ended containers, making spares, changing labels, pruning.

There is one object for each process and daemon, with a connection of its own and a few threads. When the process ends, it
finishes what it has begun and removes the spares that it made. If the process is killed, ``prune`` finds them.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import structlog

from airflow_isolation.bridge.crew import Crew
from airflow_isolation.bridge.prune import prune_when_due
from airflow_isolation.bridge.spare import (
    SPARE_SECONDS,
    count_spares,
    discard,
    make_ones_own,
    make_spare,
    spare_directory,
)
from airflow_isolation.errors import IsolationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from airflow_isolation.bridge.started_agent import Launch
    from airflow_isolation.runtime.interface import ContainerRuntime

log = structlog.get_logger(logger_name="airflow_isolation.backstage")

#: How many containers may wait for their removal. When there are more, a task's thread removes its container itself.
MOST_WAITING = 16

#: Seconds for finishing what has been begun when the process ends.
CLOSE_SECONDS = 15.0

#: Seconds between two looks for containers that ended because no task came, and for what killed processes left.
LOOK_EVERY = 10.0

#: Seconds before a spare is made, so that the task that has just begun has the processor for itself. Many tasks end in it.
SPARE_DELAY = 0.3

#: How long the removal of a container waits for the change of its labels, in seconds. The change takes milliseconds.
LABEL_SECONDS = 10.0

_THREADS = 3


class Backstage:
    """The threads and their work for one daemon. ``close`` closes ``runtime``, too."""

    def __init__(self, runtime: ContainerRuntime, *, state_dir: Path) -> None:
        self.runtime = runtime
        self._state_dir = state_dir
        self._crew = Crew("backstage", _THREADS)
        # Labels have a thread of their own. Behind the making of a spare, a running task would be labelled "spare" for long.
        self._labellers = Crew("backstage-labels", 1)
        self._lock = threading.Lock()
        self._waiting = 0
        self._pending: set[Path] = set()
        self._spares: dict[Path, float] = {}
        self._closed = False
        self._ending = threading.Event()
        self._looking = threading.Thread(target=self._look, name="backstage-look", daemon=True)
        self._looking.start()

    def release(self, release: Callable[[], None]) -> None:
        """Call ``release`` in a thread; at once, in this thread, when too many wait already."""
        with self._lock:
            at_once = self._closed or self._waiting >= MOST_WAITING
            self._waiting += not at_once
        if at_once:
            release()
        else:
            self._crew.do(lambda: self._released(release))

    def _released(self, release: Callable[[], None]) -> None:
        try:
            release()
        finally:
            with self._lock:
                self._waiting -= 1
        prune_when_due(self.runtime, state_dir=self._state_dir)

    def relabel(self, claimed: Launch) -> Callable[[], object]:
        """Give a claimed spare the labels of its workload, in a thread; returns a function that waits until that is done."""
        done = threading.Event()

        def relabelled() -> None:
            try:
                make_ones_own(self.runtime, claimed, state_dir=self._state_dir)
            finally:
                done.set()

        with self._lock:
            at_once = self._closed
            if not at_once:
                self._labellers.do(relabelled)
        if at_once:
            relabelled()
        return partial(done.wait, LABEL_SECONDS)

    def replenish(self, like: Launch, *, wanted: int) -> None:
        """Make spares for workloads like this one, in a thread, until there are ``wanted``."""
        kind = spare_directory(self.runtime, like, state_dir=self._state_dir)
        with self._lock:
            if self._closed or kind in self._pending:
                return
            self._pending.add(kind)
        self._crew.do(lambda: self._replenished(kind, like, wanted))

    def _look(self) -> None:
        """Remove ended containers even if no task comes: each keeps its shim and its file system until it is removed."""
        while not self._ending.wait(LOOK_EVERY):
            self._crew.do(self._tidy_up)

    def _tidy_up(self) -> None:
        self._expire(time.monotonic() - SPARE_SECONDS)
        prune_when_due(self.runtime, state_dir=self._state_dir)

    def _replenished(self, kind: Path, like: Launch, wanted: int) -> None:
        ending = self._ending.wait(SPARE_DELAY)
        with self._lock:
            # Accept new requests from here on: a spare that is made now may be claimed before this returns.
            self._pending.discard(kind)
        for _ in range(wanted):
            if ending or count_spares(self.runtime, like, state_dir=self._state_dir) >= wanted:
                return
            try:
                record = make_spare(self.runtime, like, state_dir=self._state_dir)
            except IsolationError as error:
                log.warning("A spare container could not be made", image=like.spec.image, error=str(error))
                return
            with self._lock:
                self._spares[record] = time.monotonic()
            ending = self._ending.is_set()

    def _expire(self, made_before: float) -> None:
        with self._lock:
            old = [record for record, made in self._spares.items() if made <= made_before]
            for record in old:
                del self._spares[record]
        for record in old:
            discard(self.runtime, record, state_dir=self._state_dir)

    def close(self) -> None:
        """Finish, and remove the spares that are left.

        Takes at most ``CLOSE_SECONDS`` + ``LABEL_SECONDS``; may be called twice.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ending.set()
        self._looking.join(CLOSE_SECONDS)
        if not all([self._crew.close(CLOSE_SECONDS), self._labellers.close(LABEL_SECONDS)]):
            log.warning("Not everything could be removed in time; it will be pruned", seconds=CLOSE_SECONDS)
        self._expire(time.monotonic())
        self.runtime.close()
