"""A few threads for jobs that may block. They are daemon threads, so that a job that hangs can't keep the process alive."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger(logger_name="airflow_isolation.crew")


class Crew:
    """At most ``size`` threads, started as they are needed. Jobs should not raise; if one does, that is logged."""

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        self._closed = False

    def do(self, job: Callable[[], None]) -> None:
        """Queue a job; returns at once. After ``close`` jobs are ignored."""
        with self._lock:
            if self._closed:
                return
            self._unfinished += 1
            self._jobs.put(job)
            if self._unfinished > len(self._threads) and len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("A job of a crew failed", crew=self._name)
            del job  # otherwise the waiting thread would keep the job's objects alive
            with self._lock:
                self._unfinished -= 1

    def close(self, timeout: float) -> bool:
        """Finish the queued jobs, within ``timeout`` seconds; True when all are done. May be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._jobs.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)
